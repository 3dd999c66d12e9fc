"""Print the page and the plot of the CPU benchmark: ``python -m benchmarks.report``.

Both follow from the JSON that `benchmarks.cpu` writes, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import exp, log
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.pages import table
from benchmarks.rows import GEOMETRIC, OTHER, ROWS
from normc.analysis.contest import BOTH, FORWARD
from normc.analysis.providers import OURS

DATA = Path(__file__).parents[1] / "docs" / "benchmarks" / "cpu.json"
INDUCTOR, EAGER = "inductor", "eager"

Entry = Mapping[str, Any]
Group = tuple[str, str, int]
"""Entries of one table: dtype, layout and size."""

USUAL = ("float32", "contiguous")
"""What the targets and the plot are of."""

PAGE = """\
# Benchmarks on the CPU

Printed by `make bench` from [cpu.json](cpu.json), which holds every number in full.

{environment}

Each row is measured in a process of its own. In it all providers take turns: a round calls each
once, in an order that changes from round to round, and a ratio is the median of the ratios within
the rounds. Before that, every provider is compared with the oracle in float64; ours has to be in
tolerance.

* **floor**: the time in which `copy_` of x, measured in the same rounds, moves as many bytes as
  forward and backward have to read and write, given here in A, the bytes of x. A copy moves 2A.
* **x inductor** and **x eager** say how many times as long these take. Eager is the layer as one
  writes it in torch ([peers.py](../../benchmarks/peers.py)), inductor `torch.compile` of it. With a
  star, eager is torch's own function for the layer.
* **saved** is what forward keeps for backward beside x, other inputs, parameters and results, which
  live anyway.
* All columns but the first time are of forward with backward; that time has its 20th and 80th
  percentile in brackets. A ratio has its target there, if it has one, and is judged as printed.

