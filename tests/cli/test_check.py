"""Agreement with the oracle, `normc check`, and that a wrong derivative does not pass."""

import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import normc
from normc.analysis import agreement
from normc.analysis.agreement import LAYOUTS, Error, cases, compare, distance
from normc.cli.main import app
from normc.language.primitives import PRIMITIVES
from normc.program.algebra import derivative


def run(*args):
    return CliRunner().invoke(app, ["check", *args, "--no-color"])


# --- cases ---------------------------------------------------------------------------------------


def test_cases_follow_from_the_seed():
    assert cases(seed=4, count=9) == cases(seed=4, count=9)
    assert cases(seed=4, count=9) != cases(seed=5, count=9)


def test_every_layout_and_dtype_has_its_turn():
    made = cases()
    assert {(c.layout.name, c.dtype) for c in made} == {
        (layout.name, dtype) for layout in LAYOUTS for dtype in agreement.DTYPES
    }


@pytest.mark.parametrize("case", cases(seed=2, count=14), ids=lambda c: c.show())
def test_a_case_gives_tensors_that_fit(case):
    definition = normc.zoo["ada_layer_norm"].definition
    given, cotangents = agreement.draw(definition, case)
    x = given["x"]
    assert x.shape == case.shape and str(x.dtype) == f"torch.{case.dtype}"
    assert x.stride() == cotangents[0].stride()
    assert given["scale"].shape == (case.geometry.n, case.geometry.channels)


def test_layouts_are_what_they_are_called():
    made = {c.layout.name: agreement.draw(normc.parse("x").definition, c)[0]["x"] for c in cases()}
    last = made["channels-last"]
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert not made["slice"].is_contiguous() and made["slice"].stride(-1) == 2
    assert made["rank 5"].dim() == 5


# --- errors --------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
DISTANCES = [
    # found, wanted, the distance in units of 2
    ([1.0, 2.0], [1.0, 2.0], 0.0),
    ([1.0, 3.0], [1.0, 2.0], 0.5),
    ([NAN, 2.0], [NAN, 2.0], 0.0),
    ([INF, 3.0], [INF, 2.0], 0.5),
    ([-INF, 2.0], [INF, 2.0], INF),
    ([NAN, 2.0], [INF, 2.0], INF),
    ([1.0, NAN], [1.0, 2.0], INF),
    ([1.0, 2.0], [1.0, NAN], INF),
    ([1.0], [1.0, 2.0], INF),
]


@pytest.mark.parametrize(("found", "want", "distance_"), DISTANCES)
def test_distance(found, want, distance_):
    assert distance(torch.tensor(found), torch.tensor(want), 2.0) == distance_


JUDGED = [
    # error, noise, rule, limit, passes
    (1e-6, 0.0, "tolerance", 1e-5, True),
    (1e-6, 1.0, "tolerance", 1e-5, True),
    (3e-5, 0.0, "eager", 1e-5, False),
    (3e-5, 1e-5, "eager", 8e-5, True),
    (INF, 1e-5, "eager", 8e-5, False),
]


@pytest.mark.parametrize(("error", "noise", "rule", "limit", "ok"), JUDGED)
def test_by_which_rule_an_error_is_judged(error, noise, rule, limit, ok):
    found = Error("y", error, noise, 1e-5)
    assert (found.rule, found.ok) == (rule, ok)
    assert found.limit == pytest.approx(limit)


FORMULAS = ["evonorm_s0", "instance_norm", "add_rms_norm", "ada_layer_norm", "qk_norm", "spade"]


@pytest.mark.parametrize("name", FORMULAS)
def test_the_torch_backend_agrees(name):
    formula = normc.zoo[name]
    for case in cases(seed=1):
        errors = compare(formula, case, "torch", eps=formula.entry.eps)
        given = [*(i.name for i in formula.inputs), *(p.name for p in formula.params)]
        assert [e.tensor for e in errors if e.tensor.startswith("d_")] == [
            f"d_{name}" for name in ("x", *given)
        ]
        assert all(e.ok for e in errors), errors


@pytest.mark.parametrize(
    "text", ["log(x)", "sqrt(x)*v", "x/relu(x)", "signed_sqrt(x)/group_rms(x)"]
)
def test_nan_and_infinities_agree(text):
    (case,) = cases(count=1, dtypes=["float64"])
    assert all(e.ok for e in compare(text, case, "torch"))


def test_an_ill_conditioned_formula_is_excused_by_its_noise():
    text = "(x + 1e6 - batch_mean(x) - 1e6) * gamma"
    (case,) = cases(count=1, dtypes=["float32"])
    value = compare(text, case, "torch")[0]
    assert (value.tensor, value.rule, value.ok) == ("y", "eager", True)


# --- the command ---------------------------------------------------------------------------------


def test_agreement_is_status_0():
    result = run("evonorm_s0", "--backend", "torch")
    assert result.exit_code == 0, result.output
    for layout in LAYOUTS:
        assert layout.name in result.output
    assert "none out of tolerance" in result.output


@pytest.mark.cpu
def test_the_c_backend_agrees():
    result = run("evonorm_s0", "--backend", "c", "--dtype", "float32", "--cases", "2")
    assert result.exit_code == 0, result.output


@pytest.fixture
def wrong_atan(monkeypatch):
    """atan's derivative a little off; the formula must be one that no other test derives."""
    row = replace(PRIMITIVES["atan"], derivative=(lambda x: 1.001 / (1 + x * x),))
    derivative.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(PRIMITIVES, "atan", row)
        yield
    derivative.cache_clear()


@pytest.mark.usefixtures("wrong_atan")
def test_a_wrong_derivative_is_status_1():
    result = run("atan(2.625*x)*gamma", "--backend", "torch")
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert "worst: d_x of torch" in result.output


def test_a_backend_that_cannot_run_is_left_out_unless_asked_for(monkeypatch):
    monkeypatch.setattr("normc.cli.check._why_not", lambda name, dtype: name != "torch" and "no!")
    result = run("x*gamma", "--cases", "1")
    assert result.exit_code == 0
    assert "left out: no!" in result.output
    asked = run("x*gamma", "--cases", "1", "--backend", "c")
    assert asked.exit_code == 2
    assert asked.stderr == "error: no!\n"
