"""The table of contents: every stage from text to kernels, in order.

parse . check . flatten . (track | freeze) . tidy . vjp . tidy . save . schedule . render . load
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from normc import config
from normc.backends import contract
from normc.backends.contract import Backend, Job, Run, Source
from normc.language.axes import Axis
from normc.language.definition import Definition
from normc.program.flatten import flatten_definition
from normc.program.program import COTANGENT, Program, restrict
from normc.program.running import Running, freeze, running, track
from normc.program.tidy import tidy
from normc.schedule.plan import Plan
from normc.schedule.schedule import CHANNELS_FIRST, schedule

Mode = Literal["batch", "track", "frozen"]
"""Where batch statistics come from: the batch; the batch, handed out too; running buffers."""


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
def programs(definition: Definition, wrt: tuple[str, ...], mode: Mode = "batch") -> Programs:
    """Derive: the forward Program, and the backward one for the gradients of ``wrt``."""
    flat = flatten_definition(definition)
    results = tuple(o.name for o in flat.outputs)
    rows = running(flat)
    if mode == "track":
        flat = track(flat, rows)
    elif mode == "frozen":
        flat = freeze(flat, rows)
    wanted = tuple(i.name for i in flat.inputs if i.name in wrt)
    return _paired(flat, wanted, results, rows, 0)


def _paired(
    source: Program, wanted: tuple[str, ...], results: tuple[str, ...], rows: tuple[Running, ...],
    level: int,
) -> Programs:  # fmt: skip
    """Forward, and backward if any gradient is wanted."""
    if not wanted:
        return Programs(tidy(source), None, (), results, rows, {}, source, level)
    from normc.program.derive import pair  # brings sympy, which takes 0.3 s to import

    both = pair(source, wanted, results)
    return Programs(
        both.forward, both.backward, both.saved, results, rows, both.gradients, source, level
    )


def differentiated(found: Programs, wrt: tuple[str, ...], wanted: tuple[str, ...]) -> Programs:
    """Derive again: the gradients of ``wrt`` as results themselves, differentiable by ``wanted``.

    Backward is a program like any other. It is taken without what forward has saved, because that
    depends on the inputs as well; its results are called ``grad1_x``, those of its own ``grad2_x``.
    """
    return _differentiated(found.source, found.results, found.running, found.level, wrt, wanted)


@lru_cache(maxsize=1024)
def _differentiated(
    source: Program, results: tuple[str, ...], rows: tuple[Running, ...], level: int,
    wrt: tuple[str, ...], wanted: tuple[str, ...],
) -> Programs:  # fmt: skip
    from normc.program.derive import reuse, vjp

    gradient = vjp(source, wrt, results)
    both = zip(gradient.outputs, wrt, strict=True)
    outputs = [replace(o, name=f"grad{level + 1}_{name}") for o, name in both]
    own = {s.name for s in source.stats}
    inputs = tuple(i for i in gradient.inputs if i.name not in own)
    inputs = (*inputs, *(i for i in source.inputs if i not in inputs))
    whole = restrict(Program(inputs, (*source.stats, *gradient.stats), ()), outputs)
    past = tuple(replace(o, name=past_name(level, o.name)) for o in source.outputs)
    whole = reuse(replace(source, outputs=past), whole)  # backward may have kept only results
    inside = tuple(n for n in wanted if n in {i.name for i in whole.inputs})
    names = tuple(o.name for o in outputs)
    return _paired(whole, inside, names, rows, level + 1)


def jobs(
    definition: Definition, label: str, text: str, found: Programs, target: Target
) -> list[Job]:
    """Schedule: the forward job, and the backward one if there is one."""
    return _jobs(label, text, found, target)


def _jobs(label: str, text: str, found: Programs, target: Target) -> list[Job]:
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
) -> Rendered:
    """Everything up to the sources."""
    found = programs(definition, wrt, mode)
    config.debug(3, found.forward.show)
    backend = contract.find(target.backend)
    made = jobs(definition, label, text, found, target)
    for job in made:
        config.debug(5, job.plan.show)
    printed = [backend.render(job) for job in made]
    config.debug(4, lambda: backend.unit(made, printed))
    return Rendered(backend, found, made, printed)


def past_name(level: int, result: str) -> str:
    """What a derivative calls a result that it reads."""
    return f"past{level}_{result}"


def build_again(found: Programs, label: str, text: str, target: Target) -> Built:
    """Kernels for programs that were derived again."""
    backend = contract.find(target.backend)
    made = _jobs(f"{label}_grad{found.level}", text, found, target)
    printed = [backend.render(job) for job in made]
    return load(Rendered(backend, found, made, printed))


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
) -> Built:
    """Everything: text's definition in, loaded kernels out."""
    began = time.perf_counter()
    built = load(render(definition, label, text, wrt, mode, target))
    config.debug(1, f"{label}: {target.backend} ready in {time.perf_counter() - began:.3f} s")
    return built


def sources(
    definition: Definition, label: str, text: str, wrt: tuple[str, ...], target: Target
) -> Iterator[tuple[Job, Source]]:
    """What a backend prints, without compiling it."""
    backend = contract.find(target.backend)
    for job in jobs(definition, label, text, programs(definition, wrt), target):
        yield job, backend.render(job)


__all__ = [
    "COTANGENT",
    "Built",
    "Mode",
    "Programs",
    "Rendered",
    "Target",
    "build",
    "jobs",
    "load",
    "programs",
    "render",
    "sources",
]
