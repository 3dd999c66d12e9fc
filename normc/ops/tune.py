"""Tune: at the first call of a kind, the schedules of every kernel are tried on its own tensors.

    forward, then backward, kernel by kernel: the whole job under each schedule on offer
        judged     against the oracle in float64, see `normc.ops.rehearsal`
        timed      in turns, see `normc.ops.stopwatch`
        recorded   the fastest that agrees, the others, and those refused with the reason

What is on record comes first wherever schedules are chosen (`normc.backends.tuned`), so the call
that was waiting is already launched so. A schedule that fails to compile, to launch or to agree is
never chosen. Statistics that are frozen are not tuned: the oracle takes them from the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normc import config
from normc.backends import contract
from normc.backends.calls import Runner
from normc.backends.gpus import Machine
from normc.backends.settle import MOST_TRIES, Choose, Measured
from normc.backends.tile_choice import Schedule, wider
from normc.backends.tuned import Trial, fastest, named, preferred, remember, show
from normc.errors import NormcError
from normc.formula import Formula
from normc.ops.call import Call
from normc.ops.judge import Expected, Tensors, strays
from normc.ops.rehearsal import Rehearsal
from normc.ops.stopwatch import TIMERS, Thunk, Timer
from normc.schedule.plan import Kernel


def tune(formula: Formula, call: Call, given: Mapping[str, Tensor], eps: float) -> None:
    """Measure whatever the record does not know of a kind of call; its kernels then follow it."""
    device, timer = call.device, TIMERS.get(call.device.type)
    parts = ("forward", "backward") if call.gradient and call.outputs else ("forward",)
    found = {part: getattr(call.built, part) for part in parts}
    runners = {part: r for part, r in found.items() if isinstance(r, Runner)}
    if timer is None or not runners or not math.prod(call.shape) or _captured(device):
        return
    if any(runner.machinery.only() for runner in runners.values()):
        return  # schedules are forced: which is the fastest is not asked
    rehearsal = Rehearsal(formula, call, {name: t.detach() for name, t in given.items()}, eps)
    machine: Machine = _triton().machine(device)
    try:
        with torch.autocast(device.type, enabled=False):
            for part, runner in runners.items():
                Tuning(rehearsal, part, runner, machine, timer).tune()
    except (RuntimeError, NormcError) as error:  # no memory for the oracle, a device that fails
        config.debug(1, f"{formula.label} is not tuned: {reason(error)}")


def _captured(device: torch.device) -> bool:
    """Whether launches are only noted down, for a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _triton() -> Any:
    return contract.find("triton")


@dataclass(frozen=True)
class Tuning:
    """One job of a call while the schedules of its kernels are tried."""

    rehearsal: Rehearsal
    part: str
    runner: Runner
    machine: Machine
    timer: Timer

    @property
    def usual(self) -> Choose:
        """What kernels are launched under that are not on trial."""
        machinery: Any = self.runner.machinery
        return preferred(machinery.choose)

    def tune(self) -> None:
        """Try the kernels of which nothing is known."""
        job, geometry = self.runner.job, self.rehearsal.call.geometry
        offers = {k: self.usual(job, k, geometry, self.machine) for k in job.plan.kernels}
        unknown = {k: o for k, o in offers.items() if not isinstance(o[0], Measured)}
        for kernel, offered in unknown.items():
            trials = self.compared(kernel, several(offered))
            remember(job, kernel, geometry, self.machine, trials)
            config.debug(1, partial(_line, job.entry, kernel, trials))
        if unknown:
            self.runner.bound.cache_clear()  # calls that come are settled anew

    def compared(self, kernel: Kernel, schedules: Sequence[Schedule]) -> list[Trial]:
        """A kernel under each schedule, the others as they are usually."""
        expected, device = self.rehearsal.expected, self.rehearsal.call.device
        trials, calls = list[Trial](), dict[str, Thunk]()
        for schedule in schedules:
            call = self.rehearsal.under(self.part, self.fixed(kernel, schedule))
            trial = self.judged(expected, call, schedule)
            trials.append(trial)
            if not trial.refused:
                calls[show(schedule)] = partial(self.rehearsal.run, call, self.part)
        times = self.timer(calls, device) if calls else {}
        return [t if t.refused else replace(t, us=times[show(t.schedule)]) for t in trials]

    def fixed(self, kernel: Kernel, schedule: Schedule) -> Runner:
        """The job with one kernel under this schedule and no other."""

        def choose(job: Any, other: Kernel, geometry: Any, machine: Machine) -> list[Schedule]:
            if other.name == kernel.name:
                return [Measured(schedule)]
            return self.usual(job, other, geometry, machine)

        machinery: Any = self.runner.machinery
        return Runner(self.runner.job, replace(machinery, choose=choose))

    def judged(self, expected: Expected, call: Call, schedule: Schedule) -> Trial:
        """What comes of a call, or why nothing does."""
        try:
            found, again = (self.rehearsal.outcome(call) for _ in range(2))
            return _verdict(expected, found, again, schedule)
        except Exception as error:  # those of Triton have no common base
            if call.device.type == "cuda":
                torch.cuda.synchronize()  # raises if nothing can be run any more
            return Trial(schedule, refused=reason(error))


def several(offered: Sequence[Schedule]) -> list[Schedule]:
    """All that could be launched if none were measured, and every other one on offer."""
    both: dict[str, Schedule] = {}
    for schedule in offered:
        for one in (schedule, wider(schedule)):
            both.setdefault(show(one), one)
    first = dict(list(both.items())[:MOST_TRIES])
    return list((first | {name: both[name] for name in map(show, offered)}).values())


def _verdict(expected: Expected, found: Tensors, again: Tensors, schedule: Schedule) -> Trial:
    """What the oracle says of all that a call computes, which it has to do twice alike."""
    differing = [name for name, t in found.items() if strays(again[name], t, 0.0)]
    if differing:
        return Trial(schedule, refused=f"{differing[0]} differs from one time to the next")
    errors = expected.errors(found)
    for e in errors:
        if not e.ok or not math.isfinite(e.error):
            text = f"{e.tensor} is off by {e.error:.1e}, and {e.limit:.1e} is allowed"
            return Trial(schedule, refused=text)
    worst = max(errors, key=lambda e: e.error)
    crowd = expected.crowd(found, errors)
    return Trial(schedule, error=worst.error, tensor=worst.tensor, refused=crowd)


def _line(entry: str, kernel: Kernel, trials: Sequence[Trial]) -> str:
    """What is printed of a kernel."""
    best, first = fastest(trials), trials[0]
    agree = f"{sum(not t.refused for t in trials)} of {len(trials)} agree with the oracle"
    if best is None:
        return f"tuned {entry} {kernel.name}: {agree}; {show(first.schedule)}: {first.refused}"
    other = f"refused: {first.refused}" if first.refused else f"{first.us:.1f} us"
    return (
        f"tuned {entry} {kernel.name}: {show(best.schedule)}, {best.us:.1f} us; {agree}; "
        f"the first on offer, {named(first.schedule)}: {other}"
    )


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
