"""Tidy: the algebra that matters for speed and keeps every float's meaning.

Products are regrouped so that coarse factors meet first (``gamma*rstd`` once per channel, not once
per element), division by a coarse value becomes multiplication by its reciprocal, factors which do
not vary over the reduced axes leave a sum, and a sum whose factors vary over different axes is
split into a finer and a coarser one (``sum[K S] gamma*h`` is ``sum[K] gamma*sum[S] h``), which
parameter gradients then share. Sums of terms are never reassociated: ``(x - mean)`` stays centred.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from normc.language.axes import NONE, Axis, members
from normc.language.expr import Call, Const, Expr, Var, call, const, substitute
from normc.language.expr import rewrite as rewrite_nodes
from normc.language.reductions import REDUCTIONS
from normc.program.flatten import Builder
from normc.program.program import Output, Program, restrict, verify


def tidy(program: Program, avoid: Iterable[str] = ()) -> Program:
    """The same program, cheaper; its statistics are renamed, to no name in ``avoid``."""
    names = [*avoid, *(i.name for i in program.inputs), *(o.name for o in program.outputs)]
    builder = Builder(taken=names)
    renamed: dict[Var, Expr] = {}
    for stat in program.stats:
        arg = simplify(substitute([stat.arg], renamed)[0])
        renamed[stat.var] = simplify(_settle(builder, stat.op, stat.over, arg, stat.start))
    outputs = [
        Output(o.name, o.axes, simplify(substitute([o.expr], renamed)[0])) for o in program.outputs
    ]
    done = Program(program.inputs, tuple(builder.stats), tuple(outputs))
    return verify(restrict(done, outputs))


def simplify(expr: Expr) -> Expr:
    """Local rules bottom-up, then products regrouped by axes."""
    return rewrite_nodes([expr], _rule)[0]


def _rule(node: Expr) -> Expr:
    if not isinstance(node, Call):
        return node
    if node.fn not in ("where",) and all(isinstance(a, Const) for a in node.args):
        return _fold(node)
    match node.fn:
        case "add" | "sub":
            return _sum(node)
        case "mul" | "div" | "neg":
            return product(factors(node))
        case "pow":
            return _power(node)
        case _:
            return node


_FOLDS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "sqrt": math.sqrt,
    "exp": math.exp,
}


def _fold(node: Call) -> Expr:
    """Fold arithmetic on constants where the result is an ordinary number."""
    values = [a.value for a in node.args if isinstance(a, Const)]
    try:
        value = float(_FOLDS[node.fn](*values))
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        return node
    ordinary = value == 0 or 1e-30 <= abs(value) <= 1e30
    return const(value) if ordinary else node


def _sum(node: Call) -> Expr:
    """``a + 0``, ``a - -b`` and their like; terms keep their order."""
    a, b = node.args
    minus = node.fn == "sub"
    if isinstance(b, Const) and b.value == 0:
        return a
    if isinstance(a, Const) and a.value == 0:
        return product(factors(-b)) if minus else b
    like = _like_terms(a, b, -1 if minus else 1)
    if like is not None:
        return like
    if isinstance(b, Call) and b.fn == "neg":
        return call("add" if minus else "sub", a, b.args[0])
    if isinstance(b, Const) and b.value < 0:
        return call("add" if minus else "sub", a, -b.value)
    if not minus and isinstance(a, Call) and a.fn == "neg":
        return call("sub", b, a.args[0])
    return node


def _like_terms(a: Expr, b: Expr, sign: int) -> Expr | None:
    """``2*e + 3*e`` as ``5*e``, unless nothing would be left: ``e - e`` keeps its NaN."""
    left, right = factors(a), factors(b)
    coefficient = left.coefficient + sign * right.coefficient
    if (left.over, left.under) != (right.over, right.under) or coefficient == 0 or not left.over:
        return None
    return product(Factors(coefficient, left.over, left.under))


def _power(node: Call) -> Expr:
    """Small integer powers are products."""
    base, exponent = node.args
    if not isinstance(exponent, Const):
        return node
    value = exponent.value
    if value != int(value) or not 1 <= abs(value) <= 16:
        return node
    whole = _repeat(base, int(abs(value)))
    return product(factors(whole if value > 0 else 1 / whole))


def _repeat(base: Expr, times: int) -> Expr:
    """base ** times by squaring, so that powers share their squares."""
    if times == 1:
        return base
    half = _repeat(base, times // 2)
    return half * half if times % 2 == 0 else half * half * base


@dataclass
class Factors:
    """A product: ``coefficient * product(over) / product(under)``."""

    coefficient: float = 1.0
    over: list[Expr] = field(default_factory=lambda: [])
    under: list[Expr] = field(default_factory=lambda: [])


def factors(expr: Expr) -> Factors:
    """Take a tree of mul, div and neg apart; a reciprocal of something coarse is one factor."""
    found = Factors()
    stack: list[tuple[Expr, bool]] = [(expr, False)]
    while stack:
        node, inverse = stack.pop()
        match node:
            case Const(value) if value != 0 and math.isfinite(value):
                found.coefficient *= 1 / value if inverse else value
            case Call("neg", (a,)):
                found.coefficient = -found.coefficient
                stack.append((a, inverse))
            case Call("mul", (a, b)) if not inverse:
                stack += [(b, inverse), (a, inverse)]
            case Call("div", (a, b)) if not inverse:
                stack += [(b, True), (a, False)]
            case _:
                (found.under if inverse else found.over).append(node)
    return found


def product(parts: Factors) -> Expr:
    """Put a product together, coarse factors first, so that each is computed at its own level.

    What is divided by more than once is inverted once.
    """
    fine = NONE
    for e in (*parts.over, *parts.under):
        fine |= e.axes
    over = list(parts.over)
    coarse = [d for d in parts.under if d.axes != fine]
    over += [call("div", 1, d) for d in coarse]
    under = [d for d in parts.under if d.axes == fine]
    value = _by_level(over)
    if value is None:
        value = const(parts.coefficient)
    else:
        value = _scaled(parts.coefficient, value)
    for d in dict.fromkeys(under):
        times = under.count(d)
        value = value / d if times == 1 else value * _repeat(1 / d, times)
    return value


def _by_level(items: list[Expr]) -> Expr | None:
    """The product of ``items``, those over fewer axes first."""
    levels: dict[Axis, Expr] = {}
    for e in items:
        levels[e.axes] = levels[e.axes] * e if e.axes in levels else e
    value: Expr | None = None
    for axes in sorted(levels, key=lambda a: (len(members(a)), a.value)):
        value = levels[axes] if value is None else value * levels[axes]
    return value


def _scaled(coefficient: float, value: Expr) -> Expr:
    """``coefficient * value``, the number attached to the coarsest factor."""
    if coefficient == 1:
        return value
    if isinstance(value, Call) and value.fn == "mul" and value.args[0].axes != value.axes:
        return _scaled(coefficient, value.args[0]) * value.args[1]
    return -value if coefficient == -1 else const(coefficient) * value


def _settle(builder: Builder, op: str, over: Axis, arg: Expr, start: float) -> Expr:
    """A statistic with coarse factors pulled out and sums split by level, where it is linear."""
    if not REDUCTIONS[op].linear:
        return builder.settle(op, over, arg, start)
    parts = factors(arg)
    items = parts.over + [call("div", 1, d) for d in parts.under if d.axes & over != over]
    fine = [d for d in parts.under if d.axes & over == over]
    outside = [e for e in items if not e.axes & over]
    inside = [e for e in items if e.axes & over]
    body = product(Factors(1.0, inside, fine))
    if not body.axes & over:
        value = builder.settle(op, over, body, start)
    else:
        value = _split(builder, op, over, inside, fine, start)
    return product(Factors(parts.coefficient, [*outside, value], []))


def _split(
    builder: Builder, op: str, over: Axis, items: list[Expr], under: list[Expr], start: float
) -> Expr:
    """``op[over]`` of a product: first over the axes that only the finest factors have."""
    partly = [e for e in items if e.axes & over != over]
    outer = NONE
    for e in partly:
        outer |= e.axes & over
    whole = [e for e in items if e.axes & over == over]
    inner = over & ~outer
    if not inner or outer == NONE or not (whole or under):
        return builder.settle(op, over, product(Factors(1.0, items, under)), start)
    below = builder.settle(op, inner, product(Factors(1.0, whole, under)), start)
    return _settle(builder, op, outer, product(Factors(1.0, [*partly, below], [])), start)
