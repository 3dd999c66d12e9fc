"""The torch backend: plain torch ops, one per node of the Program. Slow, and it runs everywhere.

Statistics are two-pass, in float32 (float64 for float64 tensors) whatever the storage type. The
source it prints is the Program itself: there is nothing to compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from normc.backends.contract import Job, Plain, Run, Source, joined
from normc.backends.memory import empty, full_input, unview, view
from normc.language.axes import FULL, ORDER, Axis
from normc.language.expr import Call, Const, Expr, Var, children, postorder
from normc.language.geometry import Geometry
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import EPS, REDUCTIONS, counted
from normc.program.program import Stat, is_scalar
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
        return [Plain(partial(_run, job)) for job in jobs]


backend = TorchBackend()


def _run(job: Job, geometry: Geometry, tensors: Mapping[str, Tensor], eps: float) -> Tensors:
    program, wide = job.plan.program, getattr(torch, job.wide)
    like = full_input(program, tensors)
    values = _Values(geometry, like, wide, eps)
    for i in program.inputs:
        given = tensors[i.name]
        whole = given if i.name in job.dense else view(given, i.axes, geometry)
        values.known[i.name] = whole.reshape(geometry.sizes(i.axes)).to(wide)
    for stat in program.stats:
        values.known[stat.name] = _reduce(stat, values.of(stat.arg), geometry)
    results = {name: values.known[name].contiguous() for name in job.plan.saved}
    for out in program.outputs:
        whole = values.of(out.expr).expand(geometry.sizes(out.axes))
        results[out.name] = _shaped(whole, out.axes, geometry, like)
    return results


def _shaped(whole: Tensor, axes: Axis, geometry: Geometry, x: Tensor) -> Tensor:
    result = unview(whole, axes, geometry).to(x.dtype)
    if axes != FULL:
        return result.contiguous()
    return empty(axes, geometry, x, x.dtype).copy_(result)


def _reduce(stat: Stat, arg: Tensor, geometry: Geometry) -> Tensor:
    full = arg.expand(geometry.sizes(stat.arg.axes))
    dims = [i for i, axis in enumerate(ORDER) if axis & stat.over]
    if prod(full.shape) == 0:  # torch warns or refuses; nothing is left that could read the value
        return full.sum(dims, keepdim=True)
    return REDUCTIONS[stat.op].reference(torch, full, dims, 0.0)


class _Values:
    """Expressions evaluated once per node and call."""

    def __init__(self, geometry: Geometry, x: Tensor, dtype: torch.dtype, eps: float) -> None:
        self.known: dict[str, Tensor] = {}
        self._geometry = geometry
        self._eps = eps
        self._make = lambda value: torch.full((1, 1, 1, 1), value, dtype=dtype, device=x.device)

    def of(self, expr: Expr) -> Tensor:
        done: dict[int, Tensor] = {}
        for node in postorder([expr]):
            done[id(node)] = self._node(node, [done[id(c)] for c in children(node)])
        return done[id(expr)]

    def _node(self, node: Expr, args: list[Tensor]) -> Tensor:
        match node:
            case Const(value):
                return self._make(value)
            case Var(name, _):
                return self._scalar(node) if is_scalar(name) else self.known[name]
            case Call(fn, _):
                return PRIMITIVES[fn].reference(torch, *args)
            case _:
                raise AssertionError("a Program holds no Reduce")

    def _scalar(self, scalar: Var) -> Tensor:
        if scalar is EPS:
            return self._make(self._eps)
        return self._make(float(self._geometry.count(counted(scalar))))
