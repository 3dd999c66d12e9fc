"""Batching: one call over a batch of calls, for torch.func.vmap.

Where no statistic crosses samples the batch joins them: N then counts both, and what has no samples
(a parameter) gains them if the batch varies over it. A single sample is crossed by nothing, so this
also serves the gradients of single samples. What is left is computed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normc.language.axes import Axis
from normc.language.geometry import Geometry
from normc.ops.setting import Setting
from normc.program.steps import crosses

Enter = Callable[[Setting, Sequence[Tensor]], Sequence[Tensor]]
Dims = Sequence[int | None]
Outs = tuple[tuple[Tensor, ...], tuple[int | None, ...]]
"""The outputs, and where the batch is in each."""


@dataclass(frozen=True)
class Batched:
    """A call with a batch of ``size`` along one dimension of some of its tensors."""

    setting: Setting
    size: int
    dims: Dims  # of each tensor, where its batch is
    args: Sequence[Tensor]

    def run(self, enter: Enter) -> Outs:
        """All outputs of the batch."""
        geometry = self.setting.geometry(self._first())
        if geometry.n == 1 or not crosses(self.setting.recipe.stage.source):
            return self._joined(geometry, enter)
        if not self.size:  # a batch of nothing still has a shape
            outs = enter(self.setting, self._first())
            return tuple(t.new_empty((0, *t.shape)) for t in outs), (0,) * len(outs)
        outs, dims = one_by_one(
            self.size, self.dims, self.args, lambda given: enter(self.setting, given)
        )
        return tuple(outs), tuple(dims)

    def _first(self) -> list[Tensor]:
        """Tensors of the shapes that one call of the batch has."""
        if self.size:
            return _at(0, self.dims, self.args)
        both = zip(self.args, self.dims, strict=True)
        return [t if d is None else t.new_zeros([*t.shape[:d], *t.shape[d + 1 :]]) for t, d in both]

    def _joined(self, geometry: Geometry, enter: Enter) -> Outs:
        recipe = self.setting.recipe
        names = recipe.names
        gain = [n for n, d in zip(names, self.dims, strict=True) if d is not None]
        gain = [n for n in gain if not recipe.axes[n] & Axis.N]
        one = self.setting.then("vmap", gain, names)
        found = enter(one, [self._joint(i, geometry) for i in range(len(names))])
        axes = zip(found, recipe.outputs.values(), one.recipe.outputs.values(), strict=True)
        apart = [self._apart(t, before, now, geometry) for t, before, now in axes]
        outs, dims = zip(*apart, strict=True)
        return outs, dims

    def _joint(self, i: int, geometry: Geometry) -> Tensor:
        """A tensor whose dimension of samples counts the batch too; itself if it has neither."""
        tensor, dim = self.args[i], self.dims[i]
        axes = self.setting.recipe.axes[self.setting.recipe.names[i]]
        if dim is None and not axes & Axis.N:
            return tensor
        batched = tensor.unsqueeze(0).expand(self.size, *tensor.shape) if dim is None else None
        whole = tensor.movedim(dim, 0) if batched is None and dim is not None else batched
        assert whole is not None
        place = _samples(axes, geometry)
        if not axes & Axis.N:
            whole = whole.unsqueeze(place + 1)
            whole = whole.expand(
                *(geometry.n if d == place + 1 else -1 for d in range(whole.dim()))
            )
        return whole.movedim(0, place).flatten(place, place + 1)

    def _apart(self, out: Tensor, before: Axis, now: Axis, geometry: Geometry) -> tuple[Any, Any]:
        """An output with a dimension for the batch, and where that is; none if it does not vary."""
        if not now & Axis.N:
            return out, None
        place = _samples(before, geometry)
        whole = out.unflatten(place, (self.size, geometry.n))
        return (whole if before & Axis.N else whole.squeeze(place + 1)), place


def one_by_one(
    size: int, dims: Dims, args: Sequence[Tensor], call: Callable[[list[Tensor]], Sequence[Tensor]]
) -> tuple[list[Tensor], list[int | None]]:
    """A batch as so many calls: right whatever the call does with its tensors."""
    each = [call(_at(i, dims, args)) for i in range(size)]
    outs = [torch.stack(list(some)) for some in zip(*each, strict=True)]
    return outs, [0] * len(outs)


def _at(i: int, dims: Dims, args: Sequence[Tensor]) -> list[Tensor]:
    both = zip(args, dims, strict=True)
    return [t if d is None else t.select(d, i) for t, d in both]


def _samples(axes: Axis, geometry: Geometry) -> int:
    """Where the dimension of samples is, or would be, in a user's tensor over ``axes``."""
    dims = geometry.dims(axes | Axis.N)
    return sorted(dims).index(dims[0])
