"""Draws: Gaussian tensors that depend on their shape and a seed, and the room to compute in.

What a caller has set for tensors of his own (no_grad, inference_mode, a device around, another
default dtype) says nothing about the layers that are measured here.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from normc.errors import ShapeError


@contextmanager
def undisturbed() -> Generator[None]:
    """Gradients can be taken and new tensors lie on the CPU, whatever stands around."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        yield


def gaussian(
    shape: Sequence[int], chance: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A unit Gaussian tensor on the CPU."""
    return torch.randn(tuple(shape), generator=chance, dtype=dtype, device="cpu")


def checked(name: str, shape: Any, least: int = 1) -> tuple[int, ...]:
    """A shape that was given as the argument ``name``; `ShapeError` if it is none."""
    found = tuple(shape) if isinstance(shape, Iterable) else ()
    if len(found) < least or not all(isinstance(n, Integral) and int(n) > 0 for n in found):
        example = "(N, C), (N, C, H, W)" if least > 1 else "(N, C, H, W)"
        raise ShapeError(
            f"{name}={shape!r}: give sizes that are whole numbers and at least 1, as {example}"
        )
    return found
