"""Programs: straight-line, single-assignment code over tensors; forward, backward and every further
derivative are all of this one type.

    program ::= "in" {name ":" axes} {stat} {out}
    stat    ::= name "=" op "[" axes "]" expr        s0 = var[K S] x
    out     ::= name ":" axes "<-" expr              y : N G K S <- x*sigmoid(v*x)/sqrt(s0 + eps)

A statistic's argument and an output's expression contain no `Reduce`: they read inputs, earlier
statistics, ``eps`` and counts (``|K S|``, the number of elements over axes) element by element.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from normc.errors import NormcError
from normc.language.axes import Axis, show
from normc.language.expr import Expr, Reduce, Var, postorder, substitute, var, variables
from normc.language.reductions import EPS, REDUCTIONS, State
from normc.language.show import show_expr

COTANGENT = "d_"
"""Prefix of cotangents: what arrives at output ``y`` is ``d_y``, what leaves for x is ``d_x``."""


@dataclass(frozen=True)
class Stat:
    """One reduction: ``name = op[over] arg``; every axis of ``over`` is one of the argument's."""

    name: str
    op: str
    over: Axis
    arg: Expr
    start: float = 0.0  # where a running buffer of it starts

    @property
    def kept(self) -> Axis:
        """The axes over which the value varies."""
        return self.arg.axes & ~self.over

    @property
    def var(self) -> Var:
        """The value, as other expressions read it."""
        return var(self.name, self.kept)

    @property
    def state(self) -> State:
        """How the value is accumulated."""
        state = REDUCTIONS[self.op].state
        assert state is not None, f"{self.op} is not a core reduction"
        return state


@dataclass(frozen=True)
class Output:
    """One result, varying over at most ``axes``, broadcast to them."""

    name: str
    axes: Axis
    expr: Expr

    @property
    def var(self) -> Var:
        return var(self.name, self.axes)


@dataclass(frozen=True)
class Program:
    """Inputs, statistics in order of dependency, outputs."""

    inputs: tuple[Var, ...]
    stats: tuple[Stat, ...]
    outputs: tuple[Output, ...]

    def show(self) -> str:
        """Stable text, in the grammar of this module's docstring."""
        lines = [f"in {i.name} : {show(i.axes)}".rstrip() for i in self.inputs]
        lines += [f"{s.name} = {s.op}[{show(s.over)}] {show_expr(s.arg)}" for s in self.stats]
        lines += [f"{o.name} : {show(o.axes)} <- {show_expr(o.expr)}" for o in self.outputs]
        return "\n".join(lines)

    @property
    def exprs(self) -> list[Expr]:
        """Every expression: the statistics' arguments, then the outputs'."""
        return [s.arg for s in self.stats] + [o.expr for o in self.outputs]

    def stat(self, name: str) -> Stat:
        """The statistic called ``name``."""
        return next(s for s in self.stats if s.name == name)


def is_scalar(name: str) -> bool:
    """Whether a variable is a number known at call time, no tensor: eps or a count."""
    return name == EPS.name or name.startswith("|")


def tensors(exprs: Iterable[Expr]) -> list[Var]:
    """The tensors read by expressions, in order of first use."""
    return list(dict.fromkeys(v for expr in exprs for v in _tensors(expr)))


@lru_cache(maxsize=1024)
def _tensors(expr: Expr) -> tuple[Var, ...]:
    return tuple(v for v in variables([expr]) if not is_scalar(v.name))


def counts(program: Program) -> list[Var]:
    """The numbers of elements that a program reads."""
    return [v for v in variables(program.exprs) if is_scalar(v.name) and v.name.startswith("|")]


def rewritten(program: Program, inputs: Iterable[Var], values: Mapping[Var, Expr]) -> Program:
    """The program over other inputs, with values in the place of variables."""
    exprs, split = substitute(program.exprs, values), len(program.stats)
    stats = [replace(s, arg=e) for s, e in zip(program.stats, exprs[:split], strict=True)]
    outs = [replace(o, expr=e) for o, e in zip(program.outputs, exprs[split:], strict=True)]
    return Program(tuple(inputs), tuple(stats), tuple(outs))


def restrict(program: Program, outputs: Sequence[Output]) -> Program:
    """The program that computes only ``outputs``: dead statistics and unread inputs are gone."""
    needed = {v.name for v in tensors(o.expr for o in outputs)}
    alive: list[Stat] = []
    for stat in reversed(program.stats):
        if stat.name in needed:
            alive.append(stat)
            needed |= {v.name for v in tensors([stat.arg])}
    inputs = tuple(i for i in program.inputs if i.name in needed)
    return Program(inputs, tuple(reversed(alive)), tuple(outputs))


def distinct(program: Program) -> Program:
    """The program, if no output is called like an input; else `NormcError` names the tensor."""
    taken = {i.name for i in program.inputs}.intersection(o.name for o in program.outputs)
    if taken:
        raise NormcError(
            f"`{min(taken)}` is what a program calls a result of its own: rename yours"
        )
    return program


def verify(program: Program) -> Program:
    """Check the invariants every pass must keep, and return the program."""
    known = {i.name: i.axes for i in program.inputs}

    def check(expr: Expr, where: str) -> None:
        for node in postorder([expr]):
            if isinstance(node, Reduce):
                raise NormcError(f"internal: a statistic is left inside {where}")
        for v in tensors([expr]):
            if known.get(v.name) != v.axes:
                raise NormcError(f"internal: {where} reads `{v.name}` before it is known")

    for stat in program.stats:
        check(stat.arg, stat.name)
        if stat.name in known or not stat.over or stat.over & ~stat.arg.axes:
            raise NormcError(f"internal: {stat.name} is not a well-formed statistic")
        known[stat.name] = stat.kept
    for output in program.outputs:
        check(output.expr, output.name)
        if output.expr.axes & ~output.axes:
            raise NormcError(f"internal: {output.name} varies over more axes than it has")
    return program
