"""Reductions: one row per statistic; a new row is at once parsed, differentiated, computed by every
backend, tested and documented.

A *surface* row (`std`, `rms`, `l2`, ...) has ``lower``: its definition by other rows. A *core* row
(`sum`, `mean`, `var`, `max`, `min`) has a ``state``, which says how a block of elements is folded
into a few numbers and how the numbers of two blocks are merged, so that any backend can compute it
in one read, in tiles, split over threads or programs, always in a fixed order. `finish` turns the
state into the value and `derivative` gives the contribution to the adjoint of the argument.

`var` is first-class: two-pass within a block and Chan's merge between blocks, never E[x^2] -
E[x]^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from normc.language.axes import NONE, Axis
from normc.language.expr import Expr, Var, call, reduce, var

EPS = var("eps")
"""The compile-time constant inside `std` and `rms`."""

E, COUNT = var("e"), var("n")
"""In a state's folds: the element, and the number of elements of the block."""


def count(axes: Axis) -> Var:
    """The number of elements over ``axes``, a scalar known when an op is called."""
    letters = "".join(str(axis.name) for axis in Axis if axis & axes)
    return var(f"|{letters}|")


def counted(variable: Var) -> Axis:
    """The axes whose elements a variable made by `count` counts."""
    axes = NONE
    for letter in variable.name.strip("|"):
        axes |= Axis[letter]
    return axes


@dataclass(frozen=True)
class Fold:
    """One native fold of a block: ``op`` (sum, max or min) of ``each`` over its elements."""

    name: str
    op: str
    each: Expr  # in E, COUNT and the names of earlier folds of the same state


ALL = var("n_all")
"""In the folds that gather many blocks: the number of elements of all of them."""


def whole(name: str) -> Var:
    """In those folds: a number of the state of all blocks, gathered before."""
    return var(f"{name}_all")


Values = Mapping[str, Expr]
Finer = Callable[[str], Expr]
"""The statistic of a given name of the same argument, over some of the axes or over all of them."""


@dataclass(frozen=True)
class State:
    """How blocks are folded and merged; ``merge(a, b, na, nb)`` of blocks of na and nb elements.

    ``gather`` merges many at once: folds over blocks, each in a block's numbers under their own
    names, its COUNT, the ALL elements of every block, and `whole` of what was gathered before.
    """

    name: str
    folds: tuple[Fold, ...]
    merge: Callable[[Values, Values, Expr, Expr], dict[str, Expr]]
    gather: tuple[Fold, ...]


def _merge_moments(a: Values, b: Values, na: Expr, nb: Expr) -> dict[str, Expr]:
    shift = b["t"] / nb - a["t"] / na
    return {
        "t": a["t"] + b["t"],
        "m2": a["m2"] + b["m2"] + shift * shift * (na * (nb / (na + nb))),
    }


_centred = E - var("t") / COUNT
_apart = var("t") / COUNT - whole("t") / ALL

SUM = State(
    "sum",
    (Fold("t", "sum", E),),
    lambda a, b, na, nb: {"t": a["t"] + b["t"]},
    (Fold("t", "sum", var("t")),),
)
MOMENTS = State(
    "moments",
    (Fold("t", "sum", E), Fold("m2", "sum", _centred * _centred)),
    _merge_moments,
    (Fold("t", "sum", var("t")), Fold("m2", "sum", var("m2") + COUNT * (_apart * _apart))),
)
MAX = State(
    "max",
    (Fold("m", "max", E),),
    lambda a, b, na, nb: {"m": call("max", a["m"], b["m"])},
    (Fold("m", "max", var("m")),),
)
MIN = State(
    "min",
    (Fold("m", "min", E),),
    lambda a, b, na, nb: {"m": call("min", a["m"], b["m"])},
    (Fold("m", "min", var("m")),),
)


@dataclass(frozen=True)
class Reduction:
    """One statistic."""

    name: str
    reference: Callable[..., Any]  # (torch, tensor, dims, eps) -> tensor, dims kept
    doc: str
    lower: Callable[[Expr, Axis], Expr] | None = None  # surface rows: the definition
    state: State | None = None  # core rows: how it is computed
    finish: Callable[[Values, Expr], Expr] | None = None  # (state, count) -> value
    # (argument, value, adjoint of the value, axes) -> contribution to the argument's adjoint
    derivative: Callable[[Expr, Expr, Expr, Axis], Expr] | None = None
    repeat: Callable[[Expr, Expr], Expr] = lambda value, n: value  # over n equal copies
    single: Callable[[Expr], Expr] = lambda e: e  # of one element
    linear: bool = False  # factors may be pulled out, and it splits into a sum of sums
    # (over some of the axes, over all of them) -> the same as a statistic of statistics
    split: Callable[[Finer, Finer], tuple[str, Expr]] | None = None
    running: float = 0.0  # where a running buffer of this statistic starts


