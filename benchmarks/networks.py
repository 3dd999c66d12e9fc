"""Networks of four papers on digits: ``python -m benchmarks.networks``.

    resnet     `normc.search.nets.resnet` with a compiled layer: BatchNorm+ReLU, GroupNorm+ReLU,
               EvoNorm-B0, EvoNorm-S0
    NF         `normc.nn.nf_resnet.nf_resnet_small`, without normalization of activations
    KN         `normc.nn.kn_resnet.kn_resnet_digits`, and the same network with BatchNorm in the
               places of kernel normalization

All are trained alike, by SGD with Nesterov momentum and a rate that falls as a cosine, nothing
tuned for any of them; every fifth image of scikit-learn's digits is kept for judging. Accuracies
are those at the end. With ``--networks``, the rest of the file stays: see `benchmarks.parts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn

from benchmarks.parts import begun, finish
from normc.analysis.machine import environment
from normc.nn.kernel_norm import KernelNorm2d1x1
from normc.nn.kn_conv import KNConv2d
from normc.nn.kn_resnet import kn_resnet_digits
from normc.nn.nf_resnet import nf_resnet_small
from normc.ops.layer import Layer
from normc.search.data import digits
from normc.search.nets import Layers, Scale, resnet
from normc.search.setting import Recipe
from normc.search.training import Training

DATA = Path(__file__).parents[1] / "docs" / "benchmarks" / "networks.json"
SCALE = Scale(32, (2, 2))
RECIPE = Recipe(steps=600, batch=64, rate=0.05)


def with_layer(name: str) -> nn.Module:
    """The residual network with a layer of the zoo."""
    layer = partial(Layer, name)
    return resnet(Layers(layer, layer), SCALE, 10, 1)


def twin() -> nn.Module:
    """The kernel-normalized network with BatchNorm before each convolution instead."""
    net = kn_resnet_digits()
    for path, module in list(net.named_modules()):
        new = _normed(module, net.fc.in_features)
        if new is not None:
            parent, _, name = path.rpartition(".")
            setattr(net.get_submodule(parent), name, new)
    return net


def _normed(module: nn.Module, last: int) -> nn.Module | None:
    if isinstance(module, KernelNorm2d1x1):
        return nn.BatchNorm2d(last)
    if not isinstance(module, KNConv2d):
        return None
    left, right, above, below = module.windows.padding
    conv = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(cast(Tensor, conv.bias))
    return nn.Sequential(
        nn.BatchNorm2d(module.in_channels), nn.ZeroPad2d((left, right, above, below)), conv
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet, BatchNorm+ReLU": lambda: with_layer("bn_relu"),
    "resnet, GroupNorm+ReLU": lambda: with_layer("gn_relu"),
    "resnet, EvoNorm-B0": lambda: with_layer("evonorm_b0"),
    "resnet, EvoNorm-S0": lambda: with_layer("evonorm_s0"),
    "NF-ResNet": nf_resnet_small,
    "KNResNet": kn_resnet_digits,
    "KNResNet's twin, BatchNorm": twin,
}


def trained(make: Callable[[], nn.Module], seed: int) -> dict[str, Any]:
    """The accuracy of a network that starts from a seed, and what a step took."""
    torch.manual_seed(seed)  # dropout draws from it, too
    training = Training(make(), digits(), RECIPE, seed)
    training.advance(1)  # compiles
    start = time.perf_counter()
    finite = training.advance(RECIPE.steps)
    spent = time.perf_counter() - start
    accuracy = training.accuracy() if finite else 0.0
    return {
        "seed": seed,
        "finite": finite,
        "accuracy": round(100 * accuracy, 2),
        "ms_a_step": round(1e3 * spent / (RECIPE.steps - 1), 2),
    }


def row(name: str, seeds: int) -> dict[str, Any]:
    """One network with all seeds."""
    runs = [trained(NETWORKS[name], seed) for seed in range(seeds)]
    count = sum(p.numel() for p in NETWORKS[name]().parameters())
    found = {"parameters": count, "mean": round(mean(r["accuracy"] for r in runs), 2), "runs": runs}
    print(f"{name:28} {count:7,}  {found['mean']:6.2f}", [r["accuracy"] for r in runs], flush=True)
    return found


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each network.")] = 3,
    networks: Annotated[str, typer.Option(help="Parts of names, separated by commas.")] = "",
    output: Annotated[Path, typer.Option(help="The JSON.")] = DATA,
) -> None:
    """Train, print, and write the numbers."""
    words = networks.split(",")
    chosen = [name for name in NETWORKS if any(word in name for word in words)]
    if not chosen:
        raise typer.BadParameter(f"no network's name has {networks!r}: {', '.join(NETWORKS)}")
    recipe = {k: getattr(RECIPE, k) for k in ("steps", "batch", "rate", "momentum", "decay")}
    head = {"environment": environment("system"), "dtype": "float32", "recipe": recipe}
    record = begun(output, head, len(chosen) < len(NETWORKS))
    runs = {len(other["runs"]) for name, other in record["rows"].items() if name not in chosen}
    if runs - {seeds}:
        raise typer.BadParameter(f"the other networks of {output} have {min(runs)} runs each")
    finish(output, record, {name: row(name, seeds) for name in chosen}, NETWORKS)


if __name__ == "__main__":
    typer.run(main)
