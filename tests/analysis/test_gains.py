"""Gains: the table of the NF-ResNet papers, closed forms, sampling, and refusals."""

import math

import pytest
import torch

import normc
from normc.analysis.gains import GainError, gain, moments
from normc.errors import FormulaError, NormcError, ShapeError

TABLE = {
    # formula: gamma, mean, variance, as published tables and independent quadrature have them
    "x": (1, 0, 1),
    "relu": (1.712859, 0.398942, 0.340845),
    "relu6": (1.712859, 0.398942, 0.340845),
    "leaky_relu": (1.704832, 0.394953, 0.344062),
    "silu": (1.787187, 0.206621, 0.313083),
    "gelu_tanh": (1.700917, 0.282039, 0.345648),
    "gelu": (1.700926, 0.282095, 0.345644),
    "elu": (1.270843, 0.160521, 0.619179),
    "selu": (1.000000, 0, 1),
    "tanh": (1.592537, 0, 0.394294),
    "sigmoid": (4.801313, 0.5, 0.043379),
    "softplus": (1.919126, 0.806059, 0.271515),
    "logsigmoid": (1.919126, -0.806059, 0.271515),
    "x/(1 + abs(x))": (2.337533, 0, 0.183014),
    "mish": (1.592025, 0.240404, 0.394548),
    "hardswish": (1.813871, 0.166217, 0.303939),
    "erf": (1.467167, 0, 0.464559),
    "atan": (1.491208, 0, 0.449701),
    "square(relu(x))": (0.894427, 0.5, 1.25),
}

CODE = {  # constants of deepmind's base.py and timm: estimates from samples, 0.1 % off at most
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "leaky_relu": 1.70590341091156,
    "silu": 1.7881293296813965,
    "gelu_tanh": 1.7015043497085571,
    "elu": 1.2716004848480225,
    "selu": 1.0008515119552612,
    "tanh": 1.5939117670059204,
    "sigmoid": 4.803835391998291,
    "softplus": 1.9203323125839233,
    "logsigmoid": 1.9193484783172607,
    "x/(1 + abs(x))": 2.338853120803833,
}

PHI = math.exp(-(0.3**2) / 2) / math.sqrt(2 * math.pi)
BELOW = 0.5 * (1 + math.erf(0.3 / math.sqrt(2)))
FOLDED = 2 * PHI + 0.3 * (2 * BELOW - 1)  # the mean of abs(z - 0.3)

CLOSED = {
    # formula: mean, variance
    "exp(x)": (math.exp(0.5), math.exp(2) - math.exp(1)),
    "exp(4*x)": (math.exp(8), math.exp(32) - math.exp(16)),
    "x**6": (15, 10395 - 225),
    "sin(40*x)": (0, 0.5),
    "1000 + x": (1000, 1),
    "1e-20*x": (0, 1e-40),
    "sign(x - 0.3)": (1 - 2 * BELOW, 1 - (1 - 2 * BELOW) ** 2),
    "abs(x - 0.3)": (FOLDED, 1.09 - FOLDED**2),
    "signed_sqrt(x)": (0, math.sqrt(2 / math.pi)),
    "exp(0.2*x*x)": (0.6**-0.5, 0.2**-0.5 - 1 / 0.6),
    "erf(x)": (0, 2 / math.pi * math.asin(2 / 3)),
    "clamp(x, -3, 3)": (0, None),
}


@pytest.mark.parametrize("text", TABLE)
def test_the_table(text):
    found, (gamma, mean, variance) = moments(text), TABLE[text]
    assert found.gain == pytest.approx(gamma, abs=6e-7)  # the digits there are
    assert (found.mean, found.variance) == pytest.approx((mean, variance), abs=6e-7)
    assert gain(text) == found.gain == found.variance**-0.5


@pytest.mark.parametrize("text", CODE)
def test_published_constants(text):
    """They were estimated by a biased variance of samples: all are above, by up to 0.09 %."""
    assert 0 < CODE[text] / gain(text) - 1 < 1e-3


@pytest.mark.parametrize("text", CLOSED)
def test_closed_forms(text):
    mean, variance = CLOSED[text]
    found = moments(text)
    assert found.mean == pytest.approx(mean, rel=1e-12, abs=1e-12 * found.variance**0.5)
    if variance is not None:
        assert found.variance == pytest.approx(variance, rel=1e-11)
        assert abs(found.variance - variance) <= 10 * found.error + 1e-14 * found.variance
    assert found.error < 1e-11 * found.variance


