"""Explain: what an op does with tensors like the one given, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from normc.backends.contract import Job
from normc.formula import Formula
from normc.language.axes import Axis
from normc.language.geometry import Geometry, Groups
from normc.ops.target import target_of
from normc.pipeline import Programs, Target, jobs, programs
from normc.schedule.cost import moved


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
        lines += ["", *_explain_job(job, geometry, x.element_size())]
    return "\n".join(lines)


def all_jobs(formula: Formula, target: Target) -> list[Job]:
    """The forward job, and the backward one for every gradient there is."""
    return jobs(formula.definition, formula.label, formula.text, all_programs(formula), target)


def all_programs(formula: Formula) -> Programs:
    """The forward program, and the backward one for every gradient there is."""
    wrt = ("x", *(i.name for i in formula.inputs), *(p.name for p in formula.params))
    return programs(formula.definition, wrt)


def _explain_job(job: Job, geometry: Geometry, itemsize: int) -> Iterator[str]:
    cost = moved(job.plan, job.dense)
    yield f"--- {job.part}: {cost.show()}"
    yield f"    {cost.show_bytes(geometry, itemsize)}"
    yield "program"
    yield from _indented(job.plan.program.show())
    yield "plan"
    yield from _indented(job.plan.show())


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
