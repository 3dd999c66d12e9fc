"""Batches: what a model is run on, taken from data or drawn, and looked at before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normc.analysis.draws import checked, gaussian
from normc.errors import NormcError, ShapeError
from normc.ops.grouping import Data


def batches(
    model: nn.Module, data: Data | None, shape: Sequence[int] | None, count: int, seed: int
) -> list[Tensor]:
    """At most ``count`` batches for a model: of the data, else unit Gaussian.

    They are on the device of its parameters, and in their dtype, but for whole numbers such as
    tokens. Raises `ShapeError` for a shape or a count that is none, without data and shape or with
    both; `NormcError` if the data hold no batches, empty ones, or numbers that are not finite.
    """
    if (data is None) == (shape is None):
        raise ShapeError("give either data or shape=(N, C, H, W), the shape of Gaussian batches")
    if data is not None:
        found = list(map(_first, taken(data, count)))
    else:
        size, chance = checked("shape", shape), torch.Generator().manual_seed(seed)
        found = [gaussian(size, chance, torch.float32) for _ in range(_positive(count))]
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return [_sound(x if like is None else _moved(x, like)) for x in found]


def taken(data: Data, count: int) -> list[Any]:
    """The first ``count`` batches of data as they come, read no further than these.

    Raises `NormcError` if there are none, or for ``(images, labels)``, which would be two.
    """
    _positive(count)
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, (Mapping, str)) or not hasattr(data, "__iter__"):
        raise _no_batches(data)
    rows = list(islice(data, count))
    if not rows:
        raise _no_batches()
    known = data if isinstance(data, (tuple, list)) else rows
    shown = {(x.dim(), x.is_floating_point()): _show(x) for x in known if isinstance(x, Tensor)}
    if len(shown) > 1:
        raise NormcError(
            f"batches of one kind are expected, not {' and '.join(shown.values())}: for images and "
            "labels pass [(images, labels)], or the images alone"
        )
    return rows


def _positive(count: int) -> int:
    if count < 1:
        raise ShapeError(f"batches={count}: at least 1 is needed")
    return count


def _first(row: Any) -> Tensor:
    """Of a tuple such as (images, labels) the first."""
    found = row[0] if isinstance(row, (tuple, list)) and row else row
    if not isinstance(found, Tensor):
        raise _no_batches(found)
    return found


def _moved(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like) if x.is_floating_point() else x.to(like.device)


def _sound(x: Tensor) -> Tensor:
    if x.dim() == 0 or x.numel() == 0:
        raise NormcError(f"a batch of shape {tuple(x.shape)} has no samples: give others")
    if x.is_floating_point() and not x.is_meta and not x.isfinite().all():
        raise NormcError(f"a batch has nan or infinite numbers in {dtype_name(x)}: give others")
    return x


def _no_batches(*found: Any) -> NormcError:
    what = "".join(f", but {type(one).__name__}" for one in found)
    return NormcError(
        f"the data hold no batches{what}: give a tensor, or an iterable of tensors or of tuples "
        "whose first is a tensor, such as (images, labels)"
    )


def _show(x: Tensor) -> str:
    return f"{tuple(x.shape)} {dtype_name(x)}"


def dtype_name(x: Tensor) -> str:
    """As float32."""
    return str(x.dtype).removeprefix("torch.")
