"""How signals grow in residual networks at the start of training: arXiv 2101.08692, as figures.

With a folder as argument, networks of 50 blocks are measured, and figures written there as SVG.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import normc
from normc.analysis import signals_plot
from normc.analysis.gains import moments
from normc.analysis.signals import Signals, compare_signals
from normc.nn.nf_resnet import NFResNet, expected_variances

LAYERS = {
    "BN-ReLU-conv": "relu((x - batch_mean(x))/batch_std(x)*gamma + beta)",
    "ReLU-BN-conv": "h = relu(x); (h - batch_mean(h))/batch_std(h)*gamma + beta",
    "GN-ReLU-conv": "relu((x - group_mean(x))/group_std(x)*gamma + beta)",
    "EvoNorm-S0": normc.zoo["evonorm_s0"].text,
    "EvoNorm-B0": normc.zoo["evonorm_b0"].text,
}

Layer = Callable[[int], nn.Module]


class Block(nn.Module):
    """A pre-activation block; where the shape changes, the shortcut convolves the first layer."""

    def __init__(self, layer: Layer, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(before), layer(after)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(before, after, 3, stride, 1), nn.Conv2d(after, after, 3, 1, 1)]
        )
        changes = stride > 1 or before != after
        self.shortcut = nn.Conv2d(before, after, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return shortcut + self.convs[1](self.layers[1](self.convs[0](h)))


def resnet(name: str, depths: Sequence[int], width: int) -> nn.Module:
    """A stem and stages of blocks; weights have a variance of 2/fan-in, 1/fan-in where the
    convolution's input is already normalized."""
    torch.manual_seed(0)
    sizes = [2 if stage and not i else 1 for stage, n in enumerate(depths) for i in range(n)]
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        *(Block(lambda c: normc.Layer(LAYERS[name], c), width, width, s) for s in sizes),
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            scale = 1.0 if module is net[0] or name == "ReLU-BN-conv" else math.sqrt(2)
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=scale / math.sqrt(fan_in))
            nn.init.zeros_(module.bias)
    return net


def nf_resnet(depths: Sequence[int], width: int) -> nn.Module:
    """An NF-ResNet whose skip gains are 1: at 0, as they start, its blocks add nothing."""
    torch.manual_seed(0)
    net = NFResNet(depths, [width] * len(depths), 10, low_resolution=True, bottleneck=0.5)
    for name, parameter in net.named_parameters():
        if name.endswith("skip_gain"):
            nn.init.ones_(parameter)
    return net


def main(folder: str | None = None) -> None:
    """Print tables; with a folder, of larger networks, and draw them."""
    depths, width = ((2, 2), 32) if folder is None else ((12, 13, 13, 12), 64)
    side = 24 if folder is None else 64
    how = {"shape": (4, 3, side, side), "batches": 1}

    print(moments("relu").show(), "\n")  # 1 - 1/pi of 1/2: the variance of relu(z)
    found = {}
    for signals in compare_signals({n: resnet(n, depths, width) for n in LAYERS}, **how):
        found[signals.label] = signals
    for curve in "variance", "squared mean":
        print(signals_plot.table(*found.values(), name=curve), "\n")

    expected = [1.0, *(v for stage in expected_variances(depths) for v in stage)]
    (nf,) = compare_signals({"NF-ResNet": nf_resnet(depths, width)}, **how)
    off = [b.variance / v - 1 for b, v in zip(nf.blocks, expected, strict=True)]
    print(nf.show())
    print(f"NF-ResNet: within {max(map(abs, off)):.1%} of its predicted variance")
    if folder is not None:
        draw(Path(folder), found, nf, expected)


def draw(folder: Path, found: dict[str, Signals], nf: Signals, expected: list[float]) -> None:
    """Write the figures of docs/analysis.md."""
    folder.mkdir(parents=True, exist_ok=True)
    classic = [found[name] for name in ("BN-ReLU-conv", "ReLU-BN-conv")]
    rest = [signals for name, signals in found.items() if name != "ReLU-BN-conv"]
    signals_plot.save(folder / "signals_batch_norm.svg", *classic)
    signals_plot.save(folder / "signals_layers.svg", *rest)
    signals_plot.save(folder / "signals_nf_resnet.svg", nf, expected=expected)


if __name__ == "__main__":
    main(*sys.argv[1:2])
