"""Target: which kernels the tensors of a call need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from normc import config
from normc.backends import contract
from normc.backends.memory import result_strides, strides_of, walkable
from normc.errors import BackendError
from normc.formula import Formula
from normc.language.axes import FULL, ORDER, Axis
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Geometry
from normc.pipeline import Target
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

FEW, MANY = 8, 2**20
"""With fewer reductions over more elements than these, each is shared among instances.

Constants, no matter how many threads there are, so that results do not depend on that.
"""


def target_of(
    formula: Formula, wanted: str, x: Tensor, full: Sequence[Tensor], geometry: Geometry
) -> Target:
    """The backend, storage type, memory order and schedule for x and other full-size tensors."""
    dtype = str(x.dtype).removeprefix("torch.")
    backend = choose(wanted, dtype, x.device.type)
    order = order_of(x, geometry)
    unit = _unit(x, full, geometry, order)
    return Target(backend, dtype, order, unit, _splits(backend, formula, geometry))


def target_ahead(
    formula: Formula, backend: str, dtype: str, geometry: Geometry, order: tuple[Axis, ...]
) -> Target:
    """The target for tensors that are not here, whether or not the backend runs here.

    They are dense in this order of their axes.
    """
    return Target(backend, dtype, order, True, _splits(backend, formula, geometry))


def _splits(backend: str, formula: Formula, geometry: Geometry) -> bool:
    """Whether reductions are few and large, and the backend needs a plan that shares them."""
    if contract.find(backend).able.share:
        return False
    return geometry.count(FULL) >= MANY and _reductions(formula, geometry) < FEW


def _reductions(formula: Formula, geometry: Geometry) -> int:
    """How often the statistic over most axes is taken; `FEW` where there is none."""
    nodes = postorder(formula.definition.results)
    kept = [e.axes for e in nodes if isinstance(e, Reduce)]
    return min((geometry.count(axes) for axes in kept), default=FEW)


def choose(wanted: str, dtype: str, device: str) -> str:
    """The backend for tensors of a dtype and device: the wanted one, or the best that can run."""
    wanted = config.backend() if wanted == "auto" else wanted
    if wanted != "auto":
        reason = contract.find(wanted).why_not(dtype, device)
        if reason:
            raise BackendError(reason)
        return wanted
    first = "c" if device == "cpu" else "triton"
    return first if not _why_not(first, dtype, device) else "torch"


@lru_cache(maxsize=64)
def _why_not(backend: str, dtype: str, device: str) -> str:
    return contract.find(backend).why_not(dtype, device)


def order_of(x: Tensor, geometry: Geometry) -> tuple[Axis, ...]:
    """The order of x's axes in memory: whether channels or positions are closer together."""
    here = torch.empty_strided(x.shape, x.stride(), device="meta")
    steps = strides_of(walkable(here, FULL, geometry), FULL, geometry)
    assert steps is not None, "walkable tensors have strides"
    last = geometry.s == 1 or (geometry.channels > 1 and steps[2] < steps[3])
    return CHANNELS_LAST if last else CHANNELS_FIRST


def _unit(x: Tensor, full: Sequence[Tensor], geometry: Geometry, order: tuple[Axis, ...]) -> bool:
    """Whether the innermost axis has stride 1 in every full-size tensor, results included."""
    inner = ORDER.index(order[-1])
    result = torch.empty_strided(x.shape, result_strides(x.stride(), geometry), device="meta")
    every = [strides_of(t, FULL, geometry) for t in (result, x, *full)]
    return all(steps is not None and steps[inner] == 1 for steps in every)
