"""Settle: of the schedules that a job could be launched under, those that it is, compiled.

The first that keeps everything in registers is taken, and only where its programs can meet if they
have to. How a function is compiled is for others to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from normc.backends.calls import Kind
from normc.backends.contract import Job
from normc.backends.gpus import Machine
from normc.backends.launches import Launch, followers, main_launch, sized
from normc.backends.tile_choice import Schedule, wider
from normc.backends.tiling import Config
from normc.language.geometry import Geometry
from normc.schedule.plan import Kernel

Choose = Callable[[Job, Kernel, Geometry, Machine], list[Schedule]]
"""The schedules that a kernel could be launched under, the most promising first."""


class Measured(tuple[Config, ...]):
    """A schedule that a device has been timed under: it is taken as it is, whatever it spills."""


@dataclass(frozen=True)
class Report:
    """What a compiled kernel asks of the machine."""

    registers: int  # per thread
    spills: int  # bytes per thread, of registers written to memory
    shared: int  # bytes per program


def offered(
    choose: Choose, only: str, job: Job, geometry: Geometry, machine: Machine
) -> Iterator[tuple[Kernel, list[Schedule]]]:
    """For each kernel of a job what can be launched, in order of preference."""
    for kernel in job.plan.kernels:
        every = choose(job, kernel, geometry, machine)
        some = [s for s in every if any(c.form.schedule == only for c in s)]
        yield kernel, some or every


MOST_THREADS = 8
"""Kernels that are compiled at the same time."""

MOST_TRIES = 6
"""Schedules of a kernel that are compiled in the hope that one spills nothing."""


@dataclass(frozen=True)
class Maker:
    """Compiles the launches of a job for one GPU, which need not be there."""

    kind: Kind
    machine: Machine
    eps: float
    functions: Callable[[Job, Schedule], Any]  # a module with the functions of a schedule
    make: Callable[[Any, Launch], Any]  # one of them, compiled for a launch
    report: Callable[[Any], Report]

    def settled(self, choose: Choose, only: str) -> list[tuple[Launch, Any]]:
        """All launches, compiled: of each kernel the first schedule that spills nothing."""
        every = list(offered(choose, only, self.kind.job, self.kind.geometry, self.machine))
        self.ahead_of_need([schedules[0] for _, schedules in every])
        found: list[tuple[Launch, Any]] = []
        for kernel, schedules in every:
            best: tuple[int, list[tuple[Launch, Any]]] | None = None
            for schedule in islice(_tries(schedules), MOST_TRIES):
                spilled, launches = self.compiled(schedule)
                if launches is not None and (best is None or spilled < best[0]):
                    best = spilled, launches
                if best and (not best[0] or isinstance(schedule, Measured)):
                    break
            assert best is not None, f"no schedule of {kernel.name} can be launched"
            found += best[1]
        return found

    def ahead_of_need(self, schedules: Sequence[Schedule]) -> None:
        """Compile side by side what will likely be launched; Triton's cache hands it out again."""
        wanted: list[tuple[Any, Launch]] = []
        for schedule in schedules:
            module = self.functions(self.kind.job, schedule)
            for c in schedule:
                first = self.first(c)
                fitted = sized(first, self.machine, self.machine.processors) or first
                launches = [first, *followers(c, fitted, self.kind.geometry)]
                wanted += [(getattr(module, one.name), one) for one in launches if one.programs]
        if len(wanted) > 1:
            with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1, MOST_THREADS)) as pool:
                list(pool.map(lambda pair: self.make(*pair), wanted))

    def first(self, config: Config) -> Launch:
        """The launch of a form itself."""
        return main_launch(config, self.kind.geometry, self.kind.steps, self.eps)

    def compiled(self, schedule: Schedule) -> tuple[int, list[tuple[Launch, Any]] | None]:
        """The launches of one schedule and the bytes they spill; None if programs cannot meet."""
        spilled, found = 0, list[tuple[Launch, Any]]()
        module = self.functions(self.kind.job, schedule)
        for c in schedule:
            first = self.first(c)
            if not first.programs:
                continue
            made = self.make(getattr(module, first.name), first)
            report = self.report(made)
            spilled += report.spills
            residents = self.machine.residents(report.registers, first.warps, report.shared)
            fitted = sized(first, self.machine, residents)
            if fitted is None:
                return spilled, None
            found.append((fitted, made))
            for one in followers(c, fitted, self.kind.geometry):
                found.append((one, self.make(getattr(module, one.name), one)))
        return spilled, found


def _tries(schedules: list[Schedule]) -> Iterator[Schedule]:
    """The best schedules, each with the warps that were meant for it and then with more."""
    for schedule in schedules:
        yield schedule
        if not isinstance(schedule, Measured) and wider(schedule) != schedule:
            yield wider(schedule)
