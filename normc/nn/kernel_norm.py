"""Kernel normalization: each window of an image has a mean and a variance of its own.

Nasirigerdeh et al., *Kernel Normalized Convolutional Networks*, arXiv 2205.10089.

    window      all channels of the kh x kw pixels that a convolution sees at one place, padded
                zeros among them
    normalize   y = (x - mean(d))/sqrt(var(d) + eps) within each, nothing learned; d is the window
                with dropped elements, and what is normalized is the window as it is
    lay out     windows side by side without overlap: what follows is a convolution whose stride is
                its kernel

`KernelNorm2d` and `KernelNorm1d` write every window out, kh*kw times the memory of x where windows
are one pixel apart; `normc.nn.kn_conv` computes the same with the convolution, without that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normc.backends.memory import wide
from normc.errors import NormcError, ShapeError
from normc.ops.op import compile

if TYPE_CHECKING:
    from normc.pipeline import Mode

Pair = int | tuple[int, int]
"""One number for rows and columns, or (rows, columns)."""
Padding = int | tuple[int, int] | tuple[int, int, int, int]
"""One number, (left and right, top and bottom), or (left, right, top, bottom)."""
Sides = tuple[int, int, int, int]
"""Zeros at the left, right, top and bottom."""

NORM = "(x - channel_mean({0}))/channel_std({0})"
"""A window is a position of the unfolded tensor, its elements the channels there."""

DROP = "input r; param p = 0; d = where(r < p, 0, x/(1 - p)); "
"""The copy: r is drawn evenly from 0 to 1, and what is below p is dropped."""


@dataclass(frozen=True)
class Windows:
    """Where windows lie in an image: sizes and steps along height and width, and the zeros."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Sides

    @staticmethod
    def of(kernel: Pair, stride: Pair, padding: Padding) -> Windows:
        """The windows of a layer's arguments; `NormcError` where there are none like that.

        >>> Windows.of(3, (2, 1), (1, 0)).padding
        (1, 1, 0, 0)
        """
        sizes, steps = pair(kernel), pair(stride)
        if min(*sizes, *steps) < 1:
            raise NormcError(f"kernel {kernel} and stride {stride}: expected numbers from 1 on")
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


def pair(value: Pair) -> tuple[int, int]:
    """The same number twice, or two numbers as they are."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _sides(padding: Padding) -> Sides:
    given = (padding, padding) if isinstance(padding, int) else padding
    if len(given) not in (2, 4) or min(given) < 0:
        raise NormcError(
            f"padding={padding}: expected one number, two (left and right, top and bottom) or "
            "four (left, right, top, bottom), none of them negative"
        )
    return (given[0], given[0], given[1], given[1]) if len(given) == 2 else given


def probability(p: float) -> float:
    """A rate of dropout, if it is one below 1; else `NormcError`."""
    if not 0 <= p < 1:
        raise NormcError(f"dropout_p={p}: expected at least 0 and less than 1")
    return p


class OfCopy:
    """A formula whose statistics are of x, or of a copy of x with dropped elements.

    ``text`` has ``{0}`` where the statistics' argument stands. Each element of the copy is 0 with
    the probability p, else x/(1 - p); it is computed where it is read, and never stored.
    """

    def __init__(self, text: str, backend: str) -> None:
        self.plain = compile(text.format("x"), backend)
        self.dropped = compile(DROP + text.format("d"), backend)

    def run(
        self, x: Tensor, p: float, eps: float = 1e-5, mode: Mode = "batch"
    ) -> tuple[Tensor, ...]:
        """The results for x with channels along dimension 1; torch's generator draws for p > 0."""
        if p == 0:
            return self.plain.run(x, {}, 1, eps, 1, mode)
        dtype = wide(x.dtype)  # half precision would draw from too few numbers
        drawn = torch.rand_like(x, dtype=dtype).to(x.dtype)
        rate = x.new_full((), p, dtype=dtype)
        return self.dropped.run(x, {"r": drawn, "p": rate}, 1, eps, 1, mode)


