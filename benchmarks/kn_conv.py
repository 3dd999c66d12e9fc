"""What kernel normalization costs beside a convolution: ``python -m benchmarks.kn_conv``.

    conv      the convolution alone
    kn_conv   `normc.nn.kn_conv.KNConv2d`, in training with its dropout
    no drop   the same without dropout
    eager     the same in plain torch: moments of windows that are views, as the paper's code has it
    unfold    `KernelNorm2d`, then a convolution with stride kernel

Layers are those of KNResNet-18 at low resolution. Times are of forward, and of forward with
backward, measured in turns in one process. ``kept`` are the bytes that forward keeps for backward,
``peak`` those that torch holds at the same time in a step, both without x's and the parameters'.
With ``--layers``, the rest of the file stays: see `benchmarks.parts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts import begun, finish
from normc.analysis.machine import environment
from normc.analysis.timing import interleave
from normc.nn.kernel_norm import KernelNorm2d
from normc.nn.kn_conv import KNConv2d

DATA = Path(__file__).parents[1] / "docs" / "benchmarks" / "kn_conv.json"

LAYERS = {  # channels before and behind, kernel, padding, height and width
    "stem": (3, 64, 3, 1, 32),
    "first": (64, 256, 2, 1, 32),
    "second": (256, 64, 2, 0, 33),
    "wide": (512, 512, 2, 1, 8),
    "square": (64, 64, 3, 1, 32),  # not of KNResNet-18: the kernel of most other networks
}
BASE, DROP = "conv", 0.05


class Eager(KNConv2d):
    """The same in torch's own operations."""

    def forward(self, x: Tensor) -> Tensor:
        (kh, kw), (sh, sw) = self.windows.kernel, self.windows.stride
        x = F.pad(x, self.windows.padding)
        y = F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)
        d = F.dropout(x, self.dropout_p, self.training).unfold(2, kh, sh).unfold(3, kw, sw)
        var, mean = torch.var_mean(d, (1, 4, 5), correction=0)
        total = self.weight.sum((1, 2, 3)).view(1, -1, 1, 1)
        y = (y - mean.unsqueeze(1) * total) / torch.sqrt(var.unsqueeze(1) + self.eps)
        return y + self.bias.view(1, -1, 1, 1)


def _unfold(before: int, after: int, kernel: int, padding: int) -> nn.Module:
    norm = KernelNorm2d(kernel, 1, padding, DROP)
    return nn.Sequential(norm, nn.Conv2d(before, after, kernel, kernel))


MAKE: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    BASE: lambda before, after, kernel, pad: nn.Conv2d(before, after, kernel, padding=pad),
    "kn_conv": lambda *a: KNConv2d(*a[:3], padding=a[3], dropout_p=DROP),
    "no drop": lambda *a: KNConv2d(*a[:3], padding=a[3], dropout_p=0),
    "eager": lambda *a: Eager(*a[:3], padding=a[3], dropout_p=DROP),
    "unfold": _unfold,
}


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Forward and backward, with the gradients of everything."""
    y = module(x)
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y)))


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes that forward keeps for backward, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    found: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(s.nbytes() for place, s in found.items() if place not in own)


def peak(module: nn.Module, x: Tensor) -> int:
    """Bytes that torch holds for a step at the same time, beside x and the parameters."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(module, x)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events), default=0)


def _row(row: str, batch: int, rounds: int) -> dict[str, Any]:
    """One layer: times in milliseconds, ratios to the convolution's, bytes."""
    modules = {name: make(*LAYERS[row][:4]) for name, make in MAKE.items()}
    before, *_, side = LAYERS[row]
    x = torch.randn(batch, before, side, side, requires_grad=True)
    with torch.no_grad():
        forward = interleave({n: lambda m=m: m(x) for n, m in modules.items()}, rounds)
    both = interleave({n: lambda m=m: step(m, x) for n, m in modules.items()}, rounds)
    return {
        name: {
            "forward_ms": round(1e3 * forward.median(name), 3),
            "forward_ratio": round(forward.ratio(name, BASE), 3),
            "both_ms": round(1e3 * both.median(name), 3),
            "both_ratio": round(both.ratio(name, BASE), 3),
            "kept": kept(module, x),
            "peak": peak(module, x),
        }
        for name, module in modules.items()
    }


def main(
    batch: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=3)] = 21,
    layers: Annotated[str, typer.Option(help="Names of layers, separated by commas.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes.")] = 0,
    output: Annotated[Path, typer.Option(help="The JSON.")] = DATA,
) -> None:
    """Measure, print, and write the numbers."""
    torch.set_num_threads(threads or torch.get_num_threads())
    chosen = layers.split(",") if layers else list(LAYERS)
    if unknown := [name for name in chosen if name not in LAYERS]:
        raise typer.BadParameter(f"no layer is called {unknown[0]!r}: {', '.join(LAYERS)} are")
    head = {"environment": environment("system"), "batch": batch, "dtype": "float32"}
    record = begun(output, head, set(chosen) < set(LAYERS))
    rows = {row: {"layer": LAYERS[row], **_row(row, batch, rounds)} for row in chosen}
    finish(output, record, rows, LAYERS)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
