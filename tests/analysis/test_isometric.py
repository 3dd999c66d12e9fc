"""Isometric groups: the simulated check, other torch code, refusals, whole models."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normc
from normc.analysis import isometric
from normc.analysis.isometric import Ratio, _choice, isometric_groups, isometric_groups_of
from normc.analysis.isometric_unit import _draw, unit_of
from normc.errors import FormulaError, NormcError, ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")

CHECK = [
    # fan_in, fan_out, groups: derived, mean and median of 4,000 samples, all measured before
    (256, 256, 1, 1.004, 1.024, 0.995),
    (256, 256, 8, 1.034, 1.054, 1.028),
    (256, 256, 16, 1.077, 1.090, 1.075),
    (256, 256, 32, 1.200, 1.220, 1.179),
    (256, 256, 64, 2.000, 2.016, 1.57),
    (256, 192, 32, 1.000, 1.020, 0.942),
    (256, 128, 16, 0.600, 0.605, 0.562),
    (256, 128, 32, 1.000, 0.989, 0.723),
]


def row(found, groups):
    return next(r for r in found.ratios if r.groups == groups)


@pytest.mark.parametrize(("fan_in", "fan_out", "groups", "derived"), [c[:4] for c in CHECK])
def test_the_derived_mean(fan_in, fan_out, groups, derived):
    found = isometric_groups("group_norm", fan_in, fan_out, activation="relu")
    assert row(found, groups).derived == pytest.approx(derived, abs=5e-4)
    assert row(found, groups).mean is None  # nothing was sampled
    assert row(found, fan_out).derived is None  # of one channel there is none


def test_the_isometric_number_of_channels():
    """m = 3 + fan_out/(fan_in - fan_out), where that is a divisor; else the nearest ratio."""
    assert isometric_groups("group_norm", 256, 192, activation="relu").groups == 32
    assert isometric_groups("group_norm", 256, 128, activation="relu").groups == 32
    assert isometric_groups("group_norm", 128, 128, activation="relu").groups == 1  # none is


def sampled(fan_in, fan_out, draws, inputs):
    return isometric_groups(
        *("group_norm", fan_in, fan_out), activation="relu", method="sampled",
        draws=draws, inputs=inputs, seed=2,
    )  # fmt: skip


def compare(draws, inputs, near, typical):
    """Mean and median against the published check, what was derived against the mean.

    x has an energy of its own in each sample, which the derivation leaves out: for relu the mean is
    5/fan_in higher.
    """
    found = {size: sampled(*size, draws, inputs) for size in {c[:2] for c in CHECK}}
    for fan_in, fan_out, groups, derived, mean, median in CHECK:
        r = row(found[fan_in, fan_out], groups)
        heavy = 6 if r.channels < 6 else 1  # the variance of samples is infinite there
        assert r.mean == pytest.approx(mean, rel=near * heavy), r
        assert r.mean == pytest.approx(derived * (1 + 5 / fan_in), rel=near * heavy), r
        assert r.median == pytest.approx(median, rel=typical), r
        assert r.low < r.median < r.high
        if r.channels < 5:
            assert r.median < 0.85 * r.mean


@pytest.mark.cpu
def test_the_simulated_check():
    """600 samples: the standard error of a mean is about 1 %."""
    compare(draws=20, inputs=30, near=0.035, typical=0.06)


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.thorough
def test_the_simulated_check_with_as_many_samples():
    compare(draws=100, inputs=80, near=0.015, typical=0.03)


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_the_gradient_is_torchs(kernel):
    """The same numbers through torch's own functions."""
    size, stride = (6, 2) if kernel > 1 else (1, 1)
    unit = unit_of("group_norm", "relu", None, (6, 8, kernel, stride, size), None)
    ratios = _draw(unit, [2, 4], 5, torch.Generator().manual_seed(1))
    chance = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    x = normal(5, 6, *[size] * (2 if size > 1 else 0)).relu().requires_grad_()
    full = x if size > 1 else x[..., None, None]
    weight = normal(8, 6, *[kernel] * (2 if size > 1 else 0)).view(8, 6, kernel, kernel)
    pad = [(kernel - 1) // 2, kernel // 2] * 2
    h = F.conv2d(
        F.pad(full, pad, mode="circular"), weight / math.sqrt(6 * kernel**2), stride=stride
    )
    dy = normal(*(h.shape if size > 1 else h.shape[:2])).view_as(h)
    for groups, ratio in zip([2, 4], ratios, strict=True):
        (dx,) = torch.autograd.grad(F.group_norm(h, groups).relu(), x, dy, retain_graph=True)
        want = dx.square().flatten(1).mean(1) / dy.square().flatten(1).mean(1)
        torch.testing.assert_close(ratio, want, rtol=1e-9, atol=0)


@pytest.mark.cpu
def test_on_maps_the_channels_have_means():
    """Alone in its group, a channel's variance lacks its mean's share: 1 - 1/pi is left, and of as
    many directions as there are positions two are taken."""
    found = isometric_groups("group_norm", 32, 32, 1, "relu", size=8, draws=10, inputs=10)
    alone = row(found, 32)
    assert alone.derived is None
    assert alone.mean == pytest.approx(1 / (1 - 1 / math.pi) * 62 / 61, rel=0.03)
    assert [r.mean for r in found.ratios] == sorted(r.mean for r in found.ratios)
    assert row(found, 1).mean == pytest.approx(1, abs=0.1)
    assert found.groups <= 4


@pytest.mark.cpu
def test_what_is_chosen():
    how = dict(activation="relu", method="sampled", draws=10, inputs=20)
    for by in ("mean", "median"):
        found = isometric_groups("group_norm", 64, 48, by=by, **how)
        away = {r.groups: abs(math.log(getattr(r, by))) for r in found.ratios if getattr(r, by)}
        assert found.groups == min(away, key=away.get)
        assert f"*{found.groups:6} " in found.show()
        assert found.show().count("*") - found.unit.count("*") == 1


def test_closest_to_one_is_meant_by_factors():
    assert _choice([Ratio(1, 8, 0.6), Ratio(2, 4, 1.5), Ratio(4, 2, None)], "mean") == 2
    assert _choice([Ratio(1, 8, 0.5), Ratio(2, 4, 2.0)], "mean") == 1
    assert _choice([Ratio(1, 8, 1.0, mean=3.0), Ratio(2, 4, 2.0, mean=1.0)], "mean") == 2


@pytest.mark.cpu
def test_a_median_is_sampled_and_an_activation_within():
    assert row(isometric_groups("group_norm", 16, 8, draws=2, by="median"), 1).median
    found = isometric_groups("evonorm_s0", 16, 12, draws=4, inputs=8)
    assert all(r.derived is None and r.mean is not None for r in found.ratios)
    assert row(isometric_groups("group_norm", 2, 3, draws=3), 1).mean  # too few for a derived one


DERIVED = {
    "relu(beta + gamma*(x - mean[k,s](x))/sqrt(var[k,s](x) + eps))": True,
    "max((x - group_mean(x))*rsqrt(group_var(x) + eps), 0)": True,
    "leaky_relu((x - group_mean(x))/group_std(x))": True,
    "(x - group_mean(x))/group_std(x)": True,
    "param gamma[c] = 2; (x - group_mean(x))/group_std(x)*gamma": False,
    "x/group_rms(x)": False,
    "silu((x - group_mean(x))/group_std(x))": False,
}


@pytest.mark.parametrize("text", DERIVED)
def test_where_the_derivation_holds(text):
    assert unit_of(text, None, None, (8, 8, 1, 1, None), None).derivable is DERIVED[text]
    assert not unit_of(text, None, None, (8, 8, 3, 1, None), None).derivable
    assert not unit_of(text, None, None, (8, 8, 1, 1, 2), None).derivable


@pytest.mark.cpu
def test_it_is_repeatable_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    how = dict(method="sampled", draws=2, inputs=3)
    first = isometric_groups("group_norm", 8, 8, seed=1, **how)
    assert first == isometric_groups("group_norm", 8, 8, seed=1, **how)
    assert first != isometric_groups("group_norm", 8, 8, seed=2, **how)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.cpu
def test_what_a_caller_has_set_for_his_own_tensors_changes_nothing():
    def found():
        return isometric_groups("group_norm", 4, 8, 3, "relu", size=4, draws=2, inputs=2)

    with torch.inference_mode():
        first = found()  # what is kept for later is of no use to gradients, if made here carelessly
    assert first == found()
    for around in torch.no_grad(), torch.device("meta"):
        with around:
            assert found() == first
    for dtype in torch.float64, torch.float16:
        torch.set_default_dtype(dtype)
        try:
            assert found() == first
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")]
)
def test_a_layer_is_made_wherever_layers_are_made(around):
    isometric._remembered.cache_clear()
    with around():
        layer = normc.Layer(
            normc.zoo["group_norm"], 8, groups="isometric", after=nn.Conv2d(4, 8, 3)
        )
    assert layer.groups == isometric_groups("group_norm", 4, 8, 3, "relu").groups


