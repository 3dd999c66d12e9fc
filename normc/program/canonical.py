"""Canonical: equal layers get equal text.

After `simplify`, sums, products and symmetric functions are put into one order, and what spells out
a named statistic gets its name. That is a name for the layer: it may round otherwise (``a + b + c``
and ``c + b + a``), so it is never on the way to a kernel. The order is our own, because sympy's
evaluates ``x - x`` and ``0*x`` on the way and so loses NaN. Nothing is cancelled here either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from normc.errors import FormulaError
from normc.language.axes import FULL, ORDER, Axis
from normc.language.check import Meter
from normc.language.definition import Definition
from normc.language.expr import (
    Call,
    Const,
    Expr,
    Reduce,
    children,
    postorder,
    reduce,
    var,
    variables,
)
from normc.language.reductions import EPS, REDUCTIONS
from normc.program.interpret import Array, evaluate_all
from normc.program.ordering import Order
from normc.program.simplify import (
    BUDGET,
    PLACEHOLDERS,
    Stop,
    clock,
    settle,
    simplify_node,
    trusted,
    unify,
)

_SIZES = (2, 2, 2, 3)


def canonical(definition: Definition, budget: float = BUDGET) -> Definition:
    """The definition under its one name; what takes longer than ``budget`` seconds stays as it is.

    Names, the order of results and the initial values of parameters are part of a layer's meaning.

    >>> from normc.language.parse import parse
    >>> from normc.language.show import show
    >>> show(canonical(parse("beta + gamma*x/sqrt(group_var(x) + eps)")))
    'gamma*x/group_std(x) + beta'
    """
    trusted()
    _spelled_out(FULL)
    order = Order()
    try:
        rule = _rule(order)
        results = tuple(settle(definition.results, rule, clock(budget), _inner))
    except Stop:
        return definition
    if not (_is_legal(results) and _same(definition.results, results)):
        return definition
    used = {node: place for place, node in enumerate(variables(results))}
    params = sorted(definition.params, key=lambda p: (used.get(p.var, len(used)), p.name))
    inputs = sorted(definition.inputs, key=lambda i: (used.get(i.var, len(used)), i.name))
    return replace(definition, results=results, params=tuple(params), inputs=tuple(inputs))


def _is_legal(results: Sequence[Expr]) -> bool:
    """Whether the results are within the limits on formulas, so that their text can be read."""
    meter = Meter()
    try:
        for node in postorder(results):
            meter.add(node, 0)
    except FormulaError:
        return False
    return True


def _rule(order: Order) -> Callable[[Expr], Expr]:
    def rule(node: Expr) -> Expr:
        # The order keeps numbers as fractions, so that x*(1/3) is x/3.
        simpler = node if _is_fraction(node) else simplify_node(node)
        return _name_statistic(order.place(simpler))

    return rule


def _inner(roots: Sequence[Expr]) -> set[Expr]:
    """Sums within sums and products within products: put in order with the whole they belong to."""
    inner: set[Expr] = set()
    outer: set[Expr] = set(roots)
    for node in postorder(roots):
        for child in children(node):
            same = isinstance(node, Call) and isinstance(child, Call) and _kin(node.fn, child.fn)
            (inner if same else outer).add(child)
    return inner - outer


def _kin(fn: str, other: str) -> bool:
    return any(fn in kind and other in kind for kind in (("add", "sub"), ("mul", "div")))


def _is_fraction(node: Expr) -> bool:
    match node:
        case Call("div", (Const(), Const())):
            return True
        case Call("pow", (Const(), Const(power))):
            return power.is_integer()
        case _:
            return False


# --- named statistics -------------------------------------------------------------------------


def _name_statistic(node: Expr) -> Expr:
    """``sqrt(group_var(x) + eps)`` is ``group_std(x)``: what a row lowers to is that row."""
    match node:
        case Reduce(_, over, _) | Call(_, (Reduce(_, over, _), *_)):
            pass
        case Call(_, (Call(_, (Reduce(_, over, _), *_)),)):
            pass
        case _:
            return node
    return _first_match(node, _spelled_out(over), over)


def _first_match(node: Expr, patterns: Sequence[tuple[str, Expr]], over: Axis) -> Expr:
    for name, pattern in patterns:
        found = unify([(pattern, node)], {})
        if found is not None:
            return reduce(name, over, found[var(PLACEHOLDERS[0])])
    return node


@cache
def _spelled_out(over: Axis) -> Sequence[tuple[str, Expr]]:
    """The surface rows of the table, each with the canonical form of its definition."""
    patterns: list[tuple[str, Expr]] = []

    def rule(node: Expr) -> Expr:
        return _first_match(simplify_node(node), patterns, over)

    for row in REDUCTIONS.values():
        if row.lower is not None:
            lowered = row.lower(var(PLACEHOLDERS[0]), over)
            patterns.append((row.name, settle([lowered], rule, lambda: None)[0]))
    return patterns


# --- the last word ----------------------------------------------------------------------------


def _same(before: Sequence[Expr], after: Sequence[Expr]) -> bool:
    """Whether both mean the same on a few small tensors, ordinary and not, in float64."""
    names = variables([*before, *after])
    for special in (False, True):
        random = np.random.default_rng(7)
        values = {v.name: _tensor(v.axes, random, special) for v in names if v is not EPS}
        values[EPS.name] = np.asarray(1e-5)
        old, new = (evaluate_all(e, values, sizes=_SIZES) for e in (before, after))
        for a, b in zip(old, new, strict=True):
            if not np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True):
                return False
    return True


def _tensor(axes: Axis, random: np.random.Generator, special: bool) -> Array:
    """Random values over ``axes``; with ``special``, also 0, NaN and infinities."""
    sizes = [n if axis & axes else 1 for n, axis in zip(_SIZES, ORDER, strict=True)]
    values = random.normal(size=sizes)
    if special:
        odd = random.choice([0.0, 1.0, np.nan, np.inf, -np.inf], size=sizes)
        values = np.where(random.random(sizes) < 0.15, odd, values)
    return values
