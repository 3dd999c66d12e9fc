"""Canonical: equal layers get equal text.

`simplify` applies the rewrites of one table, each of which has to pass `guard` before it is ever used,
so it changes no NaN, no infinity, no sign of a zero and no more than a few ulp. `canonical` also puts
sums, products and symmetric functions into one order, which is a name for the layer: it may round
differently (``a + b + c`` and ``c + b + a``), so it is never on the way to a kernel. The order is our
own: sympy's evaluates ``x - x`` and ``0*x`` on the way and so loses NaN.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b

import numpy as np

from normc.language.axes import FULL, ORDER, members
from normc.language.definition import Definition
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
    rewrite,
    substitute,
    var,
    variables,
)
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import EPS
from normc.program.interpret import evaluate, evaluate_all, guard, probes

BUDGET = 0.020
"""Seconds of computation, after which an expression stays as it is."""

ROUNDS = 8
SYMMETRIC = ("add", "mul", "max", "min", "eq", "ne")

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


# --- the clock ---------------------------------------------------------------------------------------


class _Late(Exception):
    """The budget is spent."""


def _clock(budget: float) -> Callable[[], None]:
    # The thread's own time, so that the text does not depend on what else the machine is doing.
    end = time.thread_time() + budget

    def check() -> None:
        if time.thread_time() > end:
            raise _Late

    return check