@pytest.mark.cpu
def test_no_inputs_are_none():
    with pytest.raises(NormcError, match="inputs=1 or more"):
        isometric_groups("group_norm", 8, 8, inputs=0, method="sampled")
    with pytest.raises(ShapeError, match="sizes are at least 1"):
        isometric_groups("group_norm", 8, 8, size=0)


def test_refusals():
    with pytest.raises(NormcError, match="do not depend on groups"):
        isometric_groups("batch_norm", 8, 8)
    with pytest.raises(FormulaError, match="needs the input"):
        isometric_groups("input r; (x + r)/group_std(x)", 8, 8)
    with pytest.raises(FormulaError, match="both have a parameter `gamma`"):
        isometric_groups("group_norm", 8, 8, activation="tanh(gamma*x)")
    with pytest.raises(NormcError, match="derived is only the mean"):
        isometric_groups("gn_silu", 8, 8, method="derived")
    with pytest.raises(NormcError, match="derived is only the mean"):
        isometric_groups("group_norm", 8, 8, method="derived", by="median")
    with pytest.raises(NormcError, match="finite ratio"):
        isometric_groups("group_norm", 8, 3, method="derived")
    with pytest.raises(NormcError, match='by is "mean" or'):
        isometric_groups("group_norm", 8, 8, by="mode")
    for sizes in ((0, 8, 1), (8, 8, 0)):
        with pytest.raises(ShapeError):
            isometric_groups("group_norm", *sizes)
    with pytest.raises(ShapeError, match="multiple of stride"):
        isometric_groups("group_norm", 8, 8, 3, size=7, stride=2)


