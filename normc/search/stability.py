"""Stability: whether weights near by make gradients explode.

The weights are moved to where the norm of the loss' gradient grows fastest, on one small batch: an
ascent on a first derivative, so the layer is differentiated twice. How the paper (arXiv 2004.02967)
ascends is not known; here each step changes the weights by a share of their own norm, so that a
layer cannot pass or fail by the scale of its gradients alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normc.search.setting import Stability


def worst_norm(net: nn.Module, images: Tensor, classes: Tensor, how: Stability) -> float:
    """The largest norm met on the way, infinite if it or its slope is not; ends above the limit."""
    net.train()
    weights = [p for p in net.parameters() if p.requires_grad]
    worst = 0.0
    for _ in range(how.steps):
        grads = torch.autograd.grad(
            F.cross_entropy(net(images), classes), weights, create_graph=True, allow_unused=True
        )
        norm = length(_there(grads))
        found = float(norm.detach())
        worst = max(worst, found) if math.isfinite(found) else math.inf
        if worst > how.limit:
            break
        if not norm.requires_grad:  # the loss is linear in the weights
            break
        uphill = torch.autograd.grad(norm, weights, allow_unused=True)
        if not _move(weights, uphill, how.rate):
            return math.inf
    return worst


def _there(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def length(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of several tensors taken as one vector."""
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


@torch.no_grad()
def _move(weights: Sequence[Tensor], uphill: Sequence[Tensor | None], rate: float) -> bool:
    """Along a direction, by a share of the weights' own norm; False if it is not finite."""
    known = [(w, u) for w, u in zip(weights, uphill, strict=True) if u is not None]
    steep = length([u for _, u in known])
    if not steep.isfinite():
        return False
    size = rate * length(weights) / steep if steep else 0.0
    for weight, up in known:
        weight += size * up
    return True
