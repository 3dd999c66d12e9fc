"""Nets: the architectures a layer is judged on, small and scalable.

    resnet        pre-activation: E conv1x1 E conv3x3 E conv1x1, + skip
    mobilenet     conv1x1 E depthwise3x3 E conv1x1 A, + skip
    efficientnet  conv1x1 E depthwise3x3 E squeeze-excite conv1x1 A, + skip

E is the layer; A, where the originals have a norm without activation, is its affine transform
alone, as in the paper (arXiv 2004.02967, figure 4). Each stage but the first halves height and
width and doubles the channels. A stem convolution goes before, and E, a mean over positions and a
linear layer behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Make = Callable[[int], nn.Module]
"""From a number of channels to a layer."""

EXPANSION = 4
"""How many times wider mobile blocks are inside, and narrower residual ones."""


@dataclass(frozen=True)
class Scale:
    """How large a network is: channels of the first stage, blocks of each stage."""

    width: int = 16
    depth: tuple[int, ...] = (1, 1)


@dataclass(frozen=True)
class Layers:
    """What makes the layer, and the affine transform that stands where nothing is activated."""

    layer: Make
    affine: Make


class Block(nn.Module):
    """A body with a skip connection, which is a convolution where the shape changes."""

    def __init__(self, body: nn.Module, before: int, after: int, stride: int, open: bool) -> None:
        super().__init__()
        self.body = body
        same = before == after and stride == 1
        project = None if same or open else nn.Conv2d(before, after, 1, stride, bias=False)
        self.skip = nn.Identity() if same else project  # an open block has none, as MobileNetV2's

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out if self.skip is None else out + self.skip(x)


class SqueezeExcite(nn.Module):
    """Channels weighted by what their means say: to a quarter, back, sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(1, channels // 4)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inside, 1), nn.SiLU(),
            nn.Conv2d(inside, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def _conv(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)


def _residual(before: int, after: int, stride: int, e: Layers) -> Block:
    inside = max(8, after // EXPANSION)
    body = nn.Sequential(
        e.layer(before), _conv(before, inside), e.layer(inside), _conv(inside, inside, 3, stride),
        e.layer(inside), _conv(inside, after),
    )  # fmt: skip
    return Block(body, before, after, stride, open=False)


def _mobile(before: int, after: int, stride: int, e: Layers, excite: bool) -> Block:
    inside = EXPANSION * before
    gate = [SqueezeExcite(inside)] if excite else []
    body = nn.Sequential(
        _conv(before, inside), e.layer(inside), _conv(inside, inside, 3, stride, inside),
        e.layer(inside), *gate, _conv(inside, after), e.affine(after),
    )  # fmt: skip
    return Block(body, before, after, stride, open=True)


def _net(block: Callable[[int, int, int], nn.Module], e: Layers, scale: Scale, classes: int,
         channels: int) -> nn.Sequential:  # fmt: skip
    before, modules = scale.width, list[nn.Module]()
    for stage, count in enumerate(scale.depth):
        after = scale.width * 2**stage
        for i in range(count):
            modules.append(block(before, after, 2 if stage and not i else 1))
            before = after
    return nn.Sequential(
        _conv(channels, scale.width, 3), *modules, e.layer(before), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(before, classes),
    )  # fmt: skip


def resnet(e: Layers, scale: Scale, classes: int, channels: int) -> nn.Module:
    """Pre-activation bottlenecks."""
    return _net(lambda a, b, s: _residual(a, b, s, e), e, scale, classes, channels)


def mobilenet(e: Layers, scale: Scale, classes: int, channels: int) -> nn.Module:
    """Inverted bottlenecks."""
    return _net(lambda a, b, s: _mobile(a, b, s, e, False), e, scale, classes, channels)


def efficientnet(e: Layers, scale: Scale, classes: int, channels: int) -> nn.Module:
    """Inverted bottlenecks with squeeze-excite."""
    return _net(lambda a, b, s: _mobile(a, b, s, e, True), e, scale, classes, channels)


Architecture = Callable[[Layers, Scale, int, int], nn.Module]

ARCHITECTURES: Mapping[str, Architecture] = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
}
"""The architectures by name; any function of layers, scale, classes and channels is one."""


def build(name: str, e: Layers, scale: Scale, classes: int, channels: int, seed: int) -> nn.Module:
    """A network whose weights follow from the seed alone; torch's own state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[name](e, scale, classes, channels)
