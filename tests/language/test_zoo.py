"""Every layer of the zoo against a definition written straight in torch.

A definition sees x as (N, C, L), parameters as (1, C, 1) and inputs per sample and channel as
(N, C, 1). It shares nothing with the zoo's text: it is torch's own functional norm where there is
one, else the paper's formula. Longer than most files because the zoo is.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from normc.language import zoo
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.geometry import Geometry
from normc.language.zoo import ZOO
from normc.reference import reference


def mean(x, *dims):
    return x.sum(dims, keepdim=True) / math.prod(x.shape[d] for d in dims)


def var(x, *dims):
    return mean((x - mean(x, *dims)) ** 2, *dims)


def grouped(x, groups):
    return x.reshape(x.shape[0], groups, -1, x.shape[2])


def group_std(x, groups, eps):
    std = torch.sqrt(var(grouped(x, groups), 2, 3) + eps)
    return std.expand(grouped(x, groups).shape).reshape(x.shape)


def group_rms(x, groups, eps):
    rms = torch.sqrt(mean(grouped(x, groups) ** 2, 2, 3) + eps)
    return rms.expand(grouped(x, groups).shape).reshape(x.shape)


def over_channels(norm, x, **kwargs):
    return norm(x.transpose(1, 2), (x.shape[1],), **kwargs).transpose(1, 2)


def batch_norm(x, eps):
    return F.batch_norm(x, None, None, training=True, eps=eps)


def switchable_norm(x, groups, eps, t):
    wm = torch.softmax(torch.stack([t["mi"], t["ml"], t["mb"]]), 0)
    wv = torch.softmax(torch.stack([t["vi"], t["vl"], t["vb"]]), 0)
    over = ((2,), (1, 2), (0, 2))
    m = sum(w * mean(x, *dims) for w, dims in zip(wm, over, strict=True))
    v = sum(w * var(x, *dims) for w, dims in zip(wv, over, strict=True))
    return (x - m) / torch.sqrt(v + eps) * t["gamma"] + t["beta"]


def batch_instance_norm(x, groups, eps, t):
    blend = t["rho"] * batch_norm(x, eps) + (1 - t["rho"]) * F.instance_norm(x, eps=eps)
    return blend * t["gamma"] + t["beta"]


def l1_batch_norm(x, groups, eps, t):
    centred = x - mean(x, 0, 2)
    deviation = math.sqrt(math.pi / 2) * mean(centred.abs(), 0, 2)
    return centred / (deviation + eps) * t["gamma"] + t["beta"]


def qk_norm(x, groups, eps, t):
    return F.normalize(grouped(x, groups), dim=2, eps=eps).reshape(x.shape)


def grn(x, groups, eps, t):
    g = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    return t["gamma"] * (x * (g / (mean(g, 1) + eps))) + t["beta"] + x


def evonorm_b0(x, groups, eps, t):
    batch, instance = torch.sqrt(var(x, 0, 2) + eps), torch.sqrt(var(x, 2) + eps)
    return x / torch.maximum(batch, t["v"] * x + instance) * t["gamma"] + t["beta"]


def evonorm_b1(x, groups, eps, t):
    batch, instance = torch.sqrt(var(x, 0, 2) + eps), torch.sqrt(mean(x**2, 2) + eps)
    return x / torch.maximum(batch, (x + 1) * instance) * t["gamma"] + t["beta"]


def evonorm_b2(x, groups, eps, t):
    batch, instance = torch.sqrt(var(x, 0, 2) + eps), torch.sqrt(mean(x**2, 2) + eps)
    return x / torch.maximum(batch, instance - x) * t["gamma"] + t["beta"]


def evonorm_s0(x, groups, eps, t):
    return x * torch.sigmoid(t["v"] * x) / group_std(x, groups, eps) * t["gamma"] + t["beta"]


def frn_tlu(x, groups, eps, t):
    normed = x / torch.sqrt(mean(x**2, 2) + abs(eps))
    return torch.maximum(t["gamma"] * normed + t["beta"], t["tau"])


def add_rms_norm(x, groups, eps, t):
    total = x + t["residual"]
    return over_channels(F.rms_norm, total, eps=eps) * t["gamma"], total


def adain(x, groups, eps, t):
    return t["style_std"] * F.instance_norm(x, eps=eps) + t["style_mean"]


def affine(norm):
    return lambda x, groups, eps, t: norm(x, groups, eps) * t["gamma"] + t["beta"]


INDEPENDENT = {
    "batch_norm": affine(lambda x, g, eps: batch_norm(x, eps)),
    "layer_norm": affine(lambda x, g, eps: F.layer_norm(x, x.shape[1:], eps=eps)),
    "layer_norm_tokens": affine(lambda x, g, eps: over_channels(F.layer_norm, x, eps=eps)),
    "group_norm": affine(lambda x, g, eps: F.group_norm(x, g, eps=eps)),
    "instance_norm": affine(lambda x, g, eps: F.instance_norm(x, eps=eps)),
    "batch_instance_norm": batch_instance_norm,
    "switchable_norm": switchable_norm,
    "l1_batch_norm": l1_batch_norm,
    "rms_norm": lambda x, g, eps, t: over_channels(F.rms_norm, x, eps=eps) * t["gamma"],
    "rms_norm_centred_gain": lambda x, g, eps, t: (
        over_channels(F.rms_norm, x, eps=eps) * (1 + t["gamma"])
    ),
    "pixel_norm": lambda x, g, eps, t: x / torch.sqrt(mean(x**2, 1) + 1e-8),
    "scale_norm": lambda x, g, eps, t: t["g"] * F.normalize(x, dim=1, eps=eps),
    "qk_norm": qk_norm,
    "grn": grn,
    "evonorm_b0": evonorm_b0,
    "evonorm_b1": evonorm_b1,
    "evonorm_b2": evonorm_b2,
    "evonorm_s0": evonorm_s0,
    "evonorm_s1": affine(lambda x, g, eps: x * torch.sigmoid(x) / group_std(x, g, eps)),
    "evonorm_s2": affine(lambda x, g, eps: x * torch.sigmoid(x) / group_rms(x, g, eps)),
    "frn_tlu": frn_tlu,
    "bn_relu": lambda x, g, eps, t: F.relu(batch_norm(x, eps) * t["gamma"] + t["beta"]),
    "gn_silu": lambda x, g, eps, t: F.silu(F.group_norm(x, g, eps=eps) * t["gamma"] + t["beta"]),
    "dyt": lambda x, g, eps, t: t["gamma"] * torch.tanh(t["alpha"] * x) + t["beta"],
    "derf": lambda x, g, eps, t: t["gamma"] * torch.erf(t["alpha"] * x + t["shift"]) + t["beta"],
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": lambda x, g, eps, t: (
        over_channels(F.rms_norm, x * F.silu(t["z"]), eps=eps) * t["gamma"]
    ),
    "ada_layer_norm": lambda x, g, eps, t: (
        over_channels(F.layer_norm, x, eps=eps) * (1 + t["scale"]) + t["shift"]
    ),
    "adain": adain,
    "spade": lambda x, g, eps, t: batch_norm(x, eps) * (1 + t["scale"]) + t["shift"],
}

AFFINE = {"gamma": 1, "beta": 0}
UNLEARNED = ("pixel_norm", "qk_norm", "ada_layer_norm", "adain", "spade")

STARTS = {
    **dict.fromkeys(INDEPENDENT, AFFINE),
    **{name: {} for name in UNLEARNED},
    "batch_instance_norm": {"rho": 1, **AFFINE},
    "switchable_norm": dict.fromkeys(("mi", "ml", "mb", "vi", "vl", "vb"), 1) | AFFINE,
    "rms_norm": {"gamma": 1},
    "rms_norm_centred_gain": {"gamma": 0},
    "scale_norm": {"g": 1},
    "grn": {"gamma": 0, "beta": 0},
    "evonorm_b0": {"v": 1, **AFFINE},
    "evonorm_s0": {"v": 1, **AFFINE},
    "frn_tlu": {"tau": 0, **AFFINE},
    "dyt": {"alpha": 0.5, **AFFINE},
    "derf": {"alpha": 0.5, "shift": 0, **AFFINE},
    "add_rms_norm": {"gamma": 1},
    "gated_rms_norm": {"gamma": 1},
}
"""Where each parameter starts; a row not named here has the affine map of its INDEPENDENT."""

SCALARS = {"alpha", "shift", "g", "mi", "ml", "mb", "vi", "vl", "vb"}
"""Scalar parameters; every other is per channel (`shift` is an input of other layers)."""

LAYOUTS = {
    # shape of x, channel_dim, groups
    "nchw": ((3, 6, 4, 5), 1, 2),
    "channels_last": ((2, 3, 4, 6), -1, 3),
    "tokens": ((3, 5, 12), -1, 4),
    "volume": ((2, 4, 3, 2, 3), 1, "auto"),
    "channel_in_the_middle": ((2, 3, 8, 4), 2, 8),
    "matrix": ((5, 12), 1, 3),
}


def draw(definition, shape, channel_dim, groups, seed=0):
    """x and every tensor, as a user holds them, in float64 and requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry.of(shape, groups, channel_dim)
    rows = [("x", FULL), *((row.name, row.axes) for row in definition.params + definition.inputs)]
    return {
        name: torch.randn(
            geometry.shape_of(axes), generator=generator, dtype=torch.float64
        ).requires_grad_()
        for name, axes in rows
    }


