"""Random formulas x shapes x layouts: value and every gradient against the oracle."""

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from normc.analysis.agreement import LAYOUTS, Case, compare
from normc.backends import triton
from normc.backends.tiling import SCHEDULES
from normc.ops import call as calls
from tests.backends.schedules import small
from tests.properties.formulas import formulas

SHAPES = {
    2: [(4, 4), (1, 6)],
    3: [(3, 4, 6), (2, 6, 1)],
    4: [(2, 4, 3, 2), (1, 6, 1, 5)],
    5: [(2, 4, 2, 1, 3)],
}
CHUNKS = 8
"""Tests are cut into parts so that they can be spread over processes."""


@st.composite
def any_case(draw, dtypes):
    layout = draw(st.sampled_from(LAYOUTS))
    shape = draw(st.sampled_from(SHAPES[layout.rank]))
    channels = shape[layout.channel_dim]
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    return Case(layout, shape, groups, draw(st.sampled_from(dtypes)), draw(st.integers(0, 99)))


def agree(text, case, backend, tolerance=0.0):
    for error in compare(text, case, backend):
        assert error.ok or error.error <= tolerance, (case.show(), error)


def search(check, part, count):
    """Run a property ``count`` times; derandomised parts differ by their seed."""
    profile = settings()
    given_check = settings(profile, max_examples=-(-count // CHUNKS))(check)
    (seed(part)(given_check) if profile.derandomize else given_check)()


@pytest.mark.cpu
@pytest.mark.parametrize("part", range(CHUNKS))
@pytest.mark.parametrize("backend, times", [("c", 6), ("torch", 3)])
def test_random_formulas_agree(backend, times, part):
    """In the profile of CI 300 formulas in C and 150 in torch."""

    @given(formulas(), any_case(["float64"]))
    def check(text, case):
        agree(text, case, backend)

    search(check, part, times * settings().max_examples)


@pytest.mark.interpret
@pytest.mark.parametrize("part", range(CHUNKS))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy runs the kernels
def test_random_formulas_agree_in_tritons_interpreter(part):
    """In the profile of CI 80 formulas."""

    @given(formulas(depth=4), any_case(["float32"]))
    def check(text, case):
        agree(text, case, "triton", 1e-4)

    search(check, part, settings().max_examples * 8 // 5)


@pytest.mark.interpret
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_random_formulas_agree_under_every_schedule(schedule, monkeypatch):
    """With tiles of two elements along each dimension; in the profile of CI 12 formulas each."""
    monkeypatch.setattr(triton, "backend", triton.TritonBackend(small(schedule)))

    @given(formulas(depth=3), any_case(["float64"]))
    def check(text, case):
        calls.built.cache_clear()  # kernels of another schedule
        agree(text, case, "triton")

    some = settings(
        settings(), max_examples=settings().max_examples // 4, report_multiple_bugs=False
    )
    some(check)()
    calls.built.cache_clear()
