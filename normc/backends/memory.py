"""Memory: tensors seen over (N, G, K, S), and the allocation of what a job stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.geometry import Geometry
from normc.program.program import Program

Strides = tuple[int, int, int, int]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of tensors of a dtype are computed and kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strides_of(tensor: Tensor, axes: Axis, geometry: Geometry) -> Strides | None:
    """The strides of a user's tensor over (N, G, K, S), 0 for axes it lacks.

    None where its spatial dimensions are no single stride apart: then it has to be copied.
    """
    if axes & CHANNEL not in (CHANNEL, Axis(0)):
        return dense_strides(axes, geometry)
    by_dim = dict(zip(sorted(geometry.dims(axes)), tensor.stride(), strict=True))
    order = [by_dim[d] for d in geometry.dims(axes)]
    n = order.pop(0) if axes & Axis.N else 0
    c = order.pop(0) if axes & CHANNEL else 0
    s = _one_stride(geometry.spatial, order) if axes & Axis.S else 0
    return None if s is None else (n, c * geometry.k, c, s)


def _one_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride at which dimensions of these sizes can be walked as one, if there is one."""
    real = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    if not real:
        return 1
    if any(size == 0 for size, _ in real):
        return 1
    for (_, outer), (size, inner) in zip(real, real[1:], strict=False):
        if outer != size * inner:
            return None
    return real[-1][1]


def dense_strides(axes: Axis, geometry: Geometry) -> Strides:
    """The strides of a statistic: contiguous over its axes in the order N, G, K, S."""
    sizes = geometry.sizes(axes)
    steps = [prod(sizes[i + 1 :]) for i in range(4)]
    n, g, k, s = (step if axis & axes else 0 for axis, step in zip(Axis, steps, strict=True))
    return n, g, k, s


def view(tensor: Tensor, axes: Axis, geometry: Geometry) -> Tensor:
    """A user's tensor as (N, G, K, S) with size 1 where it lacks an axis; copies if it must."""
    unfolded = tensor.permute(geometry.to_unfolded(axes))
    return unfolded.reshape(geometry.sizes(axes))


def unview(tensor: Tensor, axes: Axis, geometry: Geometry) -> Tensor:
    """The inverse of `view`: back to the user's dimensions."""
    return tensor.reshape(geometry.unfolded(axes)).permute(geometry.from_unfolded(axes))


def walkable(tensor: Tensor, axes: Axis, geometry: Geometry) -> Tensor:
    """The tensor itself, or a dense copy where one stride cannot walk its spatial dimensions."""
    if strides_of(tensor, axes, geometry) is not None:
        return tensor
    unfolded = tensor.permute(geometry.to_unfolded(axes))
    return unfolded.contiguous().permute(geometry.from_unfolded(axes))


@lru_cache(maxsize=4096)
def result_strides(stride: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """The strides of a result for an x of these: x's memory format if it can be walked."""
    x = torch.empty_strided(geometry.shape_of(), stride, device="meta")
    return walkable(torch.empty_like(x), FULL, geometry).stride()


def empty(axes: Axis, geometry: Geometry, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for an output over ``axes`` in the user's shape; a full one keeps x's memory format."""
    if axes is FULL or axes == FULL:
        strides = result_strides(like.stride(), geometry)
        return torch.empty_strided(like.shape, strides, dtype=dtype, device=like.device)
    return torch.empty(geometry.shape_of(axes), dtype=dtype, device=like.device)


def full_input(program: Program, tensors: Mapping[str, Tensor]) -> Tensor:
    """A full-size input, whose dtype, device and memory format the outputs take over."""
    if "x" in tensors:
        return tensors["x"]
    full = [tensors[i.name] for i in program.inputs if i.axes == FULL]
    return full[0] if full else next(iter(tensors.values()))
