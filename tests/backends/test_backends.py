"""Every formula of the zoo on every layout, value and all gradients, C and torch against the
oracle."""

from itertools import cycle

import pytest

import normc
from normc.analysis.agreement import LAYOUTS, Case, cases, compare
from normc.backends import contract
from normc.language.axes import AXIS_SETS
from normc.language.reductions import REDUCTIONS
from normc.pipeline import Target, sources
from tests.layers import LEADERS

README = "x*sigmoid(v*x)/group_std(x)*gamma + beta"
TEXTS = {"readme": README} | {name: f.text for name, f in normc.zoo.items()}
SHAPES = {2: (6, 24), 3: (3, 5, 24), 4: (3, 12, 7, 5), 5: (2, 8, 3, 2, 5)}

CANCELLING = {
    *("switchable_norm", "layer_norm_scaling", "pointwise_exproot", "pointwise_logquad_clip"),
}
"""Rows with gradients (of scalars) that cancel to a thousandth of their terms: judged, as plain
rows of one element per channel are, against plain torch's own error in the same dtype."""

pytestmark = pytest.mark.cpu


def case_on(layout, dtype):
    shape = list(SHAPES[layout.rank])
    channels = max(shape[1:3]) if layout.rank == 3 else shape[1]
    if layout.rank == 3 and layout.channel_dim == 1:
        shape = [3, 24, 5]
    return Case(layout, tuple(shape), 4 if channels % 4 == 0 else 1, dtype, 7)


def every_way():
    """In C in float32, as torch in float64; in `make test` C in float64 for one of a kind.

    Layers like another are tried in C on three layouts in float32, on all in float64.
    """
    for name in TEXTS:
        kin = name in normc.zoo and name not in LEADERS
        marks = (pytest.mark.thorough,) if kin else ()
        yield from ((name, "c", "float32"), (name, "torch", "float64"))
        yield pytest.param(name, "c", "float64", marks=marks)
        yield pytest.param(name, "torch", "float32", marks=(pytest.mark.thorough,))


@pytest.mark.parametrize(("name", "backend", "dtype"), list(every_way()))
def test_zoo_agrees_with_the_oracle(name, backend, dtype):
    f = normc.parse(TEXTS[name])
    kin = name in normc.zoo and name not in LEADERS
    for layout in LAYOUTS[:3] if kin and (backend, dtype) == ("c", "float32") else LAYOUTS:
        for error in compare(f, case_on(layout, dtype), backend):
            assert error.ok, (layout.name, error)
            if layout.rank > 2 and name not in CANCELLING:
                assert error.rule == "tolerance", (layout.name, error)


ODD = [(1, 1, 1, 1), (1, 3, 7, 1), (2, 7, 1, 127), (1, 2, 129, 1), (1, 1, 3, 1025), (3, 1, 1, 2049)]


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("name", ["readme", "evonorm_b0", "group_norm", "grn", "add_rms_norm"])
def test_odd_sizes(name, shape):
    for layout in [x for x in LAYOUTS if x.rank == 4]:
        for error in compare(TEXTS[name], Case(layout, shape, 1, "float64", 3), "c"):
            assert error.ok, (layout.name, error)


def every_set():
    """Every axis set with two statistics, and every statistic with some axis set."""
    stats = cycle(REDUCTIONS)
    pairs = [(axes, next(stats)) for axes in AXIS_SETS for _ in range(2)]
    pairs += zip(cycle(AXIS_SETS), REDUCTIONS.keys() - {stat for _, stat in pairs}, strict=False)
    return [f"x*{axes}_{stat}(v*x) + {axes}_{stat}(x)" for axes, stat in pairs]


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("text", every_set())
def test_every_axis_set(text, backend):
    for case in cases(seed=5, count=7, dtypes=["float64"]):
        for error in compare(text, case, backend):
            assert error.ok, (case.show(), error)


def test_long_reductions_are_merged_accurately():
    shape = (1, 2, 300, 301)
    for text in ("(x - instance_mean(x))/instance_std(x)", "x*layer_sum(v*x)", "x/all_rms(x)"):
        for error in compare(text, Case(LAYOUTS[0], shape, 1, "float32", 1), "c"):
            assert error.ok and error.error < 2e-6, (text, error)


def test_golden_c(golden):
    f = normc.zoo["evonorm_s0"]
    found = sources(
        f.definition, f.label, f.text, ("x", "v", "gamma", "beta"), Target("c", "float32")
    )
    golden("evonorm_s0", "\n".join(source.text for _, source in found))


def test_backends_are_found_by_name_and_say_why_they_cannot():
    assert {contract.find(name).name for name in ("c", "torch")} == {"c", "torch"}
    assert "not on cuda" in contract.find("c").why_not("float32", "cuda")
    assert not contract.find("torch").why_not("bfloat16", "meta")


def test_without_a_compiler_auto_falls_back_to_torch(monkeypatch):
    from normc.backends import c_compiler
    from normc.ops import target

    monkeypatch.setattr(c_compiler, "compiler", lambda: None)
    target._why_not.cache_clear()
    assert target.choose("auto", "float32", "cpu") == "torch"
    target._why_not.cache_clear()
