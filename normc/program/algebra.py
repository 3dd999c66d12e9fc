"""Algebra: sympy behind one door; long because no other file may import it.

    Expr  <->  sympy           node by node over the shared DAG, never through text
    name   ->  derivatives     sympy's diff of a row's body, unless the row has its own

Every function of the language is one sympy head and back, so that a formula survives the journey:
the arithmetic and the elementary functions are sympy's own, everything else is an opaque head that
sympy can differentiate by our row and cannot rewrite. Expressions are built unevaluated, because
sympy's automatic rewriting (``x/x``, ``0*x``, ``exp(x)*exp(-x)``) loses NaN and overflows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import sympy
from sympy.codegen import cfunctions

from normc.errors import NormcError
from normc.language.axes import Axis
from normc.language.expr import (
    Call,
    Const,
    Expr,
    Reduce,
    Var,
    call,
    children,
    const,
    postorder,
    reduce,
    rewrite,
    substitute,
    var,
    variables,
)
from normc.language.primitives import PRIMITIVES
from normc.program.canonical import canonical as canonical
from normc.program.interpret import guard as guard
from normc.program.interpret import probes
from normc.program.latex import latex as latex
from normc.program.latex import latex_definition as latex_definition
from normc.program.simplify import simplify as simplify

Symbolic = Any
"""A sympy expression."""

_NOTHING: Mapping[str, Expr] = {}

NATIVE: dict[str, Any] = {
    "add": sympy.Add,
    "mul": sympy.Mul,
    "pow": sympy.Pow,
    "exp": sympy.exp,
    "log": sympy.log,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "atan": sympy.atan,
    "expm1": cfunctions.expm1,
    "log1p": cfunctions.log1p,
}
"""Functions for which sympy has the head, and knows the derivative."""

COMPOSED: dict[str, Callable[..., Symbolic]] = {
    "add": lambda x, y: _raw(sympy.Add, *_spine(sympy.Add, x), y),
    "mul": lambda x, y: _raw(sympy.Mul, *_spine(sympy.Mul, x), y),
    "neg": lambda x: _raw(sympy.Mul, sympy.S.NegativeOne, x),
    "sub": lambda x, y: _raw(sympy.Add, *_spine(sympy.Add, x), COMPOSED["neg"](y)),
    "div": lambda x, y: _raw(sympy.Mul, *_spine(sympy.Mul, x), _inverse(y)),
}
"""Functions that sympy spells with sums, products and powers."""


def _raw(head: Any, *args: Symbolic) -> Symbolic:
    return head(*args, evaluate=False)


def _spine(head: Any, first: Symbolic) -> tuple[Symbolic, ...]:
    """Sums and products are n-ary, so that sympy finds shared parts and prints few brackets; only
    from the left, so that the way back rounds as before."""
    return first.args if isinstance(first, head) and len(first.args) > 1 else (first,)


def _inverse(x: Symbolic) -> Symbolic:
    return _raw(sympy.Pow, x, sympy.S.NegativeOne)


def _opaque(name: str) -> Any:
    """A head that sympy differentiates by our row and otherwise leaves alone."""
    row = PRIMITIVES[name]

    def fdiff(self: Any, argindex: int = 1) -> Symbolic:
        values = dict(zip(row.parameters(), map(from_sympy, self.args), strict=True))
        slope = derivative(name)[argindex - 1]
        return to_sympy(substitute([slope], values)[0])  # pyright: ignore[reportArgumentType]

    return type(name, (sympy.Function,), {"fdiff": fdiff, "nargs": len(row.args)})


HEADS: dict[str, Any] = {
    name: NATIVE.get(name) or _opaque(name)
    for name in PRIMITIVES
    if name in NATIVE or name not in COMPOSED
}
NAMES: dict[Any, str] = {head: name for name, head in HEADS.items()}
assert len(HEADS) == len(NAMES), "two functions share a sympy head"


class Statistic(sympy.Function):
    """An opaque head for `Reduce`: its name, the number of its axes, its argument."""

    nargs = 3


# --- there ------------------------------------------------------------------------------------


def to_sympy(expr: Expr) -> Symbolic:
    """The same DAG as an unevaluated sympy expression."""
    done: dict[int, Symbolic] = {}
    for node in postorder([expr]):
        done[id(node)] = _there(node, [done[id(child)] for child in children(node)])
    return done[id(expr)]


def _there(node: Expr, args: list[Symbolic]) -> Symbolic:
    match node:
        case Const(value):
            return _number(value)
        case Var(name, axes):
            # One symbol per name and axes, so that the way back needs no table. Symbol reads
            # nothing into its text: a variable called E, I, beta or lambda is just that.
            return sympy.Symbol(f"{name}@{axes.value}")
        case Reduce(op, over, _):
            return _raw(Statistic, sympy.Symbol(op), sympy.Integer(over.value), *args)
        case Call(fn, _) if fn in COMPOSED:
            return COMPOSED[fn](*args)
        case Call(fn, _) if fn in HEADS:
            return _raw(HEADS[fn], *args)
        case Call(fn, _):
            raise NormcError(f"`{fn}` is not a primitive, so sympy has no head for it")


def _number(value: float) -> Symbolic:
    """An exact sympy number; only -0.0, which sympy lacks, is spelled as a product."""
    if value == 0 and math.copysign(1, value) < 0:
        return _raw(sympy.Mul, sympy.S.NegativeOne, sympy.S.Zero)
    if not math.isfinite(value):
        return sympy.S.NaN if math.isnan(value) else sympy.oo if value > 0 else -sympy.oo
    top, bottom = value.as_integer_ratio()
    return sympy.Rational(top, bottom)


# --- and back ---------------------------------------------------------------------------------


def from_sympy(expression: Symbolic, known: Mapping[str, Expr] = _NOTHING) -> Expr:
    """A sympy expression as ours; a head that is no function of the language is an error.

    ``known`` says what symbols stand for that did not come from `to_sympy`.
    """
    done: dict[Symbolic, Expr] = {}
    stack: list[Symbolic] = [expression]
    while stack:
        node = stack[-1]
        operands = node.args[2:] if isinstance(node, Statistic) else node.args
        waiting = [a for a in operands if a not in done]
        stack.extend(reversed(waiting))
        if not waiting:
            done[stack.pop()] = _back(node, [done[a] for a in operands], known)
    return done[expression]


def _back(node: Symbolic, args: list[Expr], known: Mapping[str, Expr]) -> Expr:
    if isinstance(node, sympy.Symbol) and node.name in known:
        return known[node.name]
    if isinstance(node, sympy.Symbol) and "@" in node.name:
        name, _, axes = node.name.rpartition("@")
        return var(name, Axis(int(axes)))
    if isinstance(node, (sympy.Number, sympy.NumberSymbol)):
        return const(float(node))
    if isinstance(node, sympy.Add):
        return _sum(args)
    if isinstance(node, sympy.Mul):
        return _product(node.args, args)
    if isinstance(node, sympy.Pow):
        return _power(*args)
    if isinstance(node, Statistic):
        return reduce(str(node.args[0]), Axis(int(str(node.args[1]))), args[0])
    if node.func not in NAMES:
        raise NormcError(f"sympy's {node.func.__name__} is no function of the language: {node}")
    return call(NAMES[node.func], *args)


def _sum(terms: list[Expr]) -> Expr:
    """Terms from left to right, negative ones subtracted; only the first two may trade places."""
    head, *rest = terms
    if rest and _negated(head) is not None and _negated(rest[0]) is None:
        head, rest = rest[0], [head, *rest[1:]]
    for term in rest:
        positive = _negated(term)
        head = call("add", head, term) if positive is None else call("sub", head, positive)
    return head


def _negated(expr: Expr) -> Expr | None:
    """``e`` where the expression reads ``-e``."""
    match expr:
        case Const(value) if value < 0:
            return const(-value)
        case Call("neg", (arg,)):
            return arg
        case Call("mul" | "div" as fn, (Const(value), arg)) if value < 0:
            return call(fn, -value, arg)
        case _:
            return None


def _product(shapes: Sequence[Symbolic], args: Sequence[Expr]) -> Expr:
    """Factors from left to right, powers of -1 as divisors; numbers in front are one number."""
    skip = 1 if args[0] is const(-1) and len(args) > 1 else 0
    value = args[skip]
    for shape, arg in zip(shapes[skip + 1 :], args[skip + 1 :], strict=True):
        match value, arg:
            case Const(a), Const(b) if a * b != 0 and math.isfinite(a * b):
                value = const(a * b)
            case _, Call("div", (Const(1.0), divisor)) if isinstance(shape, sympy.Pow):
                value = call("div", value, divisor)
            case _:
                value = call("mul", value, arg)
    return call("neg", value) if skip else value


def _power(base: Expr, exponent: Expr) -> Expr:
    match base, exponent:
        case _, Const(-1.0):
            return call("div", 1, base)
        case Const(b), Const(e) if b > 0 and abs(e * math.log(b)) < 60:
            return const(b**e)
        case _:
            return call("pow", base, exponent)


# --- derivatives ------------------------------------------------------------------------------


@cache
def derivative(name: str) -> tuple[Expr, ...]:
    """The partial derivatives of a primitive, over ``PRIMITIVES[name].parameters()``.

    >>> derivative("tanh")[0].args[0].value
    1.0
    """
    row = PRIMITIVES[name]
    parameters = row.parameters()
    if row.derivative is not None:
        return tuple(_as_expr(slope(*parameters)) for slope in row.derivative)
    if row.body is None and name not in COMPOSED and name not in NATIVE:
        raise NormcError(f"the core function `{name}` is not sympy's: its row needs a derivative")
    body = call(name, *parameters) if row.body is None else row.expand(*parameters)
    symbolic = to_sympy(body)
    return tuple(from_sympy(symbolic.diff(to_sympy(p))) for p in parameters)


def _as_expr(value: Expr | float) -> Expr:
    return const(value) if isinstance(value, int | float) else value


# --- sharing ----------------------------------------------------------------------------------

SHARE_NODES = 300
"""What has more nodes is left alone: sympy's cse is quadratic in the terms of sums and products."""


