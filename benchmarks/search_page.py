"""The page of two benchmarks, search and evolution: ``python -m benchmarks.search_page``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import table, where

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
PAGE = FOLDER / "search.md"

Record = Mapping[str, Any]

HEAD = """\
# How well a search works, and how fast it is

Printed by `python -m benchmarks.search_page` from [search.json](search.json), which
`python -m benchmarks.search` measures, and [evolution.json](evolution.json), by
`python -m benchmarks.evolution`.
"""


def page(speed: Record, quality: Record) -> str:
    """All of the page."""
    parts = [HEAD, *_evolution(quality), *_screening(speed["screening"]), *_loop(speed["loop"])]
    return "\n".join([*parts, "## Where", "", where(speed["environment"]), ""])


def _evolution(record: Record) -> list[str]:
    rows = record["rows"]
    wins = sum(r["evolution"]["hypervolume"] > r["random"]["hypervolume"] for r in rows)
    lines = [
        [
            str(row["seed"]),
            *(f"{row[s]['hypervolume']:.4f}" for s in ("random", "evolution")),
            *(str(row[s]["survivors"]) for s in ("random", "evolution")),
            f"{_best(row['random'])}<br>{_best(row['evolution'])}",
        ]
        for row in rows
    ]
    head = ["seed", "random", "evolution", "survivors, random", "evolution", "best on average"]
    return [
        "## Evolution against random search",
        "",
        f"{record['evaluations']} candidates each, from the same first graphs; digits, three "
        f"networks, the default setting. Hypervolume of the three accuracies above 0. Evolution "
        f"is ahead in **{wins} of {len(rows)}** seeds.",
        "",
        table(head, lines),
        "",
        "The best of random search above, that of evolution below it, with accuracies on resnet, "
        "mobilenet and efficientnet. In the same runs:",
        "",
        *[f"* {name}: {_accuracies(rows, name)}" for name in rows[0]["references"]],
        "",
    ]


def _best(run: Record) -> str:
    scores = " ".join(f"{100 * s:.1f}" for s in run["best"]["scores"])
    return f"`{run['best']['formula']}` ({scores})"


def _accuracies(rows: Sequence[Record], name: str) -> str:
    """The mean of a known layer over the seeds, per network."""
    every = [row["references"][name] for row in rows if row["references"][name]]
    means = [100 * sum(column) / len(every) for column in zip(*every, strict=True)]
    return ", ".join(f"{mean:.1f} %" for mean in means) + f" (mean of {len(every)} seeds)"


def _screening(found: Record) -> list[str]:
    counts, memory = found["counts"], found["mebibytes"]
    shares = [[name, f"{count:,}", f"{100 * count / counts['screened']:.1f} %"]
              for name, count in sorted(counts.items(), key=lambda one: -one[1])]  # fmt: skip
    rate = found["per_cpu_second"]
    return [
        "## Screening",
        "",
        f"{found['graphs']:,} random graphs of the paper's space, nothing trained: "
        f"**{rate['median']:,.0f} a second of one core** in the median of ten parts, at least "
        f"{rate['least']:,.0f} (target 2,000). {found['equal']:,} were equal to a layer that had "
        f"passed. The process held {memory[0]:.0f} MiB before, and after each tenth "
        f"{', '.join(f'{m:.0f}' for m in memory[1:])}.",
        "",
        table(["stage", "graphs", "share"], shares),
        "",
    ]


def _loop(found: Record) -> list[str]:
    rows = [
        [
            name,
            str(way["candidates"]),
            f"{way['per_minute']:.1f}",
            f"{way['normc_on_the_same']:.1f}",
            f"{way['normc_faster']:.2f}x",
        ]
        for name, way in found["per_minute"].items()
    ]
    head = ["the layer as", "candidates", "a minute", "normc on the same", "normc is faster"]
    return [
        "## Candidates decided, from the text to the scores",
        "",
        "One thread, one process, the ways in turns candidate by candidate, caches empty at the "
        "start: compiling is part of it. All but the layer is the same: convolutions, optimizer, "
        "data.",
        "",
        table(head, rows),
        "",
    ]


def main() -> None:
    """Print the page."""
    found = [json.loads((FOLDER / f).read_text("utf-8")) for f in ("search.json", "evolution.json")]
    PAGE.write_text(page(*found), encoding="utf-8")


if __name__ == "__main__":
    main()