def as_ncl(tensor, axes, channel_dim):
    """A user's tensor as a definition sees it."""
    if axes == FULL:
        return tensor.movedim(channel_dim, 1).flatten(2) if tensor.dim() > 2 else tensor[..., None]
    if axes == CHANNEL:
        return tensor[None, :, None]
    return tensor[..., None] if axes == Axis.N | CHANNEL else tensor


def expected(name, definition, tensors, channel_dim, groups):
    x = tensors["x"]
    ncl = as_ncl(x, FULL, channel_dim)
    seen = {
        row.name: as_ncl(tensors[row.name], row.axes, channel_dim)
        for row in definition.params + definition.inputs
    }
    count = Geometry.of(x.shape, groups, channel_dim).g
    y = INDEPENDENT[name](ncl, count, ZOO[name].eps, seen)
    back = x.movedim(channel_dim, 1).shape
    return [r.reshape(back).movedim(1, channel_dim) for r in (y if type(y) is tuple else (y,))]


def gradients(results, tensors):
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results
    )
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def needs_space(name):
    # torch's own instance norm refuses one position per sample and channel.
    return name in ("instance_norm", "batch_instance_norm", "adain")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ZOO)
def test_values_and_gradients_agree_with_an_independent_definition(name, layout):
    shape, channel_dim, groups = LAYOUTS[layout]
    if len(shape) == 2 and needs_space(name):
        shape, channel_dim = (*shape, 2), 1
    layer = reference(ZOO[name].text)
    tensors = draw(layer.definition, shape, channel_dim, groups)
    y = layer(**tensors, groups=groups, eps=ZOO[name].eps, channel_dim=channel_dim)
    results = list(y) if isinstance(y, tuple) else [y]
    wanted = expected(name, layer.definition, tensors, channel_dim, groups)
    assert_close(results, wanted, rtol=1e-10, atol=1e-12)
    assert_close(gradients(results, tensors), gradients(wanted, tensors), rtol=1e-10, atol=1e-11)