def share(exprs: Sequence[Expr], budget: float = 0.1) -> list[Expr]:
    """The same values from fewer nodes: what n-ary sums and products have in common.

    ``a*b*c`` and ``a*c*d`` share ``a*c``, which trees of binary nodes do not show. An expression
    that would round or overflow differently on ordinary numbers stays as it was, and all of them do
    if sympy finds nothing or takes longer than ``budget`` seconds.

    >>> a, b, c, d = map(var, "abcd")
    >>> [a * c in children(e) for e in share([a * b * c, a * c * d])]
    [True, True]
    """
    before = list(exprs)
    size = len(postorder(before))
    if size > SHARE_NODES:
        return before
    start = time.thread_time()
    after = _rebuild(before)
    late = time.thread_time() - start > budget
    chosen = [new if _agree(old, new) else old for old, new in zip(before, after, strict=True)]
    return before if late or len(postorder(chosen)) >= size else chosen


def _agree(old: Expr, new: Expr) -> bool:
    """Whether two expressions agree on ordinary numbers, whatever their statistics are."""
    names: dict[Expr, Var] = {}

    def rule(node: Expr) -> Expr:
        if isinstance(node, Reduce):
            return names.setdefault(node, var(f"statistic {len(names)}"))
        return node

    old, new = rewrite([old, new], rule)
    return guard(old, new, probes((v.name for v in variables([old, new])), wide=False))


