"""Derive: reverse mode maps a Program to a Program.

Statistics are symbols: the outputs are differentiated with respect to inputs and statistics, then
each statistic, last first, hands its adjoint on to its argument by its row's derivative. The
adjoint of a value that was broadcast is a sum over the axes it lacks, which is how parameter
gradients and the adjoints of statistics both arise. The derivatives of primitives come from
`normc.program.algebra`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from normc.errors import NormcError
from normc.language.axes import FULL, Axis
from normc.language.expr import (
    Call,
    Const,
    Expr,
    Var,
    call,
    const,
    postorder,
    rewrite,
    substitute,
    var,
)
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import REDUCTIONS
from normc.program.algebra import derivative
from normc.program.flatten import flatten, stack
from normc.program.program import COTANGENT, Output, Program, Stat, restrict, tensors
from normc.program.tidy import tidy


def vjp(forward: Program, wrt: Sequence[str], of: Sequence[str]) -> Program:
    """The Program from inputs, saved statistics and the cotangents of the outputs ``of`` to the
    gradients of the inputs ``wrt``."""
    sweep = _Reverse(_active(forward, wrt))
    seeds: list[tuple[Expr, Expr]] = []
    results = [out for out in forward.outputs if out.name in of]
    for out in results:
        cotangent = var(COTANGENT + out.name, out.axes)
        seeds.append((out.expr, stack(cotangent, out.axes & ~out.expr.axes)))
    sweep.through(seeds)
    for stat in reversed(forward.stats):
        adjoint = sweep.adjoints.get(stat.name)
        if adjoint is not None:
            rule = REDUCTIONS[stat.op].derivative
            assert rule is not None, f"{stat.op} has no derivative"
            sweep.through([(stat.arg, rule(stat.arg, stat.var, adjoint, stat.over))])
    axes = {i.name: i.axes for i in forward.inputs}
    zero = const(0)
    outputs = [Output(COTANGENT + n, axes[n], sweep.adjoints.get(n, zero)) for n in wrt]
    cotangents = [var(COTANGENT + o.name, o.axes) for o in results]
    return flatten([*forward.inputs, *cotangents], outputs, forward.stats)


def _active(program: Program, wrt: Iterable[str]) -> set[str]:
    """The inputs and statistics through which a gradient has to flow."""
    names = set(wrt)
    for stat in program.stats:
        if any(v.name in names for v in tensors([stat.arg])):
            names.add(stat.name)
    return names


class _Reverse:
    """Adjoints of variables, collected by sweeping expressions in reverse."""

    def __init__(self, active: set[str]) -> None:
        self.active = active
        self.adjoints: dict[str, Expr] = {}

    def through(self, seeds: Sequence[tuple[Expr, Expr]]) -> None:
        """Add what arrives at ``(expression, adjoint)`` pairs to the variables below."""
        order = postorder(e for e, _ in seeds)
        live = self._live(order)
        arriving: dict[int, Expr] = {}
        for expr, adjoint in seeds:
            if id(expr) in live:
                _accumulate(arriving, id(expr), adjoint)
        for node in reversed(order):
            adjoint = arriving.get(id(node))
            if adjoint is None:
                continue
            if isinstance(node, Var):
                _accumulate(self.adjoints, node.name, adjoint)
            elif isinstance(node, Call):
                self._step(node, adjoint, live, arriving)

    def _live(self, order: Sequence[Expr]) -> set[int]:
        live: set[int] = set()
        for node in order:
            match node:
                case Var(name, _) if name in self.active:
                    live.add(id(node))
                case Call(_, args) if any(id(a) in live for a in args):
                    live.add(id(node))
                case _:
                    pass
        return live

    def _step(self, node: Call, adjoint: Expr, live: set[int], arriving: dict[int, Expr]) -> None:
        names = PRIMITIVES[node.fn].args
        values = {var(n): a for n, a in zip(names, node.args, strict=True)}
        for arg, slope in zip(node.args, derivative(node.fn), strict=True):
            if id(arg) in live:
                local = substitute([slope], values)[0]
                part = scale(adjoint, local)
                if part is not None:
                    _accumulate(arriving, id(arg), stack(part, node.axes & ~arg.axes))


def _accumulate(into: dict[Any, Expr], key: object, part: Expr) -> None:
    into[key] = into[key] + part if key in into else part


def scale(adjoint: Expr, slope: Expr) -> Expr | None:
    """``adjoint * slope``; a masked slope masks, so that it never multiplies NaN (torch's rule)."""
    match slope:
        case Const(value) if value == 0:
            return None
        case Const(value) if value == 1:
            return adjoint
        case Const(value) if value == -1:
            return -adjoint
        case Call("where", _) if _all_numbers(slope):
            weight = _leaves(_unmasked(slope), const)
            part = scale(adjoint, weight) if isinstance(weight, Const) else adjoint * weight
            return part and _leaves(slope, lambda value: part if value else const(0))
        case Call("where", (c, a, b)):
            left, right = (
                part if part is not None else 0.0 for part in (scale(adjoint, a), scale(adjoint, b))
            )
            return call("where", c, left, right)
        case _:
            return adjoint * slope


def _all_numbers(slope: Expr) -> bool:
    match slope:
        case Call("where", (_, a, b)):
            return _all_numbers(a) and _all_numbers(b)
        case _:
            return isinstance(slope, Const)


def _unmasked(slope: Expr) -> Expr:
    """The slope where it is not 0."""
    zero = const(0)
    match slope:
        case Call("where", (c, a, b)):
            left, right = _unmasked(a), _unmasked(b)
            if left is zero or right is zero:
                return right if left is zero else left
            return call("where", c, left, right)
        case _:
            return slope


def _leaves(slope: Expr, value: Callable[[float], Expr]) -> Expr:
    """The same cases with other values; two that are equal need no case."""
    match slope:
        case Call("where", (c, a, b)):
            left, right = _leaves(a, value), _leaves(b, value)
            return left if left is right else call("where", c, left, right)
        case Const(number):
            return value(number)
        case _:
            raise AssertionError("only numbers are left")


def save(forward: Program, backward: Program) -> tuple[Program, Program, tuple[str, ...]]:
    """Decide what forward keeps for backward: statistics only, never an activation.

    A statistic which backward wants and which forward gets for nothing, because it accumulates it
    anyway (the mean beside the variance), moves into forward. Returns both programs and the names
    of the statistics to save.
    """
    free = [s for s in backward.stats if _free(s, forward)]
    names = {s.name: s for s in free}
    moved = Program(
        (*backward.inputs, *(s.var for s in free)),
        tuple(s for s in backward.stats if s.name not in names),
        backward.outputs,
    )
    backward = restrict(moved, moved.outputs)
    known = {i.name for i in backward.inputs}
    forward = Program(forward.inputs, (*forward.stats, *free), forward.outputs)
    return forward, backward, tuple(s.name for s in forward.stats if s.name in known)


def _free(stat: Stat, forward: Program) -> bool:
    same = [s for s in forward.stats if s.over == stat.over and s.arg is stat.arg]
    return any(set(stat.state.folds) <= set(s.state.folds) for s in same)


def reuse(forward: Program, backward: Program) -> Program:
    """Let backward read a result of forward where it then reads fewer full-size tensors.

    A layer that also returns ``h = x + residual`` need keep neither x nor residual: h is there.
    """
    for out in forward.outputs:
        if out.axes == out.expr.axes == FULL and isinstance(out.expr, Call):
            result, now = out.var, _full_inputs(backward)
            swap = {id(out.expr): result}
            stats, outs = backward.stats, backward.outputs
            exprs = rewrite(backward.exprs, lambda e, swap=swap: swap.get(id(e), e))
            split = len(stats)
            changed = Program(
                (*backward.inputs, result),
                tuple(replace(s, arg=e) for s, e in zip(stats, exprs[:split], strict=True)),
                tuple(replace(o, expr=e) for o, e in zip(outs, exprs[split:], strict=True)),
            )
            changed = restrict(changed, changed.outputs)
            backward = changed if _full_inputs(changed) < now else backward
    return backward


def _full_inputs(program: Program) -> int:
    return sum(i.axes == FULL for i in program.inputs)


def merge(backward: Program) -> tuple[Program, dict[str, str]]:
    """Compute equal gradients once: the program, and for each gradient which output it is."""
    first: dict[tuple[Axis, Expr], str] = {}
    which = {o.name: first.setdefault((o.axes, o.expr), o.name) for o in backward.outputs}
    kept = [o for o in backward.outputs if which[o.name] == o.name]
    return Program(backward.inputs, backward.stats, tuple(kept)), which


@dataclass(frozen=True)
class Pair:
    """Forward and backward of one layer."""

    forward: Program
    backward: Program
    saved: tuple[str, ...]  # the statistics that forward hands to backward
    gradients: dict[str, str]  # of each input, by name: the output of backward that holds it


def pair(forward: Program, wrt: Sequence[str], of: Sequence[str]) -> Pair:
    """Forward and backward Programs, both tidied, and what passes between them."""
    for name in {COTANGENT + n for n in wrt}.intersection(i.name for i in forward.inputs):
        whose = name.removeprefix(COTANGENT)
        raise NormcError(
            f"`{name}` is what the gradient of `{whose}` is called: rename the tensor `{name}`"
        )
    forward = tidy(forward)
    backward = tidy(vjp(forward, wrt, of), avoid=[s.name for s in forward.stats])
    forward, backward, saved = save(forward, reuse(forward, backward))
    backward, gradients = merge(backward)
    return Pair(forward, backward, saved, gradients)
