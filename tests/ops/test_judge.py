"""The judge: what counts as noise, and how many numbers may be off because of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normc.ops.judge import (
    FACTOR,
    TOLERANCE,
    Tensors,
    amplification,
    distance,
    expect,
    gradients,
    magnitude,
    results,
    strays,
)

INF, NAN = math.inf, math.nan


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_magnitude_is_that_of_the_finite_numbers() -> None:
    assert magnitude(t(1, -3, INF, NAN)) == 3
    assert magnitude(t(NAN)) == magnitude(t()) == 0
    assert magnitude(torch.tensor(-2.0)) == 2


@pytest.mark.parametrize(
    "found, want, error",
    [
        ((1.0, 2.0), (1.0, 3.0), 0.5),
        ((NAN, INF, 1.0), (NAN, INF, 2.0), 0.5),
        ((NAN, 1.0), (INF, 1.0), INF),
        ((INF, 1.0), (-INF, 1.0), INF),
        ((1.0, 1.0), (NAN, 1.0), INF),
        ((NAN, 1.0), (1.0, 1.0), INF),
        ((1.0,), (1.0, 1.0), INF),
        ((), (), 0.0),
    ],
)
def test_a_distance_is_infinite_where_nan_and_infinities_differ(
    found: tuple[float, ...], want: tuple[float, ...], error: float
) -> None:
    assert distance(t(*found), t(*want), 2.0) == error


def test_strays_are_counted() -> None:
    want = t(1, 2, 3, NAN, INF, INF, 4)
    found = t(1, 2.1, 3.3, NAN, INF, -INF, NAN)
    assert strays(found, want, 0.2) == 3
    assert strays(found.float(), want.float(), 0.0) == 4
    assert strays(want, want, 0.0) == 0


def kinked(x: Tensor, d: Tensor) -> Tensors:
    return gradients(lambda x: torch.relu(x - 0.3), {"x": x}, [d])


def test_of_numbers_at_a_kink_as_few_may_be_off_as_rounding_takes_across() -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=chance).double()
    x[:3] = 0.3 + 1e-9  # which float32 takes to the other side, or not
    x, d = x.float(), torch.ones(10_000)
    wanted = expect(lambda change: kinked(change(x), change(d)), "float32")
    assert 1 <= wanted.strays["d_x"] <= 3 and wanted.noise["d_x"] >= 1
    ours = kinked(x, d)
    ours["d_x"][3] = 1 - ours["d_x"][3]
    errors = wanted.errors(ours)
    assert all(e.ok for e in errors) and not wanted.crowd(ours, errors)
    ours["d_x"][100:150] = 0.5
    errors = wanted.errors(ours)
    assert all(e.ok for e in errors), "the largest error alone does not tell"
    assert "numbers of d_x are off, and rounding explains" in wanted.crowd(ours, errors)
    assert "of 10000" in wanted.crowd(ours, errors)


def test_what_is_within_the_tolerance_needs_no_excuse() -> None:
    x, d = torch.linspace(-1, 1, 9), torch.ones(9)
    wanted = expect(lambda change: kinked(change(x), change(d)), "float32")
    ours = {name: value * (1 + 0.9 * TOLERANCE["float32"]) for name, value in wanted.exact.items()}
    errors = wanted.errors(ours)
    assert {e.rule for e in errors} == {"tolerance"} and all(e.ok for e in errors)
    assert not wanted.crowd(ours, errors)
    ours["y"] = wanted.exact["y"] * 1.01
    (wrong,) = (e for e in wanted.errors(ours) if not e.ok)
    assert wrong.tensor == "y" and wrong.limit == max(wrong.tolerance, FACTOR * wrong.noise)


def test_a_result_that_is_zero_to_rounding_is_judged_as_if_it_were_one() -> None:
    def run(change: object) -> Tensors:
        return {"y": t(1.0), "d_x": t(1e-12)}

    assert expect(run, "float32").scale == {"y": 1.0, "d_x": 1.0}


def test_noise_is_at_least_the_rounding_of_the_largest_number() -> None:
    def run(change: object) -> Tensors:
        return {"y": t(100.0), "d_x": t(1.0)}

    unit = torch.finfo(torch.float32).eps
    assert expect(run, "float32").noise == {"y": unit, "d_x": 100 * unit}
    assert expect(run, "float32", 1000.0).noise["d_x"] == 1000 * unit


def test_a_single_element_amplifies() -> None:
    from normc.language.geometry import Geometry
    from normc.language.parse import parse

    formula = parse("x/instance_std(x)")
    assert amplification(formula, Geometry.of((2, 3, 1)), 1e-4) == pytest.approx(100)
    assert amplification(formula, Geometry.of((2, 3, 2)), 1e-4) == 0


def test_results_have_names() -> None:
    assert list(results(t(1))) == ["y"] == list(results((t(1),)))
    assert list(results((t(1), t(2)))) == ["y0", "y1"]