def test_every_layer_has_an_independent_definition():
    assert set(INDEPENDENT) == set(ZOO)
    assert len(ZOO) >= 20


@pytest.mark.parametrize("name", ZOO)
def test_parameters_start_where_the_paper_starts_them(name):
    params = reference(ZOO[name].text).definition.params
    assert {param.name: param.init for param in params} == STARTS[name]
    for param in params:
        assert param.axes == (NONE if param.name in SCALARS else CHANNEL)


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_one_line_with_its_paper(name):
    entry = ZOO[name]
    assert entry.name == name == name.lower()
    assert "\n" not in entry.text
    assert entry.paper
    assert entry.doc
    digits, number = entry.arxiv.split(".")
    assert number.isdigit()
    assert (len(digits), len(number)) in ((4, 4), (4, 5))
    assert 2000 + int(digits[:2]) == entry.year
    assert entry.reference == f"{entry.paper}, arXiv {entry.arxiv}, {entry.year}"


def test_grn_starts_as_the_identity():
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert torch.equal(reference(ZOO["grn"].text)(x, eps=1e-6), x)


@pytest.mark.parametrize("name", ["scale_norm", "qk_norm", "rms_norm", "grn"])
def test_a_padding_token_stays_zero(name):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    x[:, 1] = 0
    y = reference(ZOO[name].text)(x.movedim(2, 1), groups=2, eps=ZOO[name].eps)
    assert y.isfinite().all()
    assert not y[:, :, 1].any()


def test_the_compiler_does_not_know_the_names():
    package = Path(zoo.__file__).parents[1]
    for room in ("language", "program", "schedule", "backends"):
        for file in (package / room).rglob("*.py"):
            if file.name != "zoo.py":
                text = file.read_text("utf-8")
                assert not [name for name in ZOO if f'"{name}"' in text], file
