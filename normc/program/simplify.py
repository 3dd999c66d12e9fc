"""Simplify: rewrites that change nothing, from one table.

Every rule has to pass `guard` before it is ever used, with the sign of zeros, so that no rewrite
changes a NaN, an infinity or more than a few ulp, and any number of them may be combined. Candidates
such as ``x/x`` to 1 or ``sqrt(x)**2`` to x fail it; sympy would apply them without asking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache

from normc.language.expr import Call, Const, Expr, Var, call, const, rewrite, substitute, var
from normc.program.interpret import evaluate, guard

BUDGET = 0.020
"""Seconds of computation after which an expression stays as it is."""

LARGEST = 1e30
"""Constants beyond it, or below its inverse, are not legal in a formula."""

_ROUNDS = 8
_SYMMETRIC = ("add", "mul", "max", "min", "eq", "ne")

_a, _b = var("a"), var("b")

RULES: tuple[tuple[Expr, Expr], ...] = (
    (-(-_a), _a),
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



class Late(Exception):
    """The budget is spent."""


def clock(budget: float) -> Callable[[], None]:
    """A check that raises `Late` once ``budget`` seconds have been used."""
    # The thread's own time, so that a text does not depend on what else the machine is doing.
    end = time.thread_time() + budget

    def check() -> None:
        if time.thread_time() > end:
            raise Late

    return check


def simplify(expr: Expr, budget: float = BUDGET) -> Expr:
    """The same expression, shorter where it can be for certain.

    >>> x = var("x")
    >>> simplify(-(-x) * 1 + 0.5 * 2) is x + 1
    True
    """
    trusted()  # judged once per process, not on this expression's budget
    try:
        return settle([expr], _shorter, clock(budget))[0]
    except Late:
        return expr


def settle(
    roots: Iterable[Expr], rule: Callable[[Expr], Expr], check: Callable[[], None]
) -> list[Expr]:
    """Apply a node rule everywhere, again and again until nothing changes."""

    def checked(node: Expr) -> Expr:
        check()
        return rule(node)

    done = list(roots)
    for _ in range(_ROUNDS):
        before, done = done, rewrite(done, checked)
        if all(a is b for a, b in zip(before, done, strict=True)):
            break
    return done


def _shorter(node: Expr) -> Expr:
    if not isinstance(node, Call):
        return node
    if all(isinstance(a, Const) for a in node.args):
        return _fold(node)
    for before, after in trusted().get(node.fn, ()):
        found = _match([(before, node)], {})
        if found is not None:
            return substitute([after], found)[0]
    return node


@cache
def _fold(node: Call) -> Expr:
    """A function of numbers as a number, where it is an ordinary one in float32 too."""
    value = const(float(evaluate(node, {})))
    legal = value.value == 0 or 1 / LARGEST <= abs(value.value) <= LARGEST
    return value if legal and guard(node, value, signed_zeros=True) else node


_Bound = dict[Var, Expr]


def _match(pairs: list[tuple[Expr, Expr]], found: _Bound) -> _Bound | None:
    """What the variables of the patterns stand for, if all ``(pattern, node)`` pairs match."""
    if not pairs:
        return found
    (pattern, node), *rest = pairs
    if isinstance(pattern, Var):
        same = found.get(pattern, node) is node
        return _match(rest, {**found, pattern: node}) if same else None
    if not (isinstance(pattern, Call) and isinstance(node, Call) and pattern.fn == node.fn):
        return _match(rest, found) if pattern is node else None
    orders = [node.args, node.args[::-1]] if node.fn in _SYMMETRIC else [node.args]
    for args in orders:
        result = _match([*zip(pattern.args, args, strict=True), *rest], found)
        if result is not None:
            return result
    return None
