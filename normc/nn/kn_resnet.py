"""KNResNet: residual networks of kernel-normalized convolutions, and no other normalization.

Nasirigerdeh et al., *Kernel Normalized Convolutional Networks*, arXiv 2205.10089; sizes and
paddings are those of its code, reza-nasirigerdeh/norm-torch.

    res            relu KNConv2x2  relu KNConv2x2, + skip
    bottleneck     relu KNConv2x2  relu KNConv3x3  relu KNConv2x2, + skip
    bottleneck1x1  relu KNConv1x1  relu KNConv3x3  relu KNConv1x1, + skip
    transition     relu KNConv2x2 (or 1x1)  maxpool
    network        stem, stages with transitions between them, tail, KernelNorm1x1, relu, mean
                   over positions, linear

A kernel of 2 x 2 with a padding of 1 makes an image one pixel larger, and the one without padding
makes it smaller again. Images go in as they are, from 0 to 1: they are not scaled by a data set's
mean and deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from normc.errors import NormcError, nearest
from normc.nn.checks import whole
from normc.nn.kernel_norm import KernelNorm2d1x1
from normc.nn.kn_conv import KNConv2d, KNConv2d1x1
from normc.nn.windows import Sides

FIRST: Sides = (1, 0, 1, 0)
SECOND: Sides = (0, 1, 0, 1)
WIDE: Sides = (2, 1, 2, 1)


@dataclass(frozen=True)
class Stage:
    """Blocks of one resolution, and the transition before them, which the first stage lacks."""

    block: str  # of `BLOCKS`
    count: int
    width: int  # channels
    inside: int  # channels between the convolutions of a block
    padding: Sides | None = None  # of the transition's 2 x 2 convolution; None for a 1 x 1
    low: Sides | None = None  # the same at low resolution, where it is another

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            near = nearest(str(self.block), BLOCKS)
            raise NormcError(f"no block is called {self.block!r}{near}: {', '.join(BLOCKS)} are")
        for name in ("count", "width", "inside"):
            whole(f"a stage's {name}", getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """A network's stem, stages, and the channels of its tail, if it has one."""

    stem: int  # channels
    stages: tuple[Stage, ...]
    tail: int | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise NormcError("a plan has one stage or more: stages=(Stage(...), ...)")
        whole("a plan's stem", self.stem)
        if self.tail is not None:
            whole("a plan's tail", self.tail)


class Make:
    """How convolutions are made: kernel-normalized, all with the same dropout."""

    def __init__(self, dropout_p: float, dropout_in_eval: bool, backend: str) -> None:
        self.dropout_p = dropout_p
        self.options: Any = {"dropout_in_eval": dropout_in_eval, "backend": backend}

    def conv(self, before: int, after: int, kernel: int, **where: Any) -> nn.Module:
        """A square kernel, `KNConv2d1x1` for 1; ``where`` is stride and padding."""
        if kernel == 1:
            return KNConv2d1x1(before, after, self.dropout_p, **self.options)
        options = {**where, **self.options}
        return KNConv2d(before, after, kernel, dropout_p=self.dropout_p, **options)

    def last(self) -> nn.Module:
        """The normalization before the mean, which drops more."""
        return KernelNorm2d1x1(min(5 * self.dropout_p, 0.25), **self.options)


class Block(nn.Module):
    """Convolutions, each with a relu before it, and a skip around them."""

    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*(m for conv in convs for m in (nn.ReLU(), conv)))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of x (N, C, H, W) and what the convolutions make of it."""
        return x + self.body(x)


def _res(width: int, inside: int, make: Make) -> Block:
    return Block(make.conv(width, inside, 2, padding=1), make.conv(inside, width, 2))


def _bottleneck(width: int, inside: int, make: Make, outer: int = 2) -> Block:
    return Block(
        make.conv(width, inside, outer, padding=1),
        make.conv(inside, inside, 3, padding=1),
        make.conv(inside, width, outer),
    )


BLOCKS: Mapping[str, Callable[[int, int, Make], Block]] = {
    "res": _res,
    "bottleneck": _bottleneck,
    "bottleneck1x1": partial(_bottleneck, outer=1),
}
"""Blocks by name: functions of the channels, those inside, and what makes convolutions."""


class KNResNet(nn.Module):
    """A network by its plan: images (N, in_channels, H, W) to scores (N, num_classes).

    ``low_resolution`` is for images as small as CIFAR's: the stem is a 3 x 3 convolution, where it
    else takes a quarter of height and width. ``dropout_p`` is that of every convolution; the last
    normalization drops five times as much, at most 0.25. `KernelNorm2d` says what
    ``dropout_in_eval`` is. Raises `NormcError` for what does not fit.
    """

    def __init__(
        self,
        plan: Plan,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        low_resolution: bool = False,
        dropout_p: float = 0.05,
        dropout_in_eval: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
            names = ", ".join(PLANS)
            raise NormcError(f"a plan is a Plan, not {plan!r}: PLANS has those of {names}")
        make = Make(dropout_p, dropout_in_eval, backend)
        last = plan.tail or plan.stages[-1].width
        self.stem = _stem(whole("in_channels", in_channels), plan.stem, low_resolution, make)
        self.stages = _stages(plan, low_resolution, make)
        self.tail = nn.Sequential()
        if plan.tail:
            conv = make.conv(plan.stages[-1].width, last, 2, padding=int(low_resolution))
            self.tail = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), conv)
        self.norm = make.last()
        self.fc = nn.Linear(last, whole("num_classes", num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: convolutions normal with the deviation sqrt(2/fan-out), biases 0."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, m.bias))
        self.fc.reset_parameters()
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of images x."""
        x = self.tail(self.stages(self.stem(x)))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


