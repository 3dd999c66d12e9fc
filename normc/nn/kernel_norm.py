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

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normc.backends.memory import wide
from normc.errors import ShapeError
from normc.nn.checks import real, whole
from normc.nn.windows import Padding, Pair, Windows, pair
from normc.ops.op import compile

if TYPE_CHECKING:
    from normc.pipeline import Mode

NORM = "(x - channel_mean({0}))/channel_std({0})"
"""A window is a position of the unfolded tensor, its elements the channels there."""

DROP = "input r; param p = 0; d = where(r < p, 0, x/(1 - p)); "
"""The copy: r is drawn evenly from 0 to 1, and what is below p is dropped."""


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
        self.dropout_p = real("dropout_p", dropout_p, below=1)
        self.eps = real("eps", eps)
        self.dropout_in_eval = dropout_in_eval
        self.norm = OfCopy(NORM, backend)

    def _normalized(self, x: Tensor) -> Tensor:
        p = self.dropout_p if self.training or self.dropout_in_eval else 0.0
        return self.norm.run(x, p, self.eps)[0]

    def extra_repr(self) -> str:
        """What recreates the layer, from the dropout on."""
        return shown(self.dropout_p, self.eps, self.dropout_in_eval, self.norm.plain.backend)


def shown(dropout_p: float, eps: float, dropout_in_eval: bool, backend: str) -> str:
    """The options of a layer that drops, as they recreate it; the last two where they are chosen.

    >>> shown(0.1, 1e-5, True, "auto")
    'dropout_p=0.1, eps=1e-05, dropout_in_eval=True'
    """
    always = ", dropout_in_eval=True" * dropout_in_eval
    place = "" if backend == "auto" else f", backend={backend!r}"
    return f"dropout_p={dropout_p}, eps={eps}{always}{place}"


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
        """What recreates the layer."""
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
        sides = pair("padding", padding, 0, "(left, right)")
        super().__init__(
            (1, whole("kernel_size", kernel_size)), (1, whole("stride", stride)), (*sides, 0, 0),
            dropout_p, eps, dropout_in_eval=dropout_in_eval, backend=backend,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, L); `ShapeError` for another rank or a window larger than x."""
        if x.dim() != 3:
            raise ShapeError(f"x must be (N, C, L), not of shape {tuple(x.shape)}")
        return super().forward(x.unsqueeze(2)).squeeze(2)

    def extra_repr(self) -> str:
        """What recreates the layer."""
        w = self.windows
        sizes = f"{w.kernel[1]}, stride={w.stride[1]}, padding={w.padding[:2]}"
        return f"{sizes}, {Dropping.extra_repr(self)}"
