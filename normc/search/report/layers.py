"""Layers: the rows of the hall of fame, and the lineages of those on the front."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from normc.search.archive import Archive, Record, mean, scores
from normc.search.export import ranked
from normc.search.outcome import Outcome
from normc.search.report.curves import spark
from normc.search.report.formulas import rendered
from normc.search.report.scores import Score, known_layer, score_list
from normc.search.report.svg import breakable, element, join

MOST_ROWS = 100
"""Of the table; all survivors are in the export."""

MOST_LINEAGES = 20
"""Of those that are shown."""


@dataclass(frozen=True)
class Cell:
    """A number in a table: what it is sorted by, its text, how far it is from a known layer."""

    value: float | None = None
    text: str = ""
    difference: str = ""


@dataclass(frozen=True)
class Row:
    """A candidate, or a known layer."""

    rank: int  # from 1, 0 for a known layer
    number: int | None
    text: str
    math: Markup | None
    front: bool
    scores: list[Cell]
    again: list[Cell]  # under the longer schedule
    mean: Cell
    seconds: Cell


@dataclass(frozen=True)
class Step:
    """A layer of a lineage."""

    number: int
    math: Markup | None
    text: Markup  # in which is marked what is not in the text of its parent
    scores: list[str]
    gained: str  # on average, over its parent, where scores have an average


@dataclass(frozen=True)
class Winner:
    """A layer of the front, and where it comes from."""

    number: int
    math: Markup | None
    text: str
    steps: list[Step]
    spark: Markup | None  # of the average


# --- the hall of fame -----------------------------------------------------------------------------


def hall(archive: Archive) -> list[Row]:
    """The known layers, then the best survivors in order."""
    front = {r.candidate.number for r in archive.best}
    table = _Table(archive)
    best = ranked(archive)[:MOST_ROWS]
    rows = [table.row(i, r, r.candidate.number in front) for i, r in enumerate(best, 1)]
    return [table.known(n, o) for n, o in archive.references.items() if o.told] + rows


class _Table:
    """Makes rows, whose scores are all compared to the same known layer."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.list = score_list(archive)
        known = known_layer(archive.references)
        self.base = archive.references[known].scores if known else None

    def row(self, rank: int, record: Record, front: bool) -> Row:
        """Of a candidate."""
        assert record.outcome is not None
        one, outcome = record.candidate, record.outcome
        again = self.archive.reranked.get(one.number)
        cells = self._cells(again.told if again else None, None)
        return Row(rank, one.number, one.text, rendered(one.text), front,
                   self._cells(outcome.scores, self.base), cells, self._mean(outcome.scores),
                   _seconds(outcome))  # fmt: skip

    def known(self, name: str, outcome: Outcome) -> Row:
        """Of a known layer, of which a run keeps the name and the scores."""
        return Row(0, None, name, None, False, self._cells(outcome.scores, None),
                   self._cells(None, None), self._mean(outcome.scores),
                   _seconds(outcome))  # fmt: skip

    def _cells(self, found: Sequence[float] | None, base: Sequence[float] | None) -> list[Cell]:
        if found is None:
            return [Cell() for _ in self.list]
        return [
            Cell(value, score.text(value), score.difference(value, base[score.place]))
            if base
            else Cell(value, score.text(value))
            for score, value in zip(self.list, found, strict=True)
        ]

    def _mean(self, found: Sequence[float]) -> Cell:
        value = mean(found)
        return Cell(value, average(self.list).text(value))


def average(found: Sequence[Score]) -> Score:
    """How the average of scores is written: as an accuracy, if all of them are."""
    return Score(-1, "mean", all(s.accuracy for s in found))


def averages(found: Sequence[Score]) -> bool:
    """Whether the average of scores says something: accuracies and bytes have none."""
    return len(found) == 1 or average(found).accuracy


def _seconds(outcome: Outcome) -> Cell:
    return Cell(outcome.seconds, f"{outcome.seconds:.1f}")


# --- lineages -------------------------------------------------------------------------------------


def winners(archive: Archive) -> list[Winner]:
    """Those on the front, the best on average first, each with the layers it descends from."""
    return [_winner(archive, r) for r in archive.best[:MOST_LINEAGES]]


def _winner(archive: Archive, record: Record) -> Winner:
    chain = [archive.records[n] for n in reversed(archive.lineage(record.candidate.number))]
    parents = [None, *chain[:-1]]
    steps = [_step(archive, one, parent) for one, parent in zip(chain, parents, strict=True)]
    line = None
    if averages(score_list(archive)):
        line = spark([mean(scores(r)) for r in chain if r.sound])
    text = record.candidate.text
    return Winner(record.candidate.number, rendered(text), text, steps, line)


def _step(archive: Archive, record: Record, parent: Record | None) -> Step:
    one, found = record.candidate, score_list(archive)
    values = scores(record) if record.sound else ()
    texts = [s.text(v) for s, v in zip(found, values, strict=False)]
    if parent is None:
        return Step(one.number, rendered(one.text), breakable(one.text), texts, "")
    gained = ""
    if record.sound and parent.sound and averages(found):
        gained = average(found).difference(mean(values), mean(scores(parent)))
    text = marked(parent.candidate.text, one.text)
    return Step(one.number, rendered(one.text), text, texts, gained)


def marked(before: str, text: str) -> Markup:
    """A formula, in which the words are marked that are not in the one before it.

    >>> print(marked("tanh(x) + v0", "exp(x) + v0"))
    <mark>exp</mark>(<wbr>x) +<wbr> v0
    """
    old, new = (re.findall(r"\w+|\s+|.", t) for t in (before, text))
    match = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return join(
        breakable("".join(new[i:j]))
        if same == "equal"
        else element("mark", breakable("".join(new[i:j])))
        for same, _, _, i, j in match.get_opcodes()
        if i < j
    )
