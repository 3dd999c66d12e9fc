"""NF-ResNet: residual networks without normalization, whose variance is known beforehand.

    x -> g(x)/std --+--> conv1x1 g conv3x3 g conv1x1 [squeeze-excite] --> * skip_gain*alpha --+--> y
    |               +--> conv1x1, where the shape changes ------------------------------------+
    +------------------- x itself, elsewhere -------------------------------------------------+

g is an activation times its gamma and std what the input's standard deviation is expected to be. As
published, std divides what comes out of g; where g is homogeneous, as relu is, that is the same as
scaling what goes in. So a branch takes and returns variance 1, and each block adds alpha**2 to the
stream: `expected_stds`. All convolutions are `ScaledStdConv2d`. Three more formulas do what lies
between them, each in one pass over memory where plain torch takes two to four, and with one derived
backward: the activation with both its factors, the gate of squeeze-excite, and the residual sum
with both of its.

Brock, De, Smith, "Characterizing signal propagation to close the performance gap in unnormalized
ResNets", arXiv 2101.08692; details are those of deepmind's nfnets/nf_resnet.py. It pads strided
convolutions and the stem's maximum on the right and below where sizes are even ("SAME"), these pad
all around, as torch's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normc.errors import NormcError
from normc.nn.checks import real, whole
from normc.nn.nf_style import Style
from normc.ops.op import compile

DEPTHS = {  # blocks of each stage of the published networks, by their number of layers
    50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3),
    288: (24, 24, 24, 24), 600: (50, 50, 50, 50),
}  # fmt: skip
WIDTHS = (256, 512, 1024, 2048)  # channels of each stage of the published networks
OWN = ("num_classes", "in_channels", "low_resolution", "stochastic_depth", "dropout")
"""The options of a network that are not of its `Style`."""


def expected_stds(depths: Sequence[int], alpha: float = 0.2) -> tuple[tuple[float, ...], ...]:
    """The standard deviation expected at the input of each block, stage by stage.

    It starts at 1, and every block adds alpha**2 to the variance; the first block of a stage, whose
    shortcut convolves the scaled input, sets it back to 1 before it adds.

    >>> [round(std, 4) for std in expected_stds([3, 4])[1]]
    [1.0583, 1.0198, 1.0392, 1.0583]
    """
    outputs = expected_variances(depths, alpha)
    inputs = iter([1.0, *(v**0.5 for stage in outputs for v in stage)])
    return tuple(tuple(next(inputs) for _ in stage) for stage in outputs)


def expected_variances(depths: Sequence[int], alpha: float = 0.2) -> tuple[tuple[float, ...], ...]:
    """The variance expected at the output of each block, stage by stage, with skip gains of 1.

    It counts no borders: zero padding takes a tenth of it on maps of 16 x 16 (measured). Raises
    `NormcError` for a stage without blocks, or an alpha that is negative or no number.
    """
    step = real("alpha", alpha) ** 2
    counts = [whole("a depth", depth) for depth in depths]
    return tuple(tuple(1 + step * (i + 1) for i in range(count)) for count in counts)


class SqueezeExcite(nn.Module):
    """2*sigmoid(h)*x, h from x's means over positions by two layers, which start as torch's do."""

    def __init__(self, channels: int, share: float, backend: str = "auto") -> None:
        super().__init__()
        inside = max(1, int(channels * share))
        first, second = nn.Linear(channels, inside), nn.Linear(inside, channels)
        self.gate = nn.Sequential(first, nn.ReLU(), second)
        self.op = compile("input h[n,c]; 2*sigmoid(h)*x", backend)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of x (N, C, H, W)."""
        return self.op.run(x, {"h": self.gate(x.mean((2, 3)))}, "auto", 1e-5, 1)[0]