# --- a whole model -------------------------------------------------------------------------------


class PreAct(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.GroupNorm(1, after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1)
        self.conv2 = nn.Conv2d(after, after, 1)
        self.skip = nn.Conv2d(before, after, 1, stride)

    def forward(self, x):
        h = self.norm1(x).relu()
        return self.conv2(self.norm2(self.conv1(h)).relu()) + self.skip(h)


class Mixed(nn.Module):
    """What feeds a norm stands before a sum, is concatenated, transposed, or is not there."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = PreAct(8, 12, 2), PreAct(12, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.cat = nn.BatchNorm2d(32)
        self.up, self.after_up = nn.ConvTranspose2d(16, 8, 2, 2), normc.Layer("x/group_std(x)", 8)
        self.unused = nn.BatchNorm2d(4)
        self.fc, self.last = nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(self.two(self.one(self.stem(self.first(x)))))
        self.cat(torch.cat([x, x], 1))
        x = self.after_up(self.up(x))
        return self.last(self.fc(x.mean((2, 3))))


@pytest.mark.cpu
def test_what_feeds_each_norm(monkeypatch):
    asked = {}

    def record(formula, *sizes, stride, size, seed=0, **_):
        fan_in, fan_out, kernel, activation = sizes
        asked[fan_in, fan_out, kernel, stride, size] = activation
        return isometric_groups("group_norm", fan_in, fan_out)

    monkeypatch.setattr("normc.analysis.isometric.isometric_groups", record)
    model = Mixed()
    found = isometric_groups_of(model, "group_norm", shape=(2, 3, 16, 16), activation="relu")
    assert list(found) == ["one.norm1", "one.norm2", "two.norm1", "two.norm2", "norm", "last"]
    assert list(asked) == [
        *((3, 8, 3, 1, 8), (8, 12, 3, 2, 8), (12, 12, 1, 1, 8), (12, 16, 3, 1, 8)),
        *((16, 16, 1, 1, 8), (8, 6, 1, 1, 1)),
    ]
    assert set(asked.values()) == {"relu"}
    assert found["last"] == isometric_groups("group_norm", 8, 6).groups


@pytest.mark.cpu
def test_a_model_is_left_as_it_was():
    model = Mixed()
    model.two.eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    chance = torch.get_rng_state()
    how = dict(activation="relu", draws=2, inputs=1, largest=2)
    found = isometric_groups_of(model, "group_norm", torch.randn(2, 3, 8, 8), **how)
    assert all(model.get_submodule(n).weight.shape[0] % g == 0 for n, g in found.items())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())
    assert model.training and not model.two.training and model.one.norm1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.randn(2, 3, 8, 8)
    after = torch.get_rng_state()
    torch.set_rng_state(chance)
    torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    assert torch.equal(after, torch.get_rng_state())


def test_a_network_of_linear_layers_needs_no_samples():
    mlp = nn.Sequential(
        *(nn.Linear(256, 192), nn.LayerNorm(192), nn.ReLU()),
        *(nn.Linear(192, 144), nn.BatchNorm1d(144), nn.ReLU(), nn.Linear(144, 10)),
    )
    found = isometric_groups_of(mlp, "group_norm", shape=(4, 256), activation="relu")
    assert found == {"1": 32, "4": 24}


def groups_of(*modules, shape, **how):
    model = nn.Sequential(*modules)
    return list(isometric_groups_of(model, "group_norm", shape=shape, draws=2, inputs=1, **how))


@pytest.mark.cpu
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_ends_in_a_linear_layer(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
    assert groups_of(layer, shape=(2, 5, 8)) == ["0.norm1", "0.norm2"]


@pytest.mark.cpu
def test_a_norm_may_stand_behind_the_pooling():
    pooled = (nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8))
    assert groups_of(*pooled, shape=(2, 3, 8, 8)) == ["3"]


def test_refusals_of_a_model():
    norm = nn.BatchNorm2d(8)
    for largest in (0, -3):
        with pytest.raises(ShapeError, match=f"largest={largest}: "):
            groups_of(nn.Conv2d(3, 8, 3), norm, shape=(2, 3, 8, 8), largest=largest)
    with pytest.raises(NormcError, match="lazy modules.*call it once"):
        groups_of(nn.LazyConv2d(8, 3), norm, shape=(2, 3, 8, 8))
    says = r"one tensor of shape \(2, 4, 8, 8\), float32: RuntimeError: .*to have 3 channels.*"
    with pytest.raises(NormcError, match=says + "takes one tensor.*a mapping from paths"):
        groups_of(nn.Conv2d(3, 8, 3), norm, shape=(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (nn.MaxPool2d(2), "MaxPool2d: expected a convolution or linear layer"),
        (nn.MultiheadAttention(8, 2), "MultiheadAttention: expected a convolution or linear"),
        (nn.ConvTranspose1d(4, 8, 3), "ConvTranspose1d: expected a convolution or linear layer"),
        (nn.LazyConv2d(8, 3), "LazyConv2d has no shapes yet: call it once"),
        (nn.LazyLinear(8), "LazyLinear has no shapes yet: call it once"),
    ],
)
def test_refusals_of_what_stands_before_a_layer(after, words):
    with pytest.raises(ShapeError, match=words):
        normc.Layer(normc.zoo["group_norm"], 8, groups="isometric", after=after)
