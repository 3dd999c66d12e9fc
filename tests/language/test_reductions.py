"""Every row of the table of reductions against its reference in plain torch.

The tests are parametrised over the table: a new row, core or surface, is tested without a line
here. A core row has to give the same value however its elements are dealt into blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce as fold_left

import numpy as np
import pytest
import torch

from normc.language.axes import AXIS_SETS, FULL, ORDER, Axis
from normc.language.expr import Expr, call, reduce, var
from normc.language.reductions import COUNT, REDUCTIONS, E, Reduction, State, count
from normc.program.interpret import Array, evaluate

pytestmark = pytest.mark.plain

CORE = [row for row in REDUCTIONS.values() if row.lower is None]
SURFACE = [row for row in REDUCTIONS.values() if row.lower is not None]
FOLDS = {"sum": np.sum, "max": np.max, "min": np.min}
EPS = 1e-3
SIZES = (3, 2, 4, 5)
X = var("x", FULL)
ALL_AXES = [row.axes for row in AXIS_SETS.values()]

Block = tuple[dict[str, Array], int]  # a state's numbers, and of how many elements


def folded(state: State, elements: Array) -> Block:
    """The state of one block, by the row's folds in their order."""
    env = {E.name: elements, COUNT.name: np.asarray(float(len(elements)))}
    for step in state.folds:
        each = np.broadcast_to(evaluate(step.each, env), elements.shape)
        env[step.name] = np.asarray(FOLDS[step.op](each))
    return {step.name: env[step.name] for step in state.folds}, len(elements)


def merged(state: State, left: Block, right: Block) -> Block:
    """Two blocks as one, by the row's merge."""
    (a, na), (b, nb) = left, right
    names: tuple[Mapping[str, Expr], ...] = tuple(
        {step.name: var(f"{side}.{step.name}") for step in state.folds} for side in "ab"
    )
    env = {f"a.{k}": v for k, v in a.items()} | {f"b.{k}": v for k, v in b.items()}
    env |= {"na": np.asarray(float(na)), "nb": np.asarray(float(nb))}
    after = state.merge(*names, var("na"), var("nb"))
    return {name: evaluate(expr, env) for name, expr in after.items()}, na + nb


def finished(row: Reduction, block: Block) -> Array:
    assert row.finish is not None
    values, n = block
    expr = row.finish({name: var(name) for name in values}, COUNT)
    return evaluate(expr, {**values, COUNT.name: float(n)})


def blocks_of(elements: Array, sizes: Sequence[int]) -> list[Array]:
    return np.split(elements, np.cumsum(sizes)[:-1])


def by_reference(row: Reduction, elements: Array) -> float:
    return row.reference(torch, torch.from_numpy(elements), (0,), EPS).item()


def over_axes(row: Reduction, x: torch.Tensor, axes: Axis) -> torch.Tensor:
    dims = tuple(d for d, axis in enumerate(ORDER) if axis & axes)
    return row.reference(torch, x, dims, EPS)


def environment(x: Array) -> dict[str, Array]:
    sizes = dict(zip(ORDER, SIZES, strict=True))
    env = {"x": x, "eps": np.asarray(EPS)}
    for axes in ALL_AXES:
        number = np.prod([n for axis, n in sizes.items() if axis & axes])
        env[count(axes).name] = np.asarray(float(number))
    return env


def some_tensor(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=SIZES)


@pytest.fixture(params=CORE, ids=lambda row: row.name)
def core(request: pytest.FixtureRequest) -> Reduction:
    return request.param


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 1), (3, 1, 7), (1, 3, 7, 16, 1, 129)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_folding_and_merging_blocks(core: Reduction, sizes: tuple[int, ...], offset: float):
    elements = np.random.default_rng(len(sizes)).normal(size=sum(sizes)) + offset
    assert core.state is not None
    blocks = [folded(core.state, part) for part in blocks_of(elements, sizes)]
    true = by_reference(core, elements)
    close = pytest.approx(true, rel=1e-9 if offset else 1e-12, abs=1e-12)
    from_left = fold_left(lambda a, b: merged(core.state, a, b), blocks)
    from_right = fold_left(lambda a, b: merged(core.state, b, a), reversed(blocks))
    assert finished(core, from_left) == close
    assert finished(core, from_right) == close


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass_through_a_merge(core: Reduction, odd: float):
    elements = np.array([1.0, 2.0, odd, -3.0, 0.5])
    assert core.state is not None
    for sizes in ((5,), (2, 3), (3, 2), (1, 1, 1, 2)):
        blocks = [folded(core.state, part) for part in blocks_of(elements, sizes)]
        ours = finished(core, fold_left(lambda a, b: merged(core.state, a, b), blocks))
        assert np.array_equal(ours, by_reference(core, elements), equal_nan=True)


@pytest.mark.parametrize("axes", ALL_AXES, ids=list(AXIS_SETS))
@pytest.mark.parametrize("row", REDUCTIONS.values(), ids=list(REDUCTIONS))
def test_value_over_axes(row: Reduction, axes: Axis):
    x = some_tensor()
    ours = evaluate(reduce(row.name, axes, X), environment(x), sizes=SIZES)
    theirs = over_axes(row, torch.from_numpy(x), axes).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("row", SURFACE, ids=lambda row: row.name)
def test_a_surface_row_has_nothing_of_a_core_row(row: Reduction):
    assert row.state is None and row.finish is None and row.derivative is None


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("axes", ALL_AXES, ids=list(AXIS_SETS))
def test_derivative(core: Reduction, axes: Axis, ties: bool):
    x = np.round(some_tensor(1)) if ties else some_tensor(1)
    theirs = torch.from_numpy(x).requires_grad_()
    value = over_axes(core, theirs, axes)
    cotangent = torch.from_numpy(np.random.default_rng(2).normal(size=value.shape))
    (slope,) = torch.autograd.grad(value, theirs, cotangent)
    assert core.derivative is not None
    adjoint = var("adjoint", FULL & ~axes)
    expr = core.derivative(X, reduce(core.name, axes, X), adjoint, axes)
    ours = evaluate(expr, environment(x) | {"adjoint": cotangent.numpy()}, sizes=SIZES)
    ours = np.broadcast_to(ours, x.shape)
    np.testing.assert_allclose(ours, slope.numpy(), rtol=1e-11, atol=1e-13)


def test_of_equal_copies(core: Reduction):
    """`single` is the value of one element, and `repeat` that of a value over n more copies."""
    elements = np.array([0.5, -2.0, 3.0])
    one = evaluate(core.single(E), {E.name: elements})
    expected = [by_reference(core, elements[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(one, expected, atol=1e-15)
    once = by_reference(core, elements)
    copies = evaluate(core.repeat(var("v"), COUNT), {"v": once, COUNT.name: 4.0})
    assert copies == pytest.approx(by_reference(core, np.tile(elements, 4)), rel=1e-12)


def test_a_linear_row_is_linear(core: Reduction):
    x, y = some_tensor(3), some_tensor(4)
    axes = AXIS_SETS["group"].axes

    def value(expr: Expr) -> Array:
        env = environment(x) | {"y": y}
        return evaluate(reduce(core.name, axes, expr), env, sizes=SIZES)

    other = var("y", FULL)
    total, parts = value(call("add", X * 3, other)), 3 * value(X) + value(other)
    assert np.allclose(total, parts, rtol=1e-11) == core.linear
