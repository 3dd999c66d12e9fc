"""Peers: the layers of the table as one writes them in torch, with torch's own functions where
there are some.

Each is a function of x and of the formula's parameters by name. Images are (N, C, H, W), tokens
(B, L, C) and the maps of `grn` (N, H, W, C). Epsilon is the zoo's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


def per_channel(*parameters: Tensor) -> list[Tensor]:
    """Parameters of shape (C,) as they broadcast over images."""
    return [p.view(1, -1, 1, 1) for p in parameters]


def group_std(x: Tensor) -> Tensor:
    """The deviation over the channels of a group and all positions, broadcast to groups of x."""
    n, c, h, w = x.shape
    grouped = x.reshape(n, GROUPS, c // GROUPS, h, w)
    std = (grouped.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt()
    return std.expand(grouped.shape).reshape(x.shape)


# --- tokens --------------------------------------------------------------------------------------


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, gamma.shape, gamma, beta, 1e-5)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.rms_norm(x, gamma.shape, gamma, 1e-6)


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, gamma.shape, gamma, 1e-6), h


def dyt(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * torch.tanh(alpha * x) + beta


# --- images --------------------------------------------------------------------------------------


def group_norm_silu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, gamma, beta, 1e-5))


def instance_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=1e-5)


def batch_norm_relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5))


def evonorm_s0(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    v, gamma, beta = per_channel(v, gamma, beta)
    return x * torch.sigmoid(v * x) / group_std(x) * gamma + beta


def evonorm_b0(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    v, gamma, beta = per_channel(v, gamma, beta)
    batch = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    instance = (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    return x / torch.maximum(batch, v * x + instance) * gamma + beta


def frn_tlu(x: Tensor, tau: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    tau, gamma, beta = per_channel(tau, gamma, beta)
    square = x.square().mean((2, 3), keepdim=True)
    return torch.maximum(gamma * (x * torch.rsqrt(square + 1e-5)) + beta, tau)


def searched(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    v, gamma, beta = per_channel(v, gamma, beta)
    return torch.tanh(x) * torch.sigmoid(v * x) / group_std(x) * gamma + beta


def grn(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    share = length / (length.mean(-1, keepdim=True) + 1e-6)
    return gamma * (x * share) + beta + x
