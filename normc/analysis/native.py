"""Native: the formulas for which torch has a function of its own, to compare with.

A row is found by the canonical form, so a formula is recognized however it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from normc.analysis.agreement import Case
from normc.errors import NormcError
from normc.formula import Formula, zoo

Call = Callable[..., Tensor | tuple[Tensor, ...]]
"""A layer as a function of its tensors by name: x, inputs and parameters."""


@dataclass(frozen=True)
class Native:
    """A formula of the zoo in torch's own operations."""

    name: str  # what torch calls it
    channels: Literal["first", "last"]  # where it expects them: dimension 1, or the last
    run: Callable[..., Tensor]  # (x, groups, eps, parameters...) -> y


def _layer_norm(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, gamma.shape, gamma, beta, eps)


def _whole_norm(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(x, 1, gamma, beta, eps)


def _rms_norm(x: Tensor, groups: int, eps: float, gamma: Tensor) -> Tensor:
    return F.rms_norm(x, gamma.shape, gamma, eps)


def _group_norm(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(x, groups, gamma, beta, eps)


def _group_norm_silu(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, gamma, beta, eps))


def _instance_norm(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=eps)


def _batch_norm(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)


def _batch_norm_relu(x: Tensor, groups: int, eps: float, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps))


NATIVE = {
    "layer_norm": Native("group_norm, one group", "first", _whole_norm),
    "layer_norm_tokens": Native("layer_norm", "last", _layer_norm),
    "rms_norm": Native("rms_norm", "last", _rms_norm),
    "group_norm": Native("group_norm", "first", _group_norm),
    "gn_silu": Native("group_norm, silu", "first", _group_norm_silu),
    "instance_norm": Native("instance_norm", "first", _instance_norm),
    "batch_norm": Native("batch_norm", "first", _batch_norm),
    "bn_relu": Native("batch_norm, relu", "first", _batch_norm_relu),
}
"""By the name in the zoo."""


def native(formula: Formula, case: Case, eps: float) -> Call:
    """Torch's own function for a formula, or for one that is equal to it.

    Raises `NormcError` where there is none, or none for channels in this place.
    """
    found = _by_digest().get(formula.canonical().digest)
    if found is None:
        raise NormcError("torch has no function of its own for this formula")
    geometry = case.geometry
    if geometry.channel_dim != (1 if found.channels == "first" else geometry.rank - 1):
        raise NormcError(f"torch's {found.name} wants the channels {found.channels}")
    return partial(found.run, groups=geometry.g, eps=eps)


@lru_cache(maxsize=1)
def _by_digest() -> dict[str, Native]:
    return {zoo[name].canonical().digest: row for name, row in NATIVE.items()}
