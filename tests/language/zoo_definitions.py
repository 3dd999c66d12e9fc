"""Every layer of the zoo written straight in torch, for tests; long because the zoo is.

A definition sees x as (N, C, L), parameters as (1, C, 1), and inputs per sample and channel as
(N, C, 1), per channel as (1, C, 1), per sample as (N, 1, 1); besides the number of groups and eps.
It shares nothing with the zoo's text: it is torch's own function where there is one, else the
authors' code or the paper's formula.
"""

import math

import torch
import torch.nn.functional as F


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


def batch_channel_norm(x, groups, eps, t):
    first = batch_norm(x, eps) * t["gamma"] + t["beta"]
    return F.group_norm(first, groups, eps=eps) * t["gain"] + t["bias"]


def batch_renorm(x, groups, eps, t):
    """The paper's algorithm 1, with r and d computed outside."""
    normed = (x - mean(x, 0, 2)) / torch.sqrt(var(x, 0, 2) + eps)
    return t["gamma"] * (normed * t["r"] + t["d"]) + t["beta"]


def divisive_norm(x, groups, eps, t):
    v = x - mean(x, 1)
    return t["gamma"] * v * torch.rsqrt(mean(v**2, 1, 2) + eps) + t["beta"]


def layer_norm_scaling(x, groups, eps, t):
    normed = over_channels(F.layer_norm, x, eps=eps) * t["gamma"] + t["beta"]
    return normed * t["depth"].pow(-0.5)


def add_layer_norm(x, groups, eps, t):
    total = x + t["residual"]
    return over_channels(F.layer_norm, total, eps=eps) * t["gamma"] + t["beta"], total


def peri_norm(x, groups, eps, t):
    total = t["residual"] + over_channels(F.rms_norm, x, eps=eps) * t["gain"]
    return over_channels(F.rms_norm, total, eps=eps) * t["gamma"], total


def bn_add_relu(x, groups, eps, t):
    return F.relu(batch_norm(x, eps) * t["gamma"] + t["beta"] + t["residual"])


def dyisru(x, groups, eps, t):
    return t["gamma"] * math.sqrt(x.shape[1]) * x * torch.rsqrt(t["b"] + x**2) + t["beta"]


def unit_length(weight):
    return F.normalize(weight.flatten(1), eps=0).reshape(weight.shape)


def centred_weight_norm(x, groups, eps, t):
    return t["g"] * unit_length(x - mean(x, 1, 2))


def weight_standardization(x, groups, eps, t):
    deviation, centre = torch.std_mean(x, (1, 2), keepdim=True, correction=0)
    return (x - centre) / (deviation + eps)


def scaled_weight_standardization(x, groups, eps, t):
    """As in deepmind's nfnets: the floor is under the variance times the fan-in."""
    fan_in = x.shape[1] * x.shape[2]
    scale = torch.rsqrt(torch.clamp(var(x, 1, 2) * fan_in, min=eps)) * t["gain"]
    return x * scale - mean(x, 1, 2) * scale


def demodulation(x, groups, eps, t):
    scaled = t["style"] * x
    return scaled * torch.rsqrt((scaled**2).sum((1, 2), keepdim=True) + eps)


def powered(u, exponent):
    """A power of the size of u, whose slope at 0 is taken as 0."""
    return (u.abs().masked_fill(u == 0, 1) ** exponent).masked_fill(u == 0, 0)


POINTWISE = {
    "arctan": lambda u: 2 / torch.pi * torch.atan(u),
    "cubsign": lambda u: u**3 / (torch.abs(u) ** 3 + 1),
    "exproot": lambda u: torch.sign(u) * (1 - torch.exp(-powered(u, 1 / 2))),
    "expsign": lambda u: -torch.sign(u) * (torch.exp(-torch.abs(u)) - 1),
    "isru": lambda u: u / torch.sqrt(u**2 + 1),
    "linear_clip": F.hardtanh,
    "logquad_clip": lambda u: torch.clip(torch.sign(u) * torch.log(u**2 + 1), -1, 1),
    "logsign_clip": lambda u: torch.clip(torch.sign(u) * torch.log(torch.abs(u) + 1), -1, 1),
    "power23_clip": lambda u: torch.clip(torch.sign(u) * powered(u, 2 / 3), -1, 1),
    "relsign": lambda u: u / (torch.sqrt(u**2 + 1) + 1),
    "saturlog": lambda u: torch.sign(u) * (1 - 1 / (torch.log(torch.abs(u) + 1) + 1)),
    "satursin": lambda u: torch.sin(torch.clip(u, -torch.pi / 2, torch.pi / 2)),
    "smoothsign": F.softsign,
}
"""The functions of the Derf study, of u alone."""


def pointwise(function):
    return lambda x, groups, eps, t: t["gamma"] * function(t["alpha"] * x + t["shift"]) + t["beta"]


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
    "layer_norm_scaling": layer_norm_scaling,
    "batch_renorm": batch_renorm,
    "batch_channel_norm": batch_channel_norm,
    "divisive_norm": divisive_norm,
    "pono": lambda x, g, eps, t: (x - mean(x, 1)) / torch.sqrt(var(x, 1) + eps),
    "simple_rms_norm": lambda x, g, eps, t: (
        x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * x.shape[1] ** -0.5 + eps)
    ),
    "l2_norm": lambda x, g, eps, t: t["gamma"] * (x / (x.pow(2).sum(1, keepdim=True).sqrt() + eps)),
    "gn_relu": lambda x, g, eps, t: F.relu(F.group_norm(x, g, eps=eps) * t["gamma"] + t["beta"]),
    "bn_silu": lambda x, g, eps, t: F.silu(batch_norm(x, eps) * t["gamma"] + t["beta"]),
    "bn_add_relu": bn_add_relu,
    "ln_gelu": lambda x, g, eps, t: F.gelu(
        over_channels(F.layer_norm, x, eps=eps) * t["gamma"] + t["beta"]
    ),
    "rms_silu": lambda x, g, eps, t: F.silu(
        F.normalize(x, dim=1, eps=eps) * x.shape[1] ** 0.5 * t["gamma"]
    ),
    **{f"pointwise_{name}": pointwise(function) for name, function in POINTWISE.items()},
    "dyisru": dyisru,
    "tlu": lambda x, g, eps, t: torch.maximum(x, t["tau"]),
    "add_layer_norm": add_layer_norm,
    "peri_norm": peri_norm,
    "film": lambda x, g, eps, t: t["scale"] * x + t["shift"],
    "weight_norm": lambda x, g, eps, t: t["g"] * unit_length(x),
    "centred_weight_norm": centred_weight_norm,
    "weight_standardization": weight_standardization,
    "scaled_weight_standardization": scaled_weight_standardization,
    "demodulation": demodulation,
}
