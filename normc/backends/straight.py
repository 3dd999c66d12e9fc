"""Straight: a Program as a list of plain torch operations, each on the values before it.

The list is made once, so that running it is a loop without decisions about expressions: cheap to
repeat, and short enough for torch.compile to trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normc.language.axes import FULL, ORDER, Axis
from normc.language.expr import Call, Const, Expr, Var, postorder
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import EPS, REDUCTIONS, counted
from normc.program.program import Program, Stat, is_scalar

Ints = tuple[int, ...]
Line = tuple[str, Any, Ints, Ints, Ints]
"""What makes a value: how, of what, the places of its arguments, and for a statistic the positions
in (N, G, K, S) of its argument's axes and of those it is taken over. All text and numbers, because
that is what torch.compile takes for constant."""


@dataclass(frozen=True)
class Straight:
    """The operations of a Program; ``places`` of statistics and outputs by name."""

    lines: tuple[Line, ...]
    places: Mapping[str, int]


def straighten(program: Program) -> Straight:
    """The operations of a Program, every distinct one once."""
    writer = _Writer()
    for stat in program.stats:
        writer.stat(stat)
    places = {s.name: writer.names[s.name] for s in program.stats}
    places |= {o.name: writer.value(o.expr) for o in program.outputs}
    return Straight(tuple(writer.lines), places)


@dataclass
class _Writer:
    lines: list[Line] = field(default_factory=list[Line])
    names: dict[str, int] = field(default_factory=dict[str, int])  # of variables
    nodes: dict[int, int] = field(default_factory=dict[int, int])
    alive: list[Expr] = field(default_factory=list[Expr])  # ids stay unique while nodes live

    def add(self, how: str, what: Any, args: Ints = (), own: Ints = (), over: Ints = ()) -> int:
        self.lines.append((how, what, args, own, over))
        return len(self.lines) - 1

    def stat(self, stat: Stat) -> None:
        arg = self.value(stat.arg)
        own, over = _positions(stat.arg.axes), _positions(stat.over)
        self.names[stat.name] = self.add("statistic", stat.op, (arg,), own, over)

    def value(self, expr: Expr) -> int:
        self.alive.append(expr)
        for node in postorder([expr]):
            if id(node) not in self.nodes:
                self.nodes[id(node)] = self._node(node)
        return self.nodes[id(expr)]

    def _node(self, node: Expr) -> int:
        match node:
            case Const(value):
                return self.add("number", value)
            case Call(fn, args):
                places = tuple(self.nodes[id(a)] for a in args)
                return self.add("function", fn, places)
            case Var(name) if not is_scalar(name):
                return self.names[name] if name in self.names else self.add("input", name)
            case Var():
                return self.add("eps", None) if node is EPS else self._count(counted(node))
            case _:
                raise AssertionError("a Program holds no Reduce")

    def _count(self, axes: Axis) -> int:
        return self.add("count", None, (), _positions(axes))


def _positions(axes: Axis) -> tuple[int, ...]:
    return tuple(i for i, axis in enumerate(ORDER) if axis & axes)


EVERY = _positions(FULL)


def evaluate(
    lines: Sequence[Line], given: Mapping[str, Tensor], sizes: Sequence[int], eps: float,
    new: Callable[[float], Tensor],
) -> list[Tensor]:  # fmt: skip
    """Every value, over (N, G, K, S) with size 1 for axes it lacks; ``new`` makes a number one."""
    values: list[Tensor] = []
    for how, what, args, own, over in lines:
        if how == "input":
            value = given[what]
        elif how == "function":
            value = PRIMITIVES[what].reference(torch, *[values[i] for i in args])
        elif how == "statistic":
            value = _statistic(what, values[args[0]], own, over, sizes)
        else:
            value = new(what if how == "number" else eps if how == "eps" else count(own, sizes))
        values.append(value)
    return values


def count(axes: Sequence[int], sizes: Sequence[int]) -> float:
    """The number of elements over axes, given by their positions."""
    product = 1
    for i in axes:
        product = product * sizes[i]
    return product


def _statistic(
    op: str, arg: Tensor, own: Sequence[int], over: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    full = arg.expand([sizes[i] if i in own else 1 for i in EVERY])
    dims = list(over)
    if full.numel() == 0:  # torch warns or refuses; nothing is left that could read the value
        return full.sum(dims, keepdim=True)
    return REDUCTIONS[op].reference(torch, full, dims, 0.0)