def _var_slope(e: Expr, value: Expr, adjoint: Expr, axes: Axis) -> Expr:
    return adjoint * (2 / count(axes)) * (e - reduce("mean", axes, e))


def _tie_slope(e: Expr, value: Expr, adjoint: Expr, axes: Axis) -> Expr:
    hit = call("where", call("eq", e, value), 1, 0)
    return adjoint / reduce("sum", axes, hit) * hit  # a factor, no mask: NaN spreads as in torch


def _square(e: Expr) -> Expr:
    return call("mul", e, e)


def _var_of_parts(part: Finer, whole: Finer) -> tuple[str, Expr]:
    return "mean", part("var") + _square(part("mean") - whole("mean"))


def _same(name: str) -> Callable[[Finer, Finer], tuple[str, Expr]]:
    return lambda part, whole: (name, part(name))


_ROWS = (
    # --- core -----------------------------------------------------------------------------------
    Reduction(
        "sum",
        lambda t, x, dims, eps: x.sum(dims, keepdim=True),
        "sum; it counts, so a value that does not vary is added as often as x has elements",
        state=SUM,
        finish=lambda s, n: s["t"],
        derivative=lambda e, value, adjoint, axes: adjoint,
        repeat=lambda value, n: value * n,
        linear=True,
        split=_same("sum"),
    ),
    Reduction(
        "mean",
        lambda t, x, dims, eps: x.mean(dims, keepdim=True),
        "mean",
        state=SUM,
        finish=lambda s, n: s["t"] / n,
        derivative=lambda e, value, adjoint, axes: adjoint * (1 / count(axes)),
        linear=True,
        split=_same("mean"),
    ),
    Reduction(
        "var",
        lambda t, x, dims, eps: x.var(dims, correction=0, keepdim=True),
        "biased variance",
        state=MOMENTS,
        finish=lambda s, n: s["m2"] / n,
        derivative=_var_slope,
        single=lambda e: e * 0,
        split=_var_of_parts,
        running=1.0,
    ),
    Reduction(
        "max",
        lambda t, x, dims, eps: t.amax(x, dims, keepdim=True),
        "maximum; NaN if any element is",
        state=MAX,
        finish=lambda s, n: s["m"],
        derivative=_tie_slope,
        split=_same("max"),
    ),
    Reduction(
        "min",
        lambda t, x, dims, eps: t.amin(x, dims, keepdim=True),
        "minimum; NaN if any element is",
        state=MIN,
        finish=lambda s, n: s["m"],
        derivative=_tie_slope,
        split=_same("min"),
    ),
    # --- surface --------------------------------------------------------------------------------
    Reduction(
        "std",
        lambda t, x, dims, eps: t.sqrt(x.var(dims, correction=0, keepdim=True) + eps),
        "sqrt(var + eps)",
        lambda e, axes: call("sqrt", reduce("var", axes, e) + EPS),
        running=1.0,
    ),
    Reduction(
        "ms",
        lambda t, x, dims, eps: x.square().mean(dims, keepdim=True),
        "mean of squares",
        lambda e, axes: reduce("mean", axes, _square(e)),
        running=1.0,
    ),
    Reduction(
        "rms",
        lambda t, x, dims, eps: t.sqrt(x.square().mean(dims, keepdim=True) + eps),
        "sqrt(ms + eps)",
        lambda e, axes: call("sqrt", reduce("mean", axes, _square(e)) + EPS),
        running=1.0,
    ),
    Reduction(
        "absmax",
        lambda t, x, dims, eps: t.amax(x.abs(), dims, keepdim=True),
        "largest absolute value",
        lambda e, axes: reduce("max", axes, call("abs", e)),
    ),
    Reduction(
        "l1",
        lambda t, x, dims, eps: x.abs().sum(dims, keepdim=True),
        "sum of absolute values",
        lambda e, axes: reduce("sum", axes, call("abs", e)),
    ),
    Reduction(
        "l2",
        lambda t, x, dims, eps: t.linalg.vector_norm(x, dim=dims, keepdim=True),
        "root of the sum of squares; its gradient is 0 where all are 0",
        lambda e, axes: call("root", reduce("sum", axes, _square(e))),
    ),
)

REDUCTIONS: dict[str, Reduction] = {row.name: row for row in _ROWS}
