"""Explain: what an op does with tensors like the one given, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from normc.backends.contract import Job
from normc.formula import Formula
from normc.language.axes import Axis
from normc.language.geometry import Geometry, Groups
from normc.ops.target import target_of
from normc.pipeline import Programs, Target, jobs, programs
from normc.schedule.cost import Traffic, Ways, moved, show_bytes, ways


def explain(
    formula: Formula,
    x: Tensor,
    groups: Groups = "auto",
    channel_dim: int = 1,
    backend: str = "auto",
) -> str:
    """The programs and plans, forward and backward, for tensors like x, and the bytes they move.

    Stable text; nothing is compiled or run. Raises `ShapeError` if x does not fit the groups.
    """
    geometry = Geometry.of(x.shape, groups, channel_dim)
    sizes = ", ".join(f"{a.name}={n}" for a, n in zip(Axis, geometry.sizes(), strict=True))
    target = target_of(formula, backend, x, (), geometry)
    header = f"x {tuple(x.shape)} {target.dtype}: {sizes}; backend {target.backend}"
    lines = [formula.shown, "", header]
    for job in all_jobs(formula, target):
        lines += ["", *_explain_job(job, target.backend, geometry, x.element_size())]
    return "\n".join(lines)


def all_jobs(formula: Formula, target: Target) -> list[Job]:
    """The forward job, and the backward one for every gradient there is."""
    return jobs(formula.label, formula.text, all_programs(formula), target)


def all_programs(formula: Formula) -> Programs:
    """The forward program, and the backward one for every gradient there is."""
    wrt = ("x", *(i.name for i in formula.inputs), *(p.name for p in formula.params))
    return programs(formula.definition, wrt)


def show_moved(job: Job, backend: str) -> str:
    """What a plan moves, in tensors of x's size: its floor, and how near the kernels come to it.

    Those of the Triton backend come under four schedules: ``floor 2A; resident, cluster 2A;
    streaming, split 3A (small: s0)``.
    """
    if backend != "triton":
        return moved(job.plan, job.dense).show()
    found = ways(job.plan, job.dense)
    small = found.streaming.small
    named = f" (small: {', '.join(small)})" if small else ""
    return f"{_schedules(found, Traffic.show)}{show_again(found)}{named}"


def show_again(found: Ways) -> str:
    """Which kernels read the same: what keeps even those on chip above the floor, or nothing."""
    if found.once.full <= found.floor.full:
        return ""
    tensors: dict[tuple[str, ...], list[str]] = {}
    for name, kernels in found.again:
        tensors.setdefault(kernels, []).append(name)
    each = (f"{_and(who)} each read {_and(names)}" for who, names in tensors.items())
    return "".join(f"; {text}" for text in each)


def _show_bytes(job: Job, backend: str, geometry: Geometry, itemsize: int) -> str:
    """The same in bytes."""
    if backend != "triton":
        return moved(job.plan, job.dense).show_bytes(geometry, itemsize)
    found = ways(job.plan, job.dense)
    return _schedules(found, lambda traffic: show_bytes(traffic.bytes(geometry, itemsize)))


def _schedules(found: Ways, text: Callable[[Traffic], str]) -> str:
    """The floor, and the schedules, those together that move as much."""
    known = {
        "resident, cluster": found.once,
        "streaming": found.streaming,
        "split": found.split,
    }
    alike = groupby(known.items(), key=lambda way: text(way[1]))
    each = [f"{', '.join(name for name, _ in same)} {much}" for much, same in alike]
    return "; ".join([f"floor {text(found.floor)}", *each])


def _explain_job(job: Job, backend: str, geometry: Geometry, itemsize: int) -> Iterator[str]:
    yield f"--- {job.part}: {show_moved(job, backend)}"
    yield f"    {_show_bytes(job, backend, geometry, itemsize)}"
    yield "program"
    yield from _indented(job.plan.program.show())
    yield "plan"
    yield from _indented(job.plan.show())


def _and(names: Sequence[str]) -> str:
    """``k0, k1 and k2``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