def _rebuild(exprs: Sequence[Expr]) -> list[Expr]:
    """Expressions after sympy's cse of their arithmetic, to which all else is a symbol."""
    opaque = [e for e in postorder(exprs) if _is_opaque(e)]
    roots = [arg for e in opaque if isinstance(e, Call) for arg in e.args] + list(exprs)
    names = sympy.numbered_symbols("part")
    shared, reduced = sympy.cse(_arithmetic(roots, opaque), names)
    known: dict[str, Expr] = {}
    results = iter(reduced)

    def back() -> Expr:
        for symbol, form in list(shared):
            needed = {str(s) for s in form.free_symbols if "@" not in str(s)}
            if needed <= known.keys():
                known[str(symbol)] = from_sympy(form, known)
                shared.remove((symbol, form))
        return from_sympy(next(results), known)

    for i, e in enumerate(opaque):  # operands come before their users, so all they need is known
        known[f"opaque{i}"] = call(e.fn, *[back() for _ in e.args]) if isinstance(e, Call) else e
    return [back() for _ in exprs]


def _is_opaque(expr: Expr) -> bool:
    return isinstance(expr, Reduce) or (isinstance(expr, Call) and expr.fn not in COMPOSED)


def _arithmetic(roots: Sequence[Expr], opaque: Sequence[Expr]) -> list[Symbolic]:
    """Sums and products as n-ary as they can be."""
    done: dict[Expr, Symbolic] = {e: sympy.Symbol(f"opaque{i}") for i, e in enumerate(opaque)}
    for node in postorder(roots):
        match node:
            case _ if node in done:
                pass
            case Call("add" | "mul" as fn, (a, b)):
                head = NATIVE[fn]
                done[node] = _raw(head, *_spine(head, done[a]), *_spine(head, done[b]))
            case Call(fn, args):
                done[node] = COMPOSED[fn](*(done[arg] for arg in args))
            case _:
                done[node] = to_sympy(node)
    return [done[root] for root in roots]
