"""The table of contents: every stage from text to kernels, in order.

parse . check . flatten . (track | freeze | synced | local) . {vjp | jvp | vmap} . tidy . vjp .
tidy . save . schedule . render . load
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from normc import config
from normc.backends import contract
from normc.backends.contract import Backend, Job, Run, Source
from normc.language.axes import Axis
from normc.language.definition import Definition
from normc.program.flatten import flatten_definition
from normc.program.program import COTANGENT, Program, distinct
from normc.program.running import LOCAL, Mode, Running, by_mode, levels, running, whole_counts
from normc.program.steps import Stage, Step, take
from normc.program.tidy import tidy
from normc.schedule.plan import Plan
from normc.schedule.schedule import CHANNELS_FIRST, schedule

Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Programs:
    """Forward and backward of one formula for one set of wanted gradients."""

    forward: Program
    backward: Program | None
    saved: tuple[str, ...]  # statistics that forward hands to backward
    results: tuple[str, ...]
    running: tuple[Running, ...]
    gradients: Mapping[str, str] = field(default_factory=dict[str, str])
    """For the gradient of each input, ``d_x``, the output of backward that holds it."""
    source: Program = Program((), (), ())
    """What was differentiated: results from inputs alone, nothing saved."""
    level: int = 0  # how often it is a derivative itself


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for."""

    backend: str
    dtype: str
    order: tuple[Axis, ...] = CHANNELS_FIRST
    unit: bool = True
    split: bool = False  # reductions are few and large


@dataclass(frozen=True)
class Rendered:
    """The sources of one formula, not compiled yet."""

    backend: Backend
    programs: Programs
    jobs: Sequence[Job]
    sources: Sequence[Source]


@dataclass(frozen=True)
class Built:
    """Loaded kernels, and the programs they came from."""

    programs: Programs
    forward: Run
    backward: Run | None


@lru_cache(maxsize=1024)
def programs(
    definition: Definition, wrt: tuple[str, ...], mode: Mode = "batch", steps: Steps = ()
) -> Programs:
    """Derive: the forward Program after ``steps``, and backward for the gradients of ``wrt``."""
    stage, rows = staged(definition, mode, steps)
    source, results = stage.source, stage.results
    wanted = tuple(i.name for i in source.inputs if i.name in wrt)
    if not wanted:
        return Programs(tidy(source), None, (), results, rows, {}, source, stage.level)
    from normc.program.derive import pair  # brings sympy, which takes 0.3 s to import

    both = pair(source, wanted, results)
    return Programs(
        *(both.forward, both.backward, both.saved, results, rows, both.gradients),
        *(source, stage.level),
    )


@lru_cache(maxsize=1024)
def staged(definition: Definition, mode: Mode, steps: Steps) -> tuple[Stage, tuple[Running, ...]]:
    """What a formula computes after ``steps``, and the running statistics of its mode."""
    if steps:
        before, rows = staged(definition, mode, steps[:-1])
        stage = take(before, steps[-1])
        distinct(stage.source)
        return stage, rows
    flat = flatten_definition(definition)
    rows = running(flat)
    source = distinct(by_mode(flat, rows, mode))
    results = tuple(o.name for o in (source if mode.startswith(LOCAL) else flat).outputs)
    return Stage(source, results), rows


@lru_cache(maxsize=1024)
def batch_levels(definition: Definition) -> tuple[tuple[Running, ...], ...]:
    """The statistics that cross samples, those first that depend on no other."""
    flat = flatten_definition(definition)
    return tuple(map(tuple, levels(flat, running(flat))))


@lru_cache(maxsize=1024)
def batch_counts(definition: Definition) -> dict[str, Axis]:
    """The numbers of elements over samples that a formula itself reads, as synced programs do."""
    return whole_counts(flatten_definition(definition))


def jobs(label: str, text: str, found: Programs, target: Target) -> list[Job]:
    """Schedule: the forward job, and the backward one if there is one."""
    frozen = tuple(r.stat for r in found.running)
    made: list[Job] = []
    parts = [("forward", found.forward, found.saved, frozen)]
    if found.backward is not None:
        parts.append(("backward", found.backward, (), (*found.saved, *frozen)))
    for part, program, saved, dense in parts:
        plan = schedule(program, target.order, contract.find(target.backend).able, target.split)
        plan = Plan(plan.program, plan.kernels, plan.order, saved)
        made.append(Job(label, part, text, plan, target.dtype, dense, target.unit))
    return made


def render(
    definition: Definition,
    label: str,
    text: str,
    wrt: tuple[str, ...],
    mode: Mode,
    target: Target,
    steps: Steps = (),
) -> Rendered:
    """Everything up to the sources."""
    found = programs(definition, wrt, mode, steps)
    config.debug(3, found.forward.show)
    backend = contract.find(target.backend)
    made = jobs("_".join([label, *(step.kind for step in steps)]), text, found, target)
    for job in made:
        config.debug(5, job.plan.show)
    printed = [backend.render(job) for job in made]
    config.debug(4, lambda: backend.unit(made, printed))
    return Rendered(backend, found, made, printed)


def load(rendered: Rendered) -> Built:
    """Compile and load what has been rendered, unless the cache has it."""
    runs = rendered.backend.load(rendered.jobs, rendered.sources)
    return Built(rendered.programs, runs[0], runs[1] if len(runs) > 1 else None)


def build(
    definition: Definition,
    label: str,
    text: str,
    wrt: tuple[str, ...],
    mode: Mode,
    target: Target,
    steps: Steps = (),
) -> Built:
    """Everything: text's definition in, loaded kernels out."""
    began = time.perf_counter()
    built = load(render(definition, label, text, wrt, mode, target, steps))
    config.debug(1, f"{label}: {target.backend} ready in {time.perf_counter() - began:.3f} s")
    return built


def sources(
    definition: Definition, label: str, text: str, wrt: tuple[str, ...], target: Target
) -> Iterator[tuple[Job, Source]]:
    """What a backend prints, without compiling it."""
    backend = contract.find(target.backend)
    for job in jobs(label, text, programs(definition, wrt), target):
        yield job, backend.render(job)


__all__ = [
    "COTANGENT",
    "Built",
    "Mode",
    "Programs",
    "Rendered",
    "Steps",
    "Target",
    "build",
    "jobs",
    "load",
    "programs",
    "render",
    "sources",
]
