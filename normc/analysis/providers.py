"""Providers: ways to compute a formula, as functions of its tensors.

ours       the compiled formula
eager      the same formula as plain torch operations at x's dtype, differentiated by autograd
inductor   `torch.compile` of eager
native     torch's own function for the formula, where there is one
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from normc.analysis.agreement import Case
from normc.analysis.native import Call, native
from normc.formula import Formula
from normc.language.definition import X
from normc.language.expr import Var
from normc.language.reductions import EPS
from normc.ops.op import compile
from normc.reference import evaluate, unview, view

__all__ = ["OURS", "PROVIDERS", "Call", "compiled", "eager", "inductor", "native", "ours"]


def ours(formula: Formula, case: Case, eps: float) -> Call:
    """The compiled formula."""
    how: dict[str, Any] = {"groups": case.groups, "channel_dim": case.layout.channel_dim}
    return partial(compile(formula), eps=eps, **how)


def eager(formula: Formula, case: Case, eps: float) -> Call:
    """The formula as straight-line torch code for tensors of this case's shape.

    The oracle is run once on names instead of tensors, so that what is timed (and what
    `torch.compile` sees) is its operations alone.
    """
    graph, geometry, definition = fx.Graph(), case.geometry, formula.definition
    tracer = GraphAppendingTracer(graph)

    def named(row: Var) -> Any:
        stand_in: Any = fx.Proxy(graph.placeholder(row.name), tracer)
        return view(stand_in, row.axes, geometry)

    rows = [X, *(row.var for row in (*definition.inputs, *definition.params))]
    values = {row: named(row) for row in rows}
    views = evaluate(definition.results, values | {EPS: values[X].new_tensor(eps)}, geometry, eps)
    nodes: list[Any] = [unview(each, geometry) for each in views]
    first, *more = [node.node for node in nodes]
    graph.output((first, *more) if more else first)
    return fx.GraphModule(torch.nn.Module(), graph)


def inductor(formula: Formula, case: Case, eps: float) -> Call:
    """`torch.compile` of eager."""
    return compiled(eager(formula, case, eps))


def compiled(call: Call) -> Call:
    """`torch.compile` of a layer, for the shapes it is called with alone."""
    return torch.compile(call, dynamic=False)


OURS = "normc"

PROVIDERS: dict[str, Callable[[Formula, Case, float], Call]] = {
    OURS: ours,
    "eager": eager,
    "inductor": inductor,
    "native": native,
}
"""By name; each takes a formula, the tensors' sizes and epsilon."""
