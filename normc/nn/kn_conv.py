"""KNConv: kernel normalization and the convolution behind it, without writing windows out.

    y = (conv(x) - mean*sum(W))/sqrt(var + eps) + b         mean, var of the window at that place

so all it takes is one convolution without bias and two numbers per window (Nasirigerdeh et al.,
arXiv 2205.10089). Where these come from is ours:

    pixels      var[n](x), compiled: variance and mean over the channels of every pixel, in one
                pass over x, from which elements are dropped on the way
    windows     mean = mean of the pixels' means
                var  = mean of the pixels' variances + variance of the pixels' means
    result      EPILOGUE, compiled: one pass over what the convolution has made

Windows are put together from one number in C, so they cost little; and no square of a mean is
subtracted from a mean of squares, which would lose the variance where the mean is large. Where the
convolution is in half precision, it is of x - m, and mean - m stands for mean: m is the mean of a
sample, of all single numbers the one that leaves least to be rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normc.backends.memory import wide
from normc.errors import ShapeError
from normc.nn.checks import real
from normc.nn.kernel_norm import KernelNorm2d1x1, OfCopy, shown
from normc.nn.windows import Padding, Pair, Windows
from normc.ops.op import compile

MOMENTS = "var[n]({0})"
"""Of a tensor seen with channels as its samples: what is left varies over samples and pixels."""

EPILOGUE = (
    "input mu[n,s]; input within[n,s]; input between[n,s]; param total[c] = 0; param b[c] = 0; "
    "(x - mu*total)/sqrt(within + between + eps) + b"
)
"""x is the convolution, ``total`` the sum of each filter, the inputs are of the windows."""

SHIFT = "input m[n]; x - m"
"""Computed in float32, and rounded once, for a convolution in half precision."""


class KNConv2d(nn.Conv2d):
    """A convolution of kernel-normalized windows, arXiv 2205.10089; takes nn.Conv2d's weights.

    The same as `KernelNorm2d` and a convolution with stride kernel_size behind it, without the
    windows in memory, but for the dropout: here a pixel is dropped for all windows that hold it.

    * ``padding``: one number, (left and right, top and bottom), or (left, right, top, bottom); the
      zeros count in the statistics. Mind the order of two: nn.Conv2d's is the other way round. The
      attribute ``windows`` has them; the inherited ``padding`` is 0.
    * ``groups`` divide the convolution; statistics are over all channels.
    * ``dropout_p`` and ``dropout_in_eval``: see `KernelNorm2d`.

    Raises `NormcError` for arguments that do not fit, `ShapeError` for an x that does not.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        groups: int = 1,
        bias: bool = True,
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        *,
        dropout_in_eval: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        windows = Windows.of(kernel_size, stride, padding)
        super().__init__(
            in_channels, out_channels, windows.kernel, windows.stride, groups=groups, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.windows = windows
        self.dropout_p = real("dropout_p", dropout_p, below=1)
        self.eps = real("eps", eps)
        self.dropout_in_eval = dropout_in_eval
        self.moments = OfCopy(MOMENTS, backend)
        self.epilogue = compile(EPILOGUE, backend)
        self.shift = compile(SHIFT, backend)

    def forward(self, input: Tensor) -> Tensor:
        """The result (N, out_channels, oh, ow) for (N, in_channels, H, W), in the input's dtype."""
        size = self.windows.count(input)
        if input.shape[1] != self.in_channels:
            raise ShapeError(
                f"x has {input.shape[1]} channels (shape {tuple(input.shape)}), but the layer was "
                f"made for {self.in_channels}"
            )
        known, means = self._moments(input, size)
        if _rounds(input):
            # The result is the same for every m, so that none needs a gradient, but for its digits:
            # where x is 0.8 +- 0.02, most of those that half precision has say 0.8.
            m = means.detach().mean((1, 2))
            y, known["mu"] = self._shifted(input, m), known["mu"] - m[:, None, None]
        else:
            y = self._convolved(input)
        total = self.weight.sum((1, 2, 3), dtype=wide(self.weight.dtype))
        bias = torch.zeros_like(total) if self.bias is None else self.bias
        tensors = {**known, "total": total, "b": bias}
        return self.epilogue.run(y, tensors, 1, self.eps, 1)[0]

    def _moments(self, x: Tensor, size: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        """Mean and variance of each window, the latter in two parts: three tensors (N, oh, ow).

        Then the mean of each pixel (N, H, W).
        """
        w, p = self.windows, self.dropout_p if self.training or self.dropout_in_eval else 0.0
        # "local0": the statistics over samples, a variance with its mean, and nothing else
        var, means = self.moments.run(x.transpose(0, 1), p, mode="local0")
        padded, seen = F.pad(var, w.padding).unsqueeze(1), w.unfolded(means.unsqueeze(1))
        within = F.avg_pool2d(padded, w.kernel, w.stride)
        between, mu = self.moments.run(seen.transpose(0, 1), 0.0, mode="local0")
        found = {"mu": mu, "within": within, "between": between}
        return {name: t.reshape(x.shape[0], *size) for name, t in found.items()}, means

    def _convolved(self, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        left, right, top, bottom = sides = self.windows.padding
        even = left == right and top == bottom  # then the convolution pads without a copy
        padding = (top, left) if even else 0
        x = x if even else F.pad(x, sides)
        return F.conv2d(x, self.weight, None, self.stride, padding, 1, self.groups)

    def _shifted(self, x: Tensor, m: Tensor) -> Tensor:
        """The convolution of x less a number per sample (N,); the padding's zeros less it, too."""
        x = F.pad(x, self.windows.padding) if any(self.windows.padding) else x
        x = self.shift.run(x, {"m": m}, 1, self.eps, 1)[0]
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)

    def extra_repr(self) -> str:
        """What recreates the layer, but for dtype and device."""
        chosen = "" if self.bias is not None else ", bias=False"
        rest = shown(self.dropout_p, self.eps, self.dropout_in_eval, self.epilogue.backend)
        return (
            f"{self.in_channels}, {self.out_channels}, {self.windows}, "
            f"groups={self.groups}{chosen}, {rest}"
        )


def _rounds(x: Tensor) -> bool:
    """Whether a convolution of x is in half precision: x is, or autocast makes it so."""
    if x.dtype.itemsize != 4:
        return x.dtype.itemsize < 4
    place = x.device.type  # "meta" is one that autocast does not know
    return torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place)


class KNConv2d1x1(nn.Module):
    """`KernelNorm2d1x1`, then a convolution of single pixels: KNConv with a kernel of 1.

    x is (N, in_channels, H, W), the result (N, out_channels, H, W). arXiv 2205.10089.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout_p: float = 0.05,
        groups: int = 1,
        eps: float = 1e-5,
        *,
        dropout_in_eval: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = KernelNorm2d1x1(
            dropout_p, eps, dropout_in_eval=dropout_in_eval, backend=backend
        )
        self.conv = nn.Conv2d(
            in_channels, out_channels, 1, groups=groups, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """The result for x (N, in_channels, H, W); `ShapeError` for another rank."""
        return self.conv(self.norm(x))