class NFBlock(nn.Module):
    """One residual block (N, before, H, W) -> (N, after, H/stride, W/stride); see the module.

    ``branch`` ends before stochastic depth and the gains: its output is what signal propagation
    plots call the residual branch. ``skip_gain`` is SkipInit's: one learned number, 0 at first. In
    training, a sample's branch is 0 with probability ``depth_rate``.
    """

    def __init__(
        self, before: int, after: int, style: Style, stride: int = 1, std: float = 1.0,
        depth_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        inside = max(1, int(after * style.bottleneck))
        changes = stride > 1 or before != after
        self.act = style.act(std)
        self.project = style.conv(before, after, stride=stride) if changes else None
        parts: list[tuple[str, nn.Module]] = [
            ("conv0", style.conv(before, inside)), ("act1", style.act()),
            ("conv1", style.conv(inside, inside, 3, stride)), ("act2", style.act()),
            ("conv2", style.conv(inside, after)),
        ]  # fmt: skip
        if style.excite:
            parts.append(("excite", SqueezeExcite(after, style.excite, style.backend)))
        self.branch = nn.Sequential(OrderedDict(parts))
        self.depth_rate = depth_rate
        self.skip_gain = nn.Parameter(torch.zeros(()))
        text = f"input shortcut; param skip_gain = 0; {style.alpha!r}*skip_gain*x + shortcut"
        self.join = compile(text, style.backend)

    def forward(self, x: Tensor) -> Tensor:
        """The next state of the stream."""
        h = self.act(x)
        shortcut, out = x if self.project is None else self.project(h), self.branch(h)
        if self.training and self.depth_rate:  # kept branches are not scaled, as published
            kept = torch.rand(out.shape[0], 1, 1, 1, device=out.device) >= self.depth_rate
            out = out * kept.to(out.dtype)
        given = {"shortcut": shortcut, "skip_gain": self.skip_gain}
        return self.join.run(out, given, "auto", 1e-5, 1)[0]


class NFResNet(nn.Module):
    """A stem, stages of `NFBlock`, the activation, a mean over positions, and a linear layer.

    Every stage but the first halves height and width. The stem, of a quarter of the first stage's
    channels, is a 7x7 convolution of stride 2 and a 3x3 maximum of stride 2; with
    ``low_resolution``, which is ours, a 3x3 convolution. The rate of stochastic depth grows with
    the block's index from 0 towards ``stochastic_depth``. The last layer starts as N(0, 0.01**2),
    its bias at 0. What else there is to choose, by keyword, is `Style`'s. Raises `NormcError` for
    what does not fit.
    """

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], num_classes: int, in_channels: int = 3,
        *, low_resolution: bool = False, stochastic_depth: float = 0.0, dropout: float = 0.0,
        **style: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.style = Style.of(style, OWN)
        if not depths or len(depths) != len(widths):
            raise NormcError(f"a stage has blocks and a width, unlike one of {depths}, {widths}")
        widths = [whole("a width", width) for width in widths]
        before = max(1, widths[0] // 4)
        rate = real("stochastic_depth", stochastic_depth, below=1)
        self.stem = _stem(whole("in_channels", in_channels), before, low_resolution, self.style)
        self.blocks = nn.Sequential(*_blocks(depths, widths, before, rate, self.style))
        self.act = self.style.act()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1], whole("num_classes", num_classes))
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, num_classes) of images (N, in_channels, H, W)."""
        last = self.act(self.blocks(self.stem(x)))
        return self.fc(self.dropout(last.mean((2, 3))))


def nf_resnet(
    variant: int, num_classes: int = 1000, in_channels: int = 3, **options: Any
) -> NFResNet:
    """The published network of a number of layers in `DEPTHS`; ``options`` are NFResNet's.

    As published but for ``stochastic_depth``, 0 here and 0.1 in their code, and ``dropout``.
    """
    if variant not in tuple(DEPTHS):
        raise NormcError(f"variant must be one of {', '.join(map(str, DEPTHS))}, not {variant!r}")
    return NFResNet(DEPTHS[variant], WIDTHS, num_classes, in_channels, **options)


def nf_resnet_small(num_classes: int = 10, in_channels: int = 1, **options: Any) -> NFResNet:
    """A network of ours for grey images of 8 to 32 pixels: two stages of two blocks, 32, 64 wide.

    Images of colours are for ``in_channels=3``; ``options`` are NFResNet's.
    """
    small: dict[str, Any] = {"low_resolution": True, "bottleneck": 0.5, **options}
    return NFResNet((2, 2), (32, 64), num_classes, in_channels, **small)


def _stem(before: int, width: int, low_resolution: bool, style: Style) -> nn.Module:
    if low_resolution:
        return style.conv(before, width, 3)
    return nn.Sequential(style.conv(before, width, 7, 2), nn.MaxPool2d(3, 2, 1))


def _blocks(
    depths: Sequence[int], widths: Sequence[int], before: int, rate: float, style: Style
) -> Iterable[NFBlock]:
    """The blocks of all stages in order."""
    index, count = 0, sum(depths)
    for stage, stds in enumerate(expected_stds(depths, style.alpha)):
        for i, std in enumerate(stds):
            stride = 2 if stage and not i else 1
            yield NFBlock(before, widths[stage], style, stride, std, rate * index / count)
            before, index = widths[stage], index + 1
