"""The page of `benchmarks.latency`, from its numbers: ``python -m benchmarks.latency_page``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from normc.analysis.timing import quantile

DATA = Path(__file__).parents[1] / "docs" / "benchmarks" / "latency.json"

TARGETS = {"total": 250.0, "legal": 30.0}
"""Milliseconds, at most, that the median is to take."""

Record = Mapping[str, Any]

COLUMNS = {
    # of the table, with where their numbers are in an entry
    "front": ("ours", "front"),
    "ast": ("ours", "ast"),
    "ttgir": ("ours", "ttgir"),
    "llvm": ("ours", "llvm"),
    "ptxas": ("ours", "ptxas"),
    "rest": ("ours", "rest"),
    "total": ("ours", "total"),
    "legal": ("legal", "total"),
    "torch.compile": ("torch", "total"),
}

PAGE = """\
# How long compiling takes

Printed by `python -m benchmarks.latency` from [latency.json](latency.json), which holds all
numbers.

{environment}

Milliseconds from the text of a formula to machine code, forward and backward with every gradient,
float32, for an x of shape {shape} on {target}. The GPU is not there: nothing is run. The process
is warm, but nothing is kept: each kernel goes through all of Triton's stages. Each number is the
median of {rounds} rounds, in which all three take turns, formula by formula.

* **kernels**: how many are launched, and in brackets how many were compiled to choose among.
* **front**: parse, derive, schedule. **ast**: Python to Triton's IR. **ttgir**: layouts.
  **llvm**: LLVM, as far as PTX. **ptxas**: machine code. **rest**: importing the source, reading
  what a kernel asks of the GPU, files. Stages are summed over kernels: where two are compiled at
  the same time, they are more than the **total**.
* **legal**: the check that Triton accepts the kernels, which stops before LLVM.
* **torch.compile**: what its first call, forward and backward, takes beyond a second one, for the
  same formula as plain torch operations, its caches off, for the CPU of this machine. **x**: how
  many times the total that is.

"""


def page(record: Record) -> str:
    """The Markdown page."""
    of = record["environment"]
    about = {
        "environment": f"* {of['cpu']}, {of['threads']} threads, torch {of['torch']}, "
        f"triton {record['triton']}, normc {of['normc']}, Python {of['python']} ({of['date']})",
        "shape": f"({', '.join(map(str, record['shape']))})",
        "target": record["target"],
        "rounds": record["rounds"],
    }
    return PAGE.format(**about) + table(record) + "\n" + _notes(record["candidates"])


def table(record: Record) -> str:
    """A row per formula, then the median, judged if there is a target, and the 90th percentile."""
    entries = record["candidates"]
    rows = [["formula", "kernels", *COLUMNS, "x"], _rule(len(COLUMNS) + 3)]
    rows += [_row(entry) for entry in entries]
    rows += [_summary("median", 0.5, entries), _summary("90th percentile", 0.9, entries)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rule(count: int) -> list[str]:
    return ["---", *["---:"] * (count - 1)]


def _row(entry: Record) -> list[str]:
    ours = entry.get("ours", {})
    counts = f"{ours['kernels']:.0f} ({ours['compiled']:.0f})" if ours else ""
    cells = [_number(_cell(entry, column)) for column in COLUMNS]
    return [f"`{entry['name']}`", counts, *cells, _times(_ratio(entry))]


def _cell(entry: Record, column: str) -> float | None:
    who, what = COLUMNS[column]
    return entry.get(who, {}).get(what)


def _ratio(entry: Record) -> float | None:
    total, other = _cell(entry, "total"), _cell(entry, "torch.compile")
    return other / total if total and other else None


def _summary(title: str, share: float, entries: Sequence[Record]) -> list[str]:
    """A share of all formulas, column by column; only the median has targets."""
    cells: list[str] = []
    for column in COLUMNS:
        found = _known(_cell(entry, column) for entry in entries)
        target = TARGETS.get(column) if share == 0.5 else None
        cells.append(_judged(quantile(found, share), target) if found else "")
    ratios = _known(_ratio(entry) for entry in entries)
    return [title, "", *cells, _times(median(ratios)) if ratios and share == 0.5 else ""]


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _number(value: float | None) -> str:
    """Milliseconds, with a digit behind the point where there would be one before it."""
    return "" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _judged(value: float, target: float | None) -> str:
    """A number, and whether it is as small as it is to be, as printed."""
    shown = _number(value)
    if target is None:
        return shown
    return f"{shown} {'✓' if float(shown) <= target else '✗'} ({target:.0f})"


def _notes(entries: Sequence[Record]) -> str:
    """The random formulas in full, and why a number is missing."""
    lines = [f"* `{e['name']}`: {e['note']}" for e in entries if e["note"]]
    random = [e for e in entries if e["name"].startswith("random")]
    lines += [f"* `{e['name']}`: `{e['formula']}`" for e in random]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def main() -> None:
    """Write the page again."""
    record = json.loads(DATA.read_text("utf-8"))
    DATA.with_suffix(".md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
