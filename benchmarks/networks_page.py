"""The page of two benchmarks, networks and kn_conv: ``python -m benchmarks.networks_page``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pages import table, where

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
PAGE = FOLDER / "networks.md"

Record = Mapping[str, Any]

HEAD = """\
# Networks of four papers

Printed by `python -m benchmarks.networks_page` from [networks.json](networks.json), which
`python -m benchmarks.networks` measures, and [kn_conv.json](kn_conv.json), by
`python -m benchmarks.kn_conv`. The modules are those of [nn.md](../nn.md).
"""

DIGITS = """\
## Digits

Accuracy in percent on the 360 of scikit-learn's 1,797 digits that are kept for judging, {dtype},
all trained alike and none tuned: SGD with Nesterov momentum, the rate falling as a cosine;
{recipe}. The first four are one network with different layers, and so are the last two; between
them networks differ in more than their normalization.
"""

COSTS = """\
## What a KNConv costs beside a convolution

Layers of KNResNet-18 at low resolution, batches of {batch}, {dtype}, {threads} threads. Times are
multiples of the plain convolution's in the same rounds, medians; memory is in MB, without x's and
the parameters': what forward keeps for backward, and the most that torch holds at once in a step.
*conv* is the convolution alone; *KNConv* is in training with dropout 0.05; *eager* is the
same in torch's own operations; *unfold* is KernelNorm2d and a convolution with stride kernel.
What dropout costs is mostly drawing its numbers, one per element of x, which torch does on one
thread.
"""


def page(networks: Record, costs: Record) -> str:
    """All of the page."""
    places = [f"* {name}: {where(r['environment'])}" for name, r in
              (("digits", networks), ("KNConv", costs))]  # fmt: skip
    parts = [HEAD, *_networks(networks), *_costs(costs), "## Where", "", *places, ""]
    return "\n".join(parts)


def _networks(record: Record) -> list[str]:
    recipe = ", ".join(f"{k} {v}" for k, v in record["recipe"].items())
    rows = [
        [
            name,
            f"{row['parameters']:,}",
            *(f"{run['accuracy']:.1f}" for run in row["runs"]),
            f"{row['mean']:.1f}",
            f"{median(run['ms_a_step'] for run in row['runs']):.0f}",
        ]
        for name, row in record["rows"].items()
    ]
    seeds = [f"seed {run['seed']}" for run in next(iter(record["rows"].values()))["runs"]]
    told = DIGITS.format(dtype=record["dtype"], recipe=recipe)
    return [told, table(["network", "parameters", *seeds, "mean", "ms a step"], rows), ""]


def _costs(record: Record) -> list[str]:
    rows: list[list[str]] = []
    for name, row in record["rows"].items():
        before, after, kernel, _, side = row["layer"]
        shape = f"{name}: {before} to {after}, {kernel}x{kernel}, {side}x{side}"
        conv = row["conv"]
        rows.append([shape, "conv", f"{conv['forward_ms']:.1f} ms", f"{conv['both_ms']:.1f} ms",
                     *_memory(conv)])  # fmt: skip
        for key, shown in (("kn_conv", "KNConv"), ("no drop", "no dropout"), ("eager", "eager"),
                           ("unfold", "unfold")):  # fmt: skip
            one = row[key]
            ratios = [f"{one['forward_ratio']:.2f}x", f"{one['both_ratio']:.2f}x"]
            rows.append(["", shown, *ratios, *_memory(one)])
    threads = record["environment"]["threads"]
    told = COSTS.format(batch=record["batch"], dtype=record["dtype"], threads=threads)
    head = ["layer", "what", "forward", "with backward", "kept", "peak"]
    return [told, table(head, rows), ""]


def _memory(one: Record) -> list[str]:
    return [f"{one[name] / 1e6:.1f}" for name in ("kept", "peak")]


def main() -> None:
    """Print the page."""
    names = ("networks.json", "kn_conv.json")
    found = [json.loads((FOLDER / name).read_text("utf-8")) for name in names]
    PAGE.write_text(page(*found), encoding="utf-8")


if __name__ == "__main__":
    main()
