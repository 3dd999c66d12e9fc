"""Geometry: the sizes of one call, and the checks that its tensors fit the formula.

    Geometry ::= (n, g, k, s, channel_dim, spatial)        x seen as (N, G, K, S)

The caller names the channel dimension of x; the sample is the first of the other dimensions, and
what is left, in x's order, is space. A tensor over fewer axes has x's shape without the missing
dimensions. Only shapes are looked at here: a tensor is the few attributes of `TensorLike`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

from normc.errors import ShapeError, nearest
from normc.language.axes import CHANNEL, FULL, NONE, ORDER, Axis, spell
from normc.language.definition import Definition, Input, Param

Groups = int | Literal["auto"]

MOST_GROUPS = 32
"""What ``groups="auto"`` does not exceed: the group count of GroupNorm and of EvoNorm-S0."""

RANKS = range(2, 6)


class TensorLike(Protocol):
    """What a check needs to know of a tensor; any array library's tensor will do."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def is_floating_point(self) -> bool: ...


@dataclass(frozen=True)
class Geometry:
    """x's sizes over the four axes, and where its channels and its spatial dimensions are."""

    n: int
    g: int
    k: int
    s: int
    channel_dim: int  # never negative
    spatial: tuple[int, ...]  # the sizes whose product is s

    @staticmethod
    def of(shape: Sequence[int], groups: Groups = "auto", channel_dim: int = 1) -> Geometry:
        """The geometry of an x of this shape.

        Raises `ShapeError` for a rank outside 2..5, a ``channel_dim`` that x does not have, and a
        group count that does not divide the channels.
        """
        if len(shape) not in RANKS:
            raise ShapeError(
                f"x must have 2 to 5 dimensions, not {len(shape)}: shape {_show(shape)}"
            )
        dim = _channel_dim(shape, channel_dim)
        n, *spatial = (size for d, size in enumerate(shape) if d != dim)
        g = _groups(shape, dim, groups)
        return Geometry(n, g, shape[dim] // g, prod(spatial), dim, tuple(spatial))

    @property
    def channels(self) -> int:
        """C, the size of the channel dimension."""
        return self.g * self.k

    @property
    def rank(self) -> int:
        """The number of dimensions of x."""
        return 2 + len(self.spatial)

    def sizes(self, axes: Axis = FULL) -> tuple[int, ...]:
        """The sizes over (N, G, K, S), 1 for an axis not in ``axes``: the shape of the 4-D view."""
        every = (self.n, self.g, self.k, self.s)
        return tuple(size if axis & axes else 1 for axis, size in zip(ORDER, every, strict=True))

    def count(self, axes: Axis) -> int:
        """The number of elements over ``axes``."""
        return prod(self.sizes(axes))

    def dims(self, axes: Axis = FULL) -> tuple[int, ...]:
        """Which dimensions of x a tensor over ``axes`` has, in the order N, C, spatial."""
        channel = self.channel_dim
        n, *spatial = (d for d in range(self.rank) if d != channel)
        return (
            *((n,) if axes & Axis.N else ()),
            *((channel,) if axes & CHANNEL else ()),
            *(spatial if axes & Axis.S else ()),
        )

    def unfolded(self, axes: Axis = FULL) -> tuple[int, ...]:
        """The sizes of the dimensions `dims`: (N, C, spatial...) without what ``axes`` lacks.

        G alone counts the groups and K alone the channels of one group.
        """
        return (
            *((self.n,) if axes & Axis.N else ()),
            *((self.count(axes & CHANNEL),) if axes & CHANNEL else ()),
            *(self.spatial if axes & Axis.S else ()),
        )

    def shape_of(self, axes: Axis = FULL) -> tuple[int, ...]:
        """The shape of a user's tensor over ``axes``: x's, without the missing dimensions."""
        by_dim = zip(self.dims(axes), self.unfolded(axes), strict=True)
        return tuple(size for _, size in sorted(by_dim))

    def to_unfolded(self, axes: Axis = FULL) -> tuple[int, ...]:
        """The permutation of a user's tensor over ``axes`` that brings it to N, C, spatial."""
        dims = self.dims(axes)
        return tuple(sorted(dims).index(d) for d in dims)

    def from_unfolded(self, axes: Axis = FULL) -> tuple[int, ...]:
        """The permutation of a tensor in the order N, C, spatial back to the user's order."""
        dims = self.dims(axes)
        return tuple(dims.index(d) for d in sorted(dims))


def auto_groups(channels: int) -> int:
    """The largest divisor of the channel count not above 32.

    >>> auto_groups(64), auto_groups(48), auto_groups(37), auto_groups(7)
    (32, 24, 1, 7)
    """
    most = min(MOST_GROUPS, channels)
    return max((d for d in range(1, most + 1) if channels % d == 0), default=1)


def check(
    definition: Definition,
    x: TensorLike,
    tensors: Mapping[str, TensorLike],
    groups: Groups = "auto",
    channel_dim: int = 1,
) -> Geometry:
    """The geometry of a call, once x and every tensor given by name are found to fit.

    A parameter may be missing (it keeps its initial value), an input may not. Raises `ShapeError`,
    naming the tensor and the way out, for whatever does not fit.
    """
    check_floating("x", x)
    geometry = Geometry.of(x.shape, groups, channel_dim)
    check_names(definition, tensors)
    for row in (*definition.params, *definition.inputs):
        if row.name in tensors:
            check_tensor(row, tensors[row.name], geometry, x.device)
    return geometry


def check_names(definition: Definition, given: Iterable[str]) -> None:
    """Raise `ShapeError` unless every input is given and every name given is known."""
    names = set(given)
    known = [row.name for row in (*definition.params, *definition.inputs)]
    for name in sorted(names.difference(known)):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ShapeError(f"the formula has no tensor `{name}`{nearest(name, known)}: {takes}")
    for row in definition.inputs:
        if row.name not in names:
            raise ShapeError(f"the input `{declared(row)}` is missing: pass {row.name}=...")


def check_tensor(row: Param | Input, tensor: TensorLike, geometry: Geometry, device: Any) -> None:
    """Raise `ShapeError` unless a tensor has its declared shape, a real dtype and x's device."""
    check_floating(row.name, tensor)
    want = geometry.shape_of(row.axes)
    if tuple(tensor.shape) != want:
        raise ShapeError(
            f"`{declared(row)}` must have shape {_show(want)} "
            f"for an x of shape {_show(geometry.shape_of())}, not {_show(tensor.shape)}"
        )
    if tensor.device != device:
        raise ShapeError(
            f"`{row.name}` is on {tensor.device} and x on {device}: move it with .to(x.device)"
        )


def check_floating(name: str, tensor: TensorLike) -> None:
    """Raise `ShapeError` unless the tensor holds real floating-point numbers."""
    if not tensor.is_floating_point():
        raise ShapeError(f"`{name}` must be floating point, not {tensor.dtype}: convert it first")


def declared(row: Param | Input) -> str:
    """A tensor as it is declared: ``scale[n,c]``, or just its name for a scalar or a full input."""
    return row.name if row.axes in (FULL, NONE) else f"{row.name}[{spell(row.axes)}]"


def _channel_dim(shape: Sequence[int], channel_dim: int) -> int:
    rank = len(shape)
    if not -rank <= channel_dim < rank:
        raise ShapeError(
            f"channel_dim={channel_dim} is not a dimension of x, which has {rank} "
            f"(shape {_show(shape)}): use {-rank} to {rank - 1}"
        )
    return channel_dim % rank


def _groups(shape: Sequence[int], dim: int, groups: Groups) -> int:
    channels = shape[dim]
    if groups == "auto":
        return auto_groups(channels)
    if not isinstance(groups, int) or groups < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ShapeError(f'groups must be a positive whole number or "auto", not {groups!r}')
    if channels % groups:
        fits = max(d for d in range(1, min(groups, channels) + 1) if channels % d == 0)
        raise ShapeError(
            f"groups={groups} does not divide the {channels} channels of x "
            f'(dimension {dim} of shape {_show(shape)}): use groups={fits} or "auto"'
        )
    return groups


def _show(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