![time in units of the floor](cpu.svg)
"""


def main(
    data: Annotated[Path, typer.Argument(help="What benchmarks.cpu has written.")] = DATA,
    plot: Annotated[bool, typer.Option(help="Also the SVG, which needs matplotlib.")] = True,
) -> None:
    """Write the page and the plot beside the JSON."""
    entries = json.loads(data.read_text("utf-8"))
    data.with_suffix(".md").write_text(page(entries.values()), encoding="utf-8")
    if plot:
        draw(grouped(entries.values()), data.with_suffix(".svg"))


def grouped(entries: Iterable[Entry]) -> dict[Group, list[Entry]]:
    """The entries by table, the usual ones first; within one, in the order of the rows."""
    order = {name: i for i, name in enumerate(ROWS)}
    groups: dict[Group, list[Entry]] = {}
    for e in sorted(entries, key=lambda e: order[e["row"]]):
        groups.setdefault((e["dtype"], e["layout"], e["size"]), []).append(e)
    return {g: groups[g] for g in sorted(groups, key=lambda g: (g[:2] != USUAL, *g))}


# --- the page ------------------------------------------------------------------------------------


def page(entries: Iterable[Entry]) -> str:
    """The Markdown page."""
    groups = grouped(entries)
    every = [e for group in groups.values() for e in group]
    parts = [PAGE.format(environment=_environments(every))]
    return "\n".join([*parts, *(_section(group, found) for group, found in groups.items())])


def _environments(entries: list[Entry]) -> str:
    """The machines and versions that the entries were measured with, each once."""
    seen: dict[str, set[str]] = {}
    for e in entries:
        of = e["environment"]
        text = (
            f"{of['cpu']}, {of['threads']} threads, torch {of['torch']}, normc {of['normc']}, "
            f"{of['compiler']}, Python {of['python']}, memory: {of['malloc']}"
        )
        seen.setdefault(text, set()).add(of["date"])
    return "\n".join(f"* {text} ({_span(dates)})" for text, dates in seen.items())


def _span(dates: set[str]) -> str:
    first, last = min(dates), max(dates)
    return first if first == last else f"{first} to {last}"


def _section(group: Group, entries: list[Entry]) -> str:
    dtype, layout, size = group
    aimed = group[:2] == USUAL
    head = ["layer", "floor", "forward ms", "forward+backward ms", "/ floor", "x inductor",
            "x eager", "saved: ours, inductor, eager"]  # fmt: skip
    last = [OTHER] if layout == "channels_last" else []
    head += ["x ours, channels first"] if last else []
    rows = [_cells(e, aimed, last) for e in entries]
    shown = table(head, [*rows, _means(entries, aimed, len(head))])
    wide = "" if dtype == "float32" else " as float32"
    title = f"{dtype}, {layout.replace('_', ' ')}, tensors of {size} MB{wide}"
    return f"## {title}\n\n{shown}\n\n{_slower(entries)}\n"


def _cells(e: Entry, aimed: bool, more: list[str]) -> list[str]:
    both, forward = e["passes"][BOTH], e["passes"][FORWARD]
    of, target = both["times"], ROWS[e["row"]].target
    saved = [f"{e['saved'][who]['rest'] / e['bytes']:.2f}" for who in (OURS, INDUCTOR, EAGER)]
    star = "*" if e["native"] else ""
    return [
        f"`{e['row']}`",
        f"{both['floor']}A",
        f"{forward['times'][OURS]['ms']:.2f}",
        "{ms:.2f} ({p20:.2f}-{p80:.2f})".format(**of[OURS]),
        most(of[OURS]["over_floor"], target.over_floor if aimed else None),
        least(of[INDUCTOR]["times_ours"], target.inductor if aimed else None),
        least(of[EAGER]["times_ours"], target.eager if aimed else None) + star,
        ", ".join(saved) + " A",
        *(f"{of[name]['times_ours']:.2f}" for name in more),
    ]


def _means(entries: list[Entry], aimed: bool, columns: int) -> list[str]:
    """The geometric means, as a row of the table."""
    times = [e["passes"][BOTH]["times"] for e in entries]
    floor = geometric(t[OURS]["over_floor"] for t in times)
    inductor, eager = (geometric(t[who]["times_ours"] for t in times) for who in (INDUCTOR, EAGER))
    cells = ["geometric mean", "", "", "", f"{floor:.2f}"]
    cells += [least(inductor, GEOMETRIC if aimed else None), f"{eager:.2f}"]
    return cells + [""] * (columns - len(cells))


def _slower(entries: list[Entry]) -> str:
    """Which rows lose against which provider, in which pass."""
    lost = [
        f"`{e['row']}` {name} against {who} ({found['times'][who]['times_ours']:.2f}x)"
        for e in entries
        for name, found in e["passes"].items()
        for who in (INDUCTOR, EAGER)
        if round(found["times"][who]["times_ours"], 2) < 1
    ]
    return f"Slower: {'; '.join(lost)}." if lost else "No row is slower than any other provider."


def most(value: float, target: float | None) -> str:
    """A ratio that should be small, with its target: ``1.20 ✗ (1.15)``."""
    return _judged(value, target, target is not None and round(value, 2) <= target)


def least(value: float, target: float | None) -> str:
    """A ratio that should be large, with its target: ``3.10 ✓ (3)``."""
    return _judged(value, target, target is not None and round(value, 2) >= target)


def _judged(value: float, target: float | None, met: bool) -> str:
    return f"{value:.2f}" if target is None else f"{value:.2f} {'✓' if met else '✗'} ({target:g})"


def geometric(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))


# --- the plot ------------------------------------------------------------------------------------

COLOURS = {OURS: "#0b6e99", INDUCTOR: "#e0a030", EAGER: "#b0b0b0"}
LEFT = 0.5  # where the axis begins: noise may put what is at the floor below it


def draw(groups: Mapping[Group, list[Entry]], path: Path) -> None:
    """Time over floor of forward with backward: float32 in the usual layout, a panel per size."""
    import matplotlib

    matplotlib.use("svg")
    # The same file for the same numbers: names of paths by a fixed salt, text as text, no date.
    matplotlib.rcParams.update({"svg.hashsalt": "normc", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    chosen = {g: found for g, found in groups.items() if g[:2] == USUAL}
    longest = max(map(len, chosen.values()))
    figure, panels = pyplot.subplots(
        1, len(chosen), figsize=(5.2 * len(chosen), 0.9 + 0.42 * longest),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, (group, entries) in zip(panels[0], chosen.items(), strict=True):
        _panel(panel, f"{group[2]} MB", entries)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel: Any, title: str, entries: list[Entry]) -> None:
    """Three bars per row, the first row on top; logarithmic, with a line at the floor."""
    height = 0.27
    for shift, (who, colour) in enumerate(COLOURS.items()):
        values = [e["passes"][BOTH]["times"][who]["over_floor"] for e in entries]
        places = [-i + (1 - shift) * height for i in range(len(entries))]
        bars = panel.barh(
            places, [v - LEFT for v in values], height, left=LEFT, color=colour, label=who
        )
        panel.bar_label(bars, [f"{v:.1f}" for v in values], padding=2, fontsize=7)
    panel.set_xscale("log", base=2)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlim(LEFT, 32)
    ticks = [LEFT, 1, 2, 4, 8, 16, 32]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_yticks([-i for i in range(len(entries))], [e["row"] for e in entries])
    panel.set_title(f"forward + backward, {title}: time / floor")
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    typer.run(main)
