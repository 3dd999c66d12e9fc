"""Windows: where a convolution looks at an image, and what is seen there.

A window is all channels of the kh x kw pixels that a convolution sees at one place, padded zeros
among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from normc.errors import ShapeError
from normc.nn.checks import whole_ones

Pair = int | tuple[int, int]
"""One number for rows and columns, or (rows, columns)."""
Padding = int | tuple[int, int] | tuple[int, int, int, int]
"""One number, (left and right, top and bottom), or (left, right, top, bottom)."""
Sides = tuple[int, int, int, int]
"""Zeros at the left, right, top and bottom."""


@dataclass(frozen=True)
class Windows:
    """Where windows lie in an image: sizes and steps along height and width, and the zeros."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Sides

    @staticmethod
    def of(kernel_size: Pair, stride: Pair, padding: Padding) -> Windows:
        """The windows of a layer's arguments; `NormcError` where there are none like that.

        >>> Windows.of(3, (2, 1), (1, 0)).padding
        (1, 1, 0, 0)
        """
        sizes, steps = pair("kernel_size", kernel_size), pair("stride", stride)
        return Windows(sizes, steps, _sides(padding))

    def count(self, x: Tensor) -> tuple[int, int]:
        """How many there are along height and width of x (N, C, H, W), else `ShapeError`."""
        if x.dim() != 4:
            raise ShapeError(f"x must be (N, C, H, W), not of shape {tuple(x.shape)}")
        left, right, top, bottom = self.padding
        (kh, kw), (sh, sw) = self.kernel, self.stride
        height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
        if height < kh or width < kw:
            raise ShapeError(
                f"a window of {kh} x {kw} does not fit into x, which is {height} x {width} with "
                "its padding: use a smaller kernel or more padding"
            )
        return (height - kh) // sh + 1, (width - kw) // sw + 1

    def unfolded(self, x: Tensor) -> Tensor:
        """All windows of x (N, C, H, W), as (N, C*kh*kw, how many)."""
        return F.unfold(F.pad(x, self.padding), self.kernel, stride=self.stride)

    def __str__(self) -> str:
        return f"{self.kernel}, stride={self.stride}, padding={self.padding}"


def pair(name: str, value: Pair, least: int = 1, told: str = "(rows, columns)") -> tuple[int, int]:
    """The same number twice, or two numbers as they are; else `NormcError`, which names them."""
    first, second = whole_ones(name, value, (2,), least, f"one whole number or two {told}")
    return first, second


def _sides(padding: Padding) -> Sides:
    told = (
        "one whole number, two (left and right, top and bottom) or four (left, right, top, bottom)"
    )
    given = whole_ones("padding", padding, (2, 4), 0, told)
    left, right, top, bottom = given if len(given) == 4 else (*given[:1] * 2, *given[1:] * 2)
    return left, right, top, bottom