def test_formulas_of_the_zoo():
    """A learned scale counts at its initial value: 0.5 inside DyT's tanh."""
    assert gain("dyt") == gain("tanh(0.5*x)") == gain(normc.zoo["dyt"])
    assert gain("derf") == pytest.approx((2 / math.pi * math.asin(0.5 / 1.5)) ** -0.5, rel=1e-12)
    assert gain("x/sqrt(x*x + eps)", eps=1) == gain("x/sqrt(x*x + 1)")


@pytest.mark.cpu
def test_sampling_agrees_with_quadrature():
    exact, found = moments("silu"), moments("silu", sample=(16, 32, 8, 8), draws=20)
    assert abs(found.variance - exact.variance) < 4 * found.error
    assert 1e-4 < found.error < 2e-3
    assert "20 samples of 16x32x8x8" in found.show() and "quadrature" in exact.show()


@pytest.mark.cpu
def test_the_standard_error_is_one():
    """Of 30 estimates, about 68 % are closer than it to the truth."""
    exact = moments("relu").variance
    close = [
        abs(m.variance - exact) < m.error
        for m in (moments("relu(x) + 3", sample=(4, 8), draws=30, seed=s) for s in range(30))
    ]
    assert 13 <= sum(close) <= 28
    found = moments("relu(x) + 3", sample=(4, 8), draws=30)
    more = (found.variance + 0.01 * found.error) ** -0.5
    assert found.gain_error == pytest.approx((found.gain - more) / 0.01, rel=0.01)


@pytest.mark.cpu
def test_formulas_with_statistics():
    found = moments("group_norm", sample=(32, 32, 6, 6), groups=4)
    assert found.variance == pytest.approx(1, abs=2e-5)
    relu = moments("bn_relu", sample=(32, 16, 8, 8))
    assert abs(relu.gain - gain("relu")) < 4 * relu.gain_error
    few = moments("relu((x - group_mean(x))/group_std(x))", sample=(64, 64), groups=32)
    assert few.variance == pytest.approx(0.25, abs=2e-3)  # of two values: -1 and 1


@pytest.mark.cpu
def test_sampling_is_repeatable_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first = moments("layer_norm", sample=(4, 8), seed=3)
    assert first == moments("layer_norm", sample=(4, 8), seed=3)
    assert first != moments("layer_norm", sample=(4, 8), seed=4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.cpu
def test_what_a_caller_has_set_for_his_own_tensors_changes_nothing():
    def found():
        return moments("silu"), moments("group_norm", sample=(4, 8), groups=2, draws=2)

    want = found()
    for around in torch.no_grad(), torch.inference_mode(), torch.device("meta"):
        with around:
            assert found() == want
    for dtype in torch.float64, torch.float16:
        torch.set_default_dtype(dtype)
        try:
            assert found() == want
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("sample", [(), (4,), (0, 4), (2, -3), (2.5, 3), 4])
def test_a_sample_is_a_shape_with_channels(sample):
    with pytest.raises(ShapeError, match="sample=.*: .*at least 1"):
        gain("group_norm", sample=sample)


INFINITE = ["1/x", "exp(x*x/4)", "exp(x*x)", "tan(x)", "1/signed_sqrt(x)", "exp(50*x)"]


@pytest.mark.parametrize("text", INFINITE)
def test_an_infinite_variance_is_refused(text):
    with pytest.raises(GainError, match="infinite|inf at"):
        gain(text)


@pytest.mark.parametrize("text", ["log(x)", "sqrt(x)", "sqrt(x - 3)"])
def test_an_undefined_one_is_refused(text):
    with pytest.raises(GainError, match="is nan at"):
        gain(text)


@pytest.mark.parametrize("text", ["3 + 0*x", "x - x", "square(sign(x))", "sigmoid(x + 60)"])
def test_a_constant_is_refused(text):
    with pytest.raises(GainError, match="for every input"):
        gain(text)


@pytest.mark.cpu
def test_so_it_is_with_samples():
    with pytest.raises(GainError, match="nan"):
        gain("log(x - group_mean(x))", sample=(4, 8))
    with pytest.raises(GainError, match="for every input"):
        gain("group_mean(x)*0*x + 1", sample=(4, 8))
    with pytest.raises(NormcError, match="draws=2"):
        gain("group_norm", draws=1)


def test_what_maps_no_tensor_to_a_tensor_is_refused():
    with pytest.raises(FormulaError, match="needs the input `residual`"):
        gain("input residual; x + residual")
    with pytest.raises(FormulaError, match="several results"):
        gain("x, 2*x")
    with pytest.raises(FormulaError):
        gain("softmax(x)")