def _stem(before: int, after: int, low: bool, make: Make) -> nn.Sequential:
    if low:
        return nn.Sequential(make.conv(before, after, 3, padding=1))
    return nn.Sequential(
        make.conv(before, after, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, padding=1)
    )


def _stages(plan: Plan, low: bool, make: Make) -> nn.Sequential:
    before, made = plan.stem, list[nn.Module]()
    for i, stage in enumerate(plan.stages):
        rows: list[nn.Module] = [_transition(before, stage, low, make)] if i else []
        rows += [BLOCKS[stage.block](stage.width, stage.inside, make) for _ in range(stage.count)]
        made.append(nn.Sequential(*rows))
        before = stage.width
    return nn.Sequential(*made)


def _transition(before: int, stage: Stage, low: bool, make: Make) -> nn.Sequential:
    padding = stage.low if low and stage.low else stage.padding
    kernel = 2 if padding else 1
    conv = make.conv(before, stage.width, kernel, padding=padding)
    return nn.Sequential(nn.ReLU(), conv, nn.MaxPool2d(2))


# --- plans ----------------------------------------------------------------------------------------

PLANS: Mapping[str, Plan] = {
    "18": Plan(
        64,
        (
            Stage("res", 2, 64, 256),
            Stage("res", 2, 256, 256, FIRST),
            Stage("res", 1, 512, 512, SECOND),
            Stage("res", 1, 724, 724, WIDE, FIRST),
        ),
        512,
    ),
    "34": Plan(
        64,
        (
            Stage("res", 4, 64, 256),
            Stage("res", 5, 256, 320, FIRST),
            Stage("res", 3, 512, 640, SECOND),
            Stage("res", 2, 512, 843, WIDE, FIRST),
        ),
        512,
    ),
    "50": Plan(
        256,
        (
            Stage("bottleneck", 4, 256, 64),
            Stage("bottleneck", 5, 512, 128, FIRST),
            Stage("bottleneck", 4, 810, 201, SECOND),
            Stage("bottleneck1x1", 2, 2048, 512),
        ),
    ),
    "digits": Plan(16, (Stage("res", 1, 16, 32), Stage("res", 1, 32, 32, FIRST))),
}
"""The paper's networks by their layers, and one of ours for images of 8 x 8 pixels."""


def kn_resnet18(num_classes: int = 1000, **options: Any) -> KNResNet:
    """KNResNet-18: 17 convolutions and a linear layer; options as `KNResNet` has them."""
    return KNResNet(PLANS["18"], num_classes, **options)


def kn_resnet34(num_classes: int = 1000, **options: Any) -> KNResNet:
    """KNResNet-34: 33 convolutions and a linear layer; options as `KNResNet` has them."""
    return KNResNet(PLANS["34"], num_classes, **options)


def kn_resnet50(num_classes: int = 1000, **options: Any) -> KNResNet:
    """KNResNet-50: 49 convolutions and a linear layer; options as `KNResNet` has them."""
    return KNResNet(PLANS["50"], num_classes, **options)


def kn_resnet_digits(num_classes: int = 10, **options: Any) -> KNResNet:
    """A small one of ours, 6 convolutions and a linear layer, for images of 8 x 8.

    They are grey, with one channel, unless ``in_channels`` is another; options as `KNResNet` has.
    """
    usual: dict[str, Any] = {"in_channels": 1, "low_resolution": True}
    return KNResNet(PLANS["digits"], num_classes, **(usual | options))
