"""What compile, ops and layers are given: names in the zoo, tensors by place, and nonsense."""

import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import normc

X = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
RESIDUAL = X.flip(0)
SUM = "input residual; input gate[n,c]; x*gate + residual"


def test_a_name_in_the_zoo_is_its_formula_everywhere():
    f = normc.zoo["rms_norm"]
    assert normc.compile("rms_norm").formula is f and normc.Layer(" rms_norm ", 8).formula is f
    assert normc.compile_many(["rms_norm"])[0].formula is f
    assert_close(normc.reference("rms_norm")(X), normc.reference(f)(X))
    assert normc.compile("x").formula.text == "x"


@pytest.mark.parametrize("make", [normc.compile, lambda text: normc.Layer(text, 8)])
@pytest.mark.parametrize(
    "text, words",
    [
        ("X/group_std(X)", "never reads `x`, the input: it is a small letter"),
        ("gama*beta", "`gama*beta` never reads `x`, the input"),
        ("layer_sum(1)", "never reads `x`, the input"),
        ("input r; r*gamma", "never reads `x`, the input"),
        ("relu", "`relu` is a function and needs an argument: `relu(x)`"),
        ("EvoNorm-S0", "did you mean `evonorm_s0`"),
        ("rms_nrom", "no formula is called `rms_nrom` (did you mean `rms_norm`?)"),
        (b"x", "a formula is text, a name in the zoo or a normc.Formula, not bytes"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_layer(make, text, words):
    with pytest.raises(normc.NormcError, match=re.escape(words)):
        make(text)


def test_many_formulas_meet_the_same_errors():
    found = normc.compile_many(["gama*beta", None, "x"], optimize="fast")
    assert ["never reads" in str(found[0]), "NoneType" in str(found[1])] == [True, True]
    assert isinstance(found[2], normc.Op)


@pytest.mark.parametrize("kind", ["op", "layer"])
def test_inputs_have_places(kind):
    call = normc.compile(SUM) if kind == "op" else normc.Layer(SUM, 8)
    gate = torch.rand(2, 8)
    want = call(X, residual=RESIDUAL, gate=gate)
    assert torch.equal(call(X, RESIDUAL, gate), want)
    assert torch.equal(call(X, RESIDUAL, gate=gate), want)
    for args, named, words in (
        ((RESIDUAL, gate, gate), {}, "takes x and residual, gate"),
        ((RESIDUAL,), {"residual": RESIDUAL, "gate": gate}, "`residual` is given twice"),
        ((RESIDUAL,), {}, r"`gate\[n,c\]` is missing"),
        ((RESIDUAL, 0.5), {}, "`gate` must be a tensor, not float"),
    ):
        with pytest.raises(normc.ShapeError, match=words):
            call(X, *args, **named)
    with pytest.raises(normc.ShapeError, match="x must be a tensor, not str"):
        call("x", RESIDUAL, gate)


def test_a_parameter_of_an_op_may_have_any_name():
    assert_close(normc.compile("x*self")(X, self=torch.full((8,), 2.0)), 2 * X)


@pytest.mark.parametrize(
    "text", ["x*momentum", "x*forward", "x*op", "x/batch_std(x)*running_var", "input self; x*self"]
)
def test_a_parameter_of_a_layer_may_not_be_one_of_its_attributes(text):
    with pytest.raises(normc.FormulaError, match=r"is an attribute of every Layer: give it"):
        normc.Layer(text, 8)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(num_channels=-1), "a whole number, not -1"),
        (dict(num_channels=2.0), "a whole number, not 2.0"),
        (dict(eps=-1), "eps must be a number from 0 on, not -1"),
        (dict(eps=float("nan")), "not nan"),
        (dict(eps="a"), "not 'a'"),
        (dict(momentum="a"), "momentum must be None or a number, not 'a'"),
    ],
)
def test_numbers_out_of_range(given, words):
    with pytest.raises(normc.NormcError, match=words):
        normc.Layer("rms_norm", **{"num_channels": 8, **given})


def test_a_layer_shows_what_matters_to_it():
    assert repr(normc.Layer("dyt", 8)).endswith("beta', 8, eps=1e-05, channel_dim=1)")
    assert "groups=4" in repr(normc.Layer("group_norm", 8, groups=4))
    assert "momentum=0.1" in repr(normc.Layer("batch_norm", 8))
    untracked = repr(normc.Layer("batch_norm", 8, track_running_stats=False))
    assert "track_running_stats=False" in untracked and "momentum" not in untracked


def test_a_layer_has_the_epsilon_of_the_zoo():
    assert [normc.Layer(n, 8).eps for n in ("bn_silu", "rms_norm", "batch_norm")] == [
        *(1e-3, 1e-6, 1e-5)
    ]
    assert normc.Layer("x", np.int64(8), eps=np.float32(0.5), momentum=np.float32(1)).eps == 0.5
    assert normc.Layer("bn_silu", 8, eps=0.0).eps == 0 and normc.Layer("x", 8).eps == 1e-5
