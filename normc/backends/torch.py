"""The torch backend: plain torch ops, one per node of the Program. Slow, and it runs everywhere.

Statistics are two-pass, in float32 (float64 for float64 tensors) whatever the storage type. The
source it prints is the Program itself: there is nothing to compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from normc.backends.contract import Job, Plain, Run, Source, joined
from normc.backends.memory import empty, full_input, unview, view
from normc.backends.straight import Straight, evaluate, straighten
from normc.language.axes import FULL, Axis
from normc.language.geometry import Geometry
from normc.schedule.plan import Able

Tensors = dict[str, Tensor]


class TorchBackend:
    """Evaluates a Program with torch ops."""

    name = "torch"
    able = Able()

    def why_not(self, dtype: str, device: str) -> str:
        return ""

    def render(self, job: Job) -> Source:
        text = f"# {job.entry}: {job.formula}\n{job.plan.program.show()}\n"
        return Source(text, job.entry, ".txt")

    def unit(self, jobs: Sequence[Job], sources: Sequence[Source]) -> str:
        return joined(sources)

    def load(self, jobs: Sequence[Job], sources: Sequence[Source]) -> list[Run]:
        return [Plain(partial(_run, job, straighten(job.plan.program))) for job in jobs]


backend = TorchBackend()


def _run(
    job: Job, made: Straight, geometry: Geometry, tensors: Mapping[str, Tensor], eps: float
) -> Tensors:
    program, wide = job.plan.program, getattr(torch, job.wide)
    like = full_input(program, tensors)
    known: Tensors = {}
    for i in program.inputs:
        given = tensors[i.name]
        whole = given if i.name in job.dense else view(given, i.axes, geometry)
        known[i.name] = whole.reshape(geometry.sizes(i.axes)).to(wide)

    def new(value: float) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=wide, device=like.device)

    values = evaluate(made.lines, known, geometry.sizes(), eps, new)
    results = {name: values[made.places[name]].contiguous() for name in job.plan.saved}
    for out in program.outputs:
        whole = values[made.places[out.name]].expand(geometry.sizes(out.axes))
        results[out.name] = _shaped(whole, out.axes, geometry, like)
    return results


def _shaped(whole: Tensor, axes: Axis, geometry: Geometry, x: Tensor) -> Tensor:
    """An output in the user's shape: full-size ones in the storage type, others as computed."""
    result = unview(whole, axes, geometry)
    if axes != FULL:
        return result.clone(memory_format=torch.contiguous_format)  # never an input itself
    return empty(axes, geometry, x, x.dtype).copy_(result)
