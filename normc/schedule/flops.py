"""Flops: what a program computes, counted in core functions.

Every distinct node counts once for each element over its axes, whatever the function: an addition
as much as an exponential. A primitive counts as its body in core functions. A statistic counts what
its folds compute of each element, and one operation to add it up. Copies and casts are free.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from normc.language.expr import Call, Expr, postorder, rewrite
from normc.language.geometry import Geometry
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import REDUCTIONS
from normc.program.program import Program


def flops(program: Program, geometry: Geometry) -> int:
    """The operations that a program takes for tensors of these sizes.

    >>> from normc.language.parse import parse
    >>> from normc.program.flatten import flatten_definition
    >>> flops(flatten_definition(parse("2*x + 1")), Geometry.of((2, 3, 4)))
    48
    """
    nodes = postorder(_core(program.exprs))
    applied = sum(geometry.count(n.axes) for n in nodes if isinstance(n, Call))
    folded = [geometry.count(s.arg.axes) * _per_element(s.op) for s in program.stats]
    return applied + sum(folded)


def _core(exprs: Iterable[Expr]) -> list[Expr]:
    def rule(node: Expr) -> Expr:
        if not isinstance(node, Call) or PRIMITIVES[node.fn].body is None:
            return node
        return _core([PRIMITIVES[node.fn].expand(*node.args)])[0]

    return rewrite(exprs, rule)


@cache
def _per_element(op: str) -> int:
    """The operations per element of a statistic's folds."""
    state = REDUCTIONS[op].state
    assert state is not None, f"{op} is not a core reduction"
    return sum(1 + sum(isinstance(n, Call) for n in postorder([f.each])) for f in state.folds)
