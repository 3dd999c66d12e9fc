"""Search view: a run on the screen; how far, how fast, what was rejected and why, what is best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from normc.search.archive import Archive
    from normc.search.outcome import Outcome
    from normc.search.runs import Run

ROWS = 8
"""Of the front, as many as a screen has room for."""

BAR = 24
"""Characters of the longest bar."""


def frame(folder: Path, run: Run) -> Group:
    """All of the screen."""
    archive = run.archive
    sides = Table.grid(padding=(0, 4))
    sides.add_row(
        _funnel("graphs screened", _screened(archive)), _funnel("candidates", _decided(archive))
    )
    return Group(_heading(folder, run), _rates(run, archive), Text(), sides, Text(), best(archive))


def _heading(folder: Path, run: Run) -> Text:
    how = run.setting.evolution
    text = Text(f"normc search {folder}", style="bold")
    text.append(
        f"   series {how.series}, seed {how.seed}, {how.strategy}, {run.setting.data}", "dim"
    )
    if run.stopped:
        text.append("   finishing what runs", "yellow")
    return text


def _rates(run: Run, archive: Archive) -> Text:
    """Time, and what has been decided in it; what came before a resume has no part in rates."""
    decided = sum(archive.statuses().values())
    fresh = decided - run.before
    rate = 60 * fresh / run.seconds if run.seconds else 0.0
    budget = run.budget
    of = f" of {budget.evaluations}" if budget.evaluations else ""
    until = f" of {budget.minutes:g} min" if budget.minutes else ""
    return Text(
        f"{run.seconds / 60:.1f}{until or ' min'}   {decided}{of} candidates decided, "
        f"{rate:.0f} a minute   {len(run.pending)} under evaluation   "
        f"{len(archive.scored)} with scores"
    )


def _screened(archive: Archive) -> dict[str, int]:
    from normc.search.screen import STAGES

    found = archive.screened()
    return {name: found[name] for name in ("screened", *STAGES, "passed") if found[name]}


def _decided(archive: Archive) -> dict[str, int]:
    from normc.search.outcome import STATUSES

    found = archive.statuses()
    return {name: found[name] for name in STATUSES if found[name]}


def _funnel(title: str, counts: Mapping[str, int]) -> Table:
    """Counts with bars."""
    table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left")
    table.add_column(style="cyan", no_wrap=True, min_width=10)
    table.add_column(justify="right", min_width=7)
    table.add_column(style="blue", min_width=BAR)
    most = max(counts.values(), default=1)
    for name, count in counts.items():
        table.add_row(name, str(count), "█" * max(1, round(BAR * count / most)))
    return table


def best(archive: Archive) -> Table:
    """The Pareto front, and below it the layers that it is compared with."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in archive.names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("formula", no_wrap=True, overflow="ellipsis", ratio=1)
    for record in archive.best[:ROWS]:
        table.add_row(*_cells(record.outcome), Text(record.candidate.text))
    for name, outcome in archive.references.items():
        table.add_row(*_cells(outcome), Text(name), style="dim")
    return table


def _cells(outcome: Outcome | None) -> list[str]:
    if outcome is None or outcome.told is None:
        return [outcome.status if outcome else ""]
    return [f"{score:.4f}" for score in outcome.scores]


def news(run: Run) -> str:
    """A line for where there is no screen: what is best on average by now."""
    archive = run.archive
    decided = sum(archive.statuses().values())
    head = f"{run.seconds:6.0f} s  {decided} decided, front {len(archive.best)}"
    if not archive.best:
        return head
    top = archive.best[0]
    return f"{head}: {' '.join(_cells(top.outcome))}  {top.candidate.text}"


def summary(archive: Archive) -> Group:
    """The end of a run."""
    total = sum(archive.screened().values()) and archive.screened()["screened"]
    counts = ", ".join(f"{count} {name}" for name, count in _decided(archive).items())
    return Group(
        Text(f"{total} graphs screened, {len(archive.records)} candidates: {counts or 'none'}\n"),
        best(archive),
    )


def ranking(archive: Archive, found: Mapping[int, Outcome]) -> Table:
    """What was trained for longer, the best first, with its scores before."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in archive.names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("formula", no_wrap=True, overflow="ellipsis", ratio=1)
    for number, outcome in found.items():
        record = archive.records[number]
        before = " ".join(_cells(record.outcome))
        table.add_row(*_cells(outcome), before, Text(record.candidate.text))
    return table