class Dropping(nn.Module):
    """What the layers here have in common: a normalization, its dropout and when that acts."""

    def __init__(
        self, dropout_p: float, eps: float, dropout_in_eval: bool, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.dropout_p = probability(dropout_p)
        self.eps = eps
        self.dropout_in_eval = dropout_in_eval
        self.norm = OfCopy(NORM, backend)

    def _normalized(self, x: Tensor) -> Tensor:
        p = self.dropout_p if self.training or self.dropout_in_eval else 0.0
        return self.norm.run(x, p, self.eps)[0]

    def extra_repr(self) -> str:
        """The dropout and eps."""
        always = ", dropout_in_eval=True" * self.dropout_in_eval
        return f"dropout_p={self.dropout_p}, eps={self.eps}{always}"


class KernelNorm2d1x1(Dropping):
    """Kernel normalization whose windows are single pixels: over the channels of each position.

    x is (N, C, H, W), and so is the result. This is the LayerNorm of a transformer without an
    affine map, also called PONO, with the dropout of `KernelNorm2d`. arXiv 2205.10089.
    """

    def __init__(
        self,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        *,
        dropout_in_eval: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dropout_p, eps, dropout_in_eval, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, H, W); `ShapeError` for another rank."""
        if x.dim() != 4:
            raise ShapeError(f"x must be (N, C, H, W), not of shape {tuple(x.shape)}")
        return self._normalized(x)


class KernelNorm2d(Dropping):
    """Kernel normalization, arXiv 2205.10089: each window normalized by itself.

    x is (N, C, H, W), the result (N, C, oh*kh, ow*kw) with oh = (H + pad - kh)//sh + 1: windows
    side by side, for a convolution with kernel (kh, kw) and stride (kh, kw). Any floating dtype.

    * ``padding``: one number, (left and right, top and bottom), or (left, right, top, bottom);
      the zeros count in the statistics.
    * ``dropout_p``: mean and variance are those of a copy of the windows from which elements are
      dropped at this rate, a pixel in each window by itself. In evaluation nothing is dropped; the
      paper's code drops there too, which ``dropout_in_eval=True`` does. Which of the two the paper
      means is not known to us.

    >>> KernelNorm2d(3, padding=1)(torch.ones(2, 4, 5, 6)).shape
    torch.Size([2, 4, 15, 18])
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        *,
        dropout_in_eval: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dropout_p, eps, dropout_in_eval, backend)
        self.windows = Windows.of(kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, H, W); `ShapeError` for another rank or a window larger than x."""
        rows, columns = self.windows.count(x)
        (kh, kw), (n, c) = self.windows.kernel, x.shape[:2]
        y = self._normalized(self.windows.unfolded(x)).reshape(n, c, kh, kw, rows, columns)
        return y.permute(0, 1, 4, 2, 5, 3).reshape(n, c, rows * kh, columns * kw)

    def extra_repr(self) -> str:
        """The windows, the dropout and eps."""
        return f"{self.windows}, {super().extra_repr()}"


class KernelNorm1d(KernelNorm2d):
    """Kernel normalization of sequences: `KernelNorm2d` over one spatial dimension.

    x is (N, C, L), the result (N, C, ol*k) with ol = (L + pad - k)//stride + 1; ``padding`` is one
    number or (left, right). The rest is as there. arXiv 2205.10089.
    """

    def __init__(
        self,
        kernel_size: int,
        stride: int = 1,
        padding: Pair = 0,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        *,
        dropout_in_eval: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            (1, kernel_size), (1, stride), (*pair(padding), 0, 0), dropout_p, eps,
            dropout_in_eval=dropout_in_eval, backend=backend,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, L); `ShapeError` for another rank or a window larger than x."""
        if x.dim() != 3:
            raise ShapeError(f"x must be (N, C, L), not of shape {tuple(x.shape)}")
        return super().forward(x.unsqueeze(2)).squeeze(2)
