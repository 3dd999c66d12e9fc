"""Every row of the table of primitives against its reference in plain torch, value and derivatives.

The tests are parametrised over the table: a new row is tested without a line here. The convention
at kinks, ties and special values is torch autograd's; where it is arbitrary, `ARBITRARY` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from normc.language.expr import call
from normc.language.primitives import COMPARISONS, OPERATORS, PRIMITIVES, Primitive
from normc.program.algebra import derivative
from normc.program.interpret import CORE, Array, evaluate

pytestmark = pytest.mark.plain

ROWS = list(PRIMITIVES.values())
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.5)
LARGE = (80.0, -80.0, 1000.0, -1000.0, 3.0, -0.5)

ARBITRARY = dict.fromkeys(
    ("relu6", "hardtanh", "hardsigmoid", "hardswish", "elu", "selu"),
    "at NaN torch's vector and scalar code disagree, so its answer depends on a tensor's length",
)
"""Rows whose derivative at NaN need not be torch's, and why."""


def ordinary(row: Primitive) -> Array:
    """Points of the row's probe range: a grid for one argument, random ones for several."""
    low, high = row.probe
    if len(row.args) == 1:
        return np.linspace(low, high, 101)[None]
    points = np.random.default_rng(5).uniform(low, high, size=(len(row.args), 400))
    if row.name == "where":
        points[0] = points[0] > 0
    return points


def kinks(row: Primitive) -> Array:
    """The kinks of the row and their neighbours, in every combination of the arguments."""
    values = [v for k in row.kinks or (0.0, 1.0) for v in (k, k - 0.5, k + 0.5)]
    return grid(row, values)


def grid(row: Primitive, values: list[float] | tuple[float, ...]) -> Array:
    return np.array(list(product(values, repeat=len(row.args)))).T


POINTS: dict[str, Callable[[Primitive], Array]] = {
    "ordinary": ordinary,
    "kinks": kinks,
    "special": lambda row: grid(row, SPECIAL),
    "large": lambda row: grid(row, LARGE),
}


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Primitive:
    return request.param


@pytest.fixture(params=POINTS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(ours: Array, theirs: Array, points: Array, tolerance: float) -> None:
    """Equal NaN and infinities; finite values within a tolerance relative to their size or 1."""
    ours, theirs = np.broadcast_arrays(ours, theirs)
    with np.errstate(invalid="ignore"):
        close = abs(ours - theirs) <= tolerance * np.maximum(abs(theirs), 1)
    good = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs)) | (np.isfinite(theirs) & close)
    bad = [(*points[:, i], ours[i], theirs[i]) for i in np.flatnonzero(~good)]
    assert not bad, f"(arguments..., ours, torch's): {bad[:10]}"


def torch_value(row: Primitive, points: Array) -> Array:
    return row.reference(torch, *torch.from_numpy(points.copy())).numpy()


def torch_slopes(row: Primitive, points: Array) -> list[Array]:
    """Autograd's derivative for every argument."""
    arguments = [torch.from_numpy(p.copy()).requires_grad_() for p in points]
    value = row.reference(torch, *arguments)
    if not value.requires_grad:
        return [np.zeros(points.shape[1]) for _ in arguments]
    slopes = torch.autograd.grad(value.sum(), arguments, allow_unused=True)
    return [np.zeros(points.shape[1]) if s is None else s.numpy() for s in slopes]


def test_value(row: Primitive, kind: str):
    points = POINTS[kind](row)
    ours = evaluate(call(row.name, *row.parameters()), dict(zip(row.args, points, strict=True)))
    assert_same(ours, torch_value(row, points), points, 1e-13)


def test_derivative(row: Primitive, kind: str):
    points = POINTS[kind](row)
    if row.name in ARBITRARY:
        points = points[:, ~np.isnan(points).any(axis=0)]
    env = dict(zip(row.args, points, strict=True))
    for slope, theirs in zip(derivative(row.name), torch_slopes(row, points), strict=True):
        assert_same(evaluate(slope, env), theirs, points, 1e-12)


def test_float32_overflows_where_torch_does(row: Primitive):
    points = POINTS["large"](row).astype(np.float32)
    env = dict(zip(row.args, points, strict=True))
    pairs = [(call(row.name, *row.parameters()), torch_value(row, points))]
    pairs += zip(derivative(row.name), torch_slopes(row, points), strict=True)
    for expr, theirs in pairs:
        assert_same(evaluate(expr, env, np.float32), theirs, points, 1e-5)


def test_float32(row: Primitive):
    """Neither body nor derivative may cancel: in float32 they are within a few ulp of the truth."""
    points = ordinary(row).astype(np.float32)
    env = dict(zip(row.args, points, strict=True))
    exact = points.astype(np.float64)
    pairs = [(call(row.name, *row.parameters()), torch_value(row, exact))]
    pairs += zip(derivative(row.name), torch_slopes(row, exact), strict=True)
    for expr, true in pairs:
        ours = evaluate(expr, env, np.float32)
        assert ours.dtype == np.float32
        assert_same(ours.astype(np.float64), true, points, 8 * float(np.finfo(np.float32).eps))


def test_the_numpy_evaluator_spells_the_whole_core_and_nothing_else():
    assert set(CORE) == {row.name for row in ROWS if row.body is None}


def test_operators_are_rows():
    assert {*OPERATORS.values(), *COMPARISONS.values()} <= set(PRIMITIVES)


def test_one_derivative_per_argument(row: Primitive):
    assert len(derivative(row.name)) == len(row.args)
