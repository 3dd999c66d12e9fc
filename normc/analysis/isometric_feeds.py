"""What feeds the norms of a model, as `normc.analysis.isometric` asks for its unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import (
    _ConvNd,  # pyright: ignore[reportPrivateUsage]
    _ConvTransposeNd,  # pyright: ignore[reportPrivateUsage]
)

from normc.analysis.trace import Watch
from normc.ops.layer import Layer
from normc.ops.replace import NORMS

Sizes = tuple[int, int, int, int, int]
"""fan_in, fan_out, kernel, stride, size."""

_NORMS = (*NORMS, Layer)


class Feeds(Watch):
    """Notes the sizes of what feeds each norm, at its first call."""

    way_out = f"{Watch.way_out}, or give replace_norms groups as a mapping from paths to numbers"

    def __init__(self, model: nn.Module, largest: int) -> None:
        super().__init__(model)
        self.largest = largest
        self.found: dict[str, Sizes] = {}

    def entered(self, name: str, args: Sequence[Any]) -> None:
        norm = self.model.get_submodule(name)
        trail = self.trail(args[0]) if isinstance(norm, _NORMS) and args else None
        if trail is None or trail.fed is None or name in self.found:
            return
        feeder = self.model.get_submodule(trail.fed)
        if isinstance(feeder, nn.MultiheadAttention):
            feeder = feeder.out_proj  # it is not called itself, only its weight is used
        sizes = sizes_of(feeder, args[0], self.largest)
        if sizes is not None and sizes[1] == _channels(norm):
            self.found[name] = sizes


def sizes_of(feeder: nn.Module, x: Tensor | None, largest: int) -> Sizes | None:
    """What is asked of `isometric_groups` behind a module, and None where it cannot be asked.

    Maps are as large as x, which the module made; without one no smaller than ``largest``, and
    a linear layer has no positions.
    """
    if isinstance(feeder, nn.Linear):
        positions = 1 if x is None else math.isqrt(math.prod(x.shape[1:-1]))
        return feeder.in_features, feeder.out_features, 1, 1, max(1, min(largest, positions))
    if not isinstance(feeder, _ConvNd) or isinstance(feeder, _ConvTransposeNd):
        return None
    area: float = math.prod(feeder.kernel_size) ** (1 / len(feeder.kernel_size))
    kernel, stride = round(area), max(feeder.stride)
    seen = largest if x is None else min(x.shape[2:], default=1) * stride  # may have been pooled
    size = max(kernel, min(largest, seen))
    return feeder.in_channels, feeder.out_channels, kernel, stride, -(-size // stride) * stride


def _channels(norm: nn.Module) -> int:
    """The channels of a norm, 0 where it normalizes several dimensions."""
    shape: Any = getattr(norm, "normalized_shape", None)
    if shape is not None:
        return shape[0] if len(shape) == 1 else 0
    return getattr(norm, "num_features", 0) or getattr(norm, "num_channels", 0)
