"""Simplify: rewrites that change nothing, from one table.

Every rule has to pass `guard` before it is ever used, with the sign of zeros, so that no rewrite
changes a NaN, an infinity or more than a few ulp, and any number of them may be combined.
Candidates such as ``x/x`` to 1 or ``sqrt(x)**2`` to x fail it; sympy applies them without asking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache, lru_cache

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
    substitute,
    var,
    with_children,
)
from normc.program.interpret import evaluate, guard

BUDGET = 0.020
"""Seconds of computation after which an expression stays as it is."""

LARGEST = 1e30
"""Constants beyond it, or below its inverse, are not legal in a formula."""

_ROUNDS = 8
_SYMMETRIC = ("add", "mul", "max", "min", "eq", "ne")

PLACEHOLDERS = ("?a", "?b")
"""Variables of patterns, whose names no formula can have."""

_a, _b = map(var, PLACEHOLDERS)

RULES: tuple[tuple[Expr, Expr], ...] = (
    (call("neg", -_a), _a),
    (_a * 1, _a),
    (_a / 1, _a),
    (_a - 0, _a),
    (_a * -1, -_a),
    (_a / -1, -_a),
    (_a + -_b, _a - _b),
    (_a - -_b, _a + _b),
    (-_a * _b, -(_a * _b)),
    (-_a / _b, -(_a / _b)),
    (_a / -_b, -(_a / _b)),
    (_a + _a, 2 * _a),
    (_a * _a, _a**2),
    (_a**0, const(1)),
    (_a**1, _a),
    (_a**-1, 1 / _a),
    (call("square", _a), _a**2),
    (call("reciprocal", _a), 1 / _a),
    (call("rsqrt", _a), 1 / call("sqrt", _a)),
    (call("silu", _a), _a * call("sigmoid", _a)),
    (call("mish", _a), _a * call("tanh", call("softplus", _a))),
    (1 / (1 + call("exp", -_a)), call("sigmoid", _a)),
    (call("max", _a, 0), call("relu", _a)),
    (call("max", _a, _a), _a),
    (call("min", _a, _a), _a),
    (call("abs", -_a), call("abs", _a)),
    (call("abs", call("abs", _a)), call("abs", _a)),
    (call("abs", _a**2), _a**2),
    ((-_a) ** 2, _a**2),
    (call("cos", -_a), call("cos", _a)),
    *((call(fn, -_a), -call(fn, _a)) for fn in ("sin", "tanh", "erf", "atan")),
    (call("gt", _a, _b), call("lt", _b, _a)),
    (call("ge", _a, _b), call("le", _b, _a)),
    (call("where", _b, _a, _a), _a),
)
"""What may be rewritten into what; a pair that `guard` rejects is never used."""


@cache
def trusted() -> dict[str, list[tuple[Expr, Expr]]]:
    """The rules that pass the guard, by the function at their root."""
    rules: dict[str, list[tuple[Expr, Expr]]] = {}
    for before, after in RULES:
        if isinstance(before, Call) and guard(before, after, signed_zeros=True):
            rules.setdefault(before.fn, []).append((before, after))
    return rules


class Stop(Exception):
    """The expression stays as it is: the budget is spent, or a number would not be legal."""


def clock(budget: float) -> Callable[[], None]:
    """A check that raises `Stop` once ``budget`` seconds have been used."""
    # The thread's own time, so that a text does not depend on what else the machine is doing.
    end = time.thread_time() + budget

    def check() -> None:
        if time.thread_time() > end:
            raise Stop

    return check


def simplify(expr: Expr, budget: float = BUDGET) -> Expr:
    """The same expression, shorter where it can be for certain.

    >>> x = var("x")
    >>> simplify(-(-x) * 1 + 0.5 * 2) is x + 1
    True
    """
    trusted()  # judged once per process, not on this expression's budget
    try:
        return settle([expr], simplify_node, clock(budget))[0]
    except Stop:
        return expr


def settle(
    roots: Iterable[Expr],
    rule: Callable[[Expr], Expr],
    check: Callable[[], None],
    skip: Callable[[Sequence[Expr]], Container[Expr]] = lambda roots: (),
) -> list[Expr]:
    """Apply a node rule bottom-up until nothing changes, but not to what there is to ``skip``."""
    memo: dict[Expr, Expr] = {}
    now = list(roots)
    for _ in range(_ROUNDS):
        left_alone, done = skip(now), dict[Expr, Expr]()
        for node in postorder(now):
            fresh = with_children(node, tuple(done[child] for child in children(node)))
            if node not in left_alone and fresh not in memo:
                check()
                memo[fresh] = rule(fresh)
            done[node] = fresh if node in left_alone else memo[fresh]
        before, now = now, [done[root] for root in now]
        if all(a is b for a, b in zip(before, now, strict=True)):
            break
    return now


def simplify_node(node: Expr) -> Expr:
    """One step: fold a function of numbers, or apply the first rule that matches."""
    if not isinstance(node, Call):
        return node
    if all(isinstance(a, Const) for a in node.args):
        return _fold(node)
    for before, after in trusted().get(node.fn, ()):
        found = unify([(before, node)], {})
        if found is not None:
            return substitute([after], found)[0]
    return node


@lru_cache(maxsize=1024)
def _fold(node: Call) -> Expr:
    """A function of numbers as a number, where it is an ordinary one in float32 too."""
    value = const(float(evaluate(node, {})))
    legal = value.value == 0 or 1 / LARGEST <= abs(value.value) <= LARGEST
    return value if legal and guard(node, value, signed_zeros=True) else node


def unify(
    pairs: Sequence[tuple[Expr, Expr]], found: Mapping[Var, Expr]
) -> Mapping[Var, Expr] | None:
    """What the variables of the patterns stand for, if all ``(pattern, node)`` pairs match."""
    if not pairs:
        return found
    (pattern, node), *rest = pairs
    if isinstance(pattern, Var) and pattern.name in PLACEHOLDERS:
        same = found.get(pattern, node) is node
        return unify(rest, {**found, pattern: node}) if same else None
    if pattern is node and not children(pattern):
        return unify(rest, found)
    for args in _orders(pattern, node):
        result = unify([*zip(children(pattern), args, strict=True), *rest], found)
        if result is not None:
            return result
    return None


def _orders(pattern: Expr, node: Expr) -> list[tuple[Expr, ...]]:
    """The operands of ``node``, in every order that may match, if it is of the pattern's kind."""
    match pattern, node:
        case Call(fn), Call(other, args) if fn == other:
            return [args, args[::-1]] if fn in _SYMMETRIC else [args]
        case Reduce(op, over), Reduce(other, axes, arg) if op == other and over == axes:
            return [(arg,)]
        case _:
            return []
