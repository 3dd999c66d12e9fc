"""Composite: a formula as plain torch operations, which torch.compile transforms by itself.

The door for torch.func under torch.compile: there no Function of ours can be traced with all its
rules, but the operations of a formula can. Statistics are computed in float32, and in float64 for
float64, as kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from normc.backends.memory import wide
from normc.backends.straight import Line, evaluate, straighten
from normc.formula import Formula
from normc.language.axes import ORDER, Axis
from normc.language.geometry import Geometry, Groups
from normc.ops.setting import Setting
from normc.pipeline import Mode, Steps, staged

Has = tuple[bool, bool, bool, bool]
"""Which of N, G, K and S a tensor has; the compiler does not trace sets of axes."""

Tables = tuple[tuple[Line, ...], tuple[tuple[str, Has], ...], tuple[tuple[int, Has], ...]]
"""Lines, inputs with their axes, and the places of outputs with theirs."""


@lru_cache(maxsize=256)
def tables(formula: Formula, mode: Mode, steps: Steps = ()) -> Tables:
    """The operations of a formula, or of what is derived from it."""
    source = staged(formula.definition, mode, steps)[0].source
    made = straighten(source)
    inputs = tuple((i.name, _has(i.axes)) for i in source.inputs)
    return made.lines, inputs, tuple((made.places[o.name], _has(o.axes)) for o in source.outputs)


def plainly(setting: Setting, eps: float, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All outputs of a setting by plain torch operations."""
    recipe, given = setting.recipe, dict(zip(setting.recipe.names, args, strict=True))
    made = tables(recipe.formula, recipe.mode, recipe.steps)
    given["x"] = args[recipe.full]  # x, or what has its shape
    return composite(made, given, setting.groups, setting.channel_dim, eps)


def _has(axes: Axis) -> Has:
    n, g, k, s = (bool(axis & axes) for axis in ORDER)
    return n, g, k, s


def composite(
    made: Tables, given: Mapping[str, Tensor], groups: Groups, channel_dim: int, eps: float
) -> tuple[Tensor, ...]:
    """The outputs of a formula, all of x's dtype but for statistics."""
    lines, inputs, outputs = made
    x = given["x"]
    geometry = Geometry.of(x.shape, groups, channel_dim)
    dtype = wide(x.dtype)
    known = {name: _view(given[name].to(dtype), has, geometry) for name, has in inputs}

    def new(value: float) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=dtype, device=x.device)

    values = evaluate(lines, known, (geometry.n, geometry.g, geometry.k, geometry.s), eps, new)
    return tuple([_output(values[i], has, geometry, x) for i, has in outputs])


def _sizes(has: Has, geometry: Geometry) -> list[int]:
    every = zip(has, (geometry.n, geometry.g, geometry.k, geometry.s), strict=True)
    return [size if there else 1 for there, size in every]


def _channels(has: Has, geometry: Geometry) -> tuple[int, int]:
    """Where a user's tensor has its channels, and where they are in the order N, C, spatial."""
    n, _, _, s = has
    before = (1 if n and geometry.channel_dim else 0) + max(geometry.channel_dim - 1, 0) * s
    return before, int(n)


def _view(tensor: Tensor, has: Has, geometry: Geometry) -> Tensor:
    """A user's tensor as (N, G, K, S) with size 1 where it lacks an axis."""
    if has[1] or has[2]:
        tensor = tensor.movedim(*_channels(has, geometry))
    return tensor.reshape(_sizes(has, geometry))


def _output(value: Tensor, has: Has, geometry: Geometry, x: Tensor) -> Tensor:
    n, g, k, s = has
    sizes = _sizes(has, geometry)
    whole = value.expand(sizes)
    channels = [sizes[1] * sizes[2]] if g or k else []
    whole = whole.reshape([*sizes[: int(n)], *channels, *(geometry.spatial if s else ())])
    if channels:
        there, here = _channels(has, geometry)
        whole = whole.movedim(here, there)
    return whole.to(x.dtype) if n and g and k and s else whole
