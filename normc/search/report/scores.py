"""Scores: how each of them is written, compared and drawn; accuracies in per cent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normc.errors import NormcError
from normc.search.archive import Archive, scores
from normc.search.objectives import ACCURACY
from normc.search.outcome import Outcome
from normc.search.report.svg import MINUS, Axis, signed


@dataclass(frozen=True)
class Score:
    """One place in an outcome's scores."""

    place: int
    name: str
    accuracy: bool

    @property
    def label(self) -> str:
        """Its name, and its unit if it has one."""
        return f"{self.name}, %" if self.accuracy else self.name

    @property
    def factor(self) -> float:
        """What it is multiplied by to be read."""
        return 100.0 if self.accuracy else 1.0

    def text(self, value: float) -> str:
        """A value without its unit."""
        return signed(f"{100 * value:.1f}" if self.accuracy else f"{value:.4g}")

    def difference(self, value: float, other: float) -> str:
        """How much larger a value is than another, with a sign."""
        text = f"{100 * (value - other):+.1f}" if self.accuracy else f"{value - other:+.3g}"
        return "±0" if float(text) == 0 else signed(text)

    def axis(self, values: Sequence[float], pixels: tuple[float, float]) -> Axis:
        """An axis that holds all of some values; none ends much above 100 per cent."""
        return Axis.over(values, pixels, self.factor, 1.004 if self.accuracy else None)

    def of(self, outcome: Outcome) -> float:
        """Its value in an outcome that has scores."""
        return outcome.scores[self.place]


def score_list(archive: Archive) -> list[Score]:
    """The scores of a run, in order."""
    known = {f"{ACCURACY} {net}" for net in archive.setting.architectures}
    return [Score(i, name, name in known) for i, name in enumerate(archive.names)]


def check(archive: Archive) -> None:
    """Raise `NormcError` for scores that are not those that the run's setting names."""
    known = {name: o.told for name, o in archive.references.items()}
    again = {f"candidate {n}, re-ranked": o.told for n, o in archive.reranked.items()}
    own = {f"candidate {r.candidate.number}": scores(r) for r in archive.scored}
    for what, found in {**known, **again, **own}.items():
        if found is None:
            continue
        if len(found) != len(archive.names) or not all(map(math.isfinite, found)):
            raise NormcError(
                f"{what} has the scores {found}: expected numbers for {', '.join(archive.names)}"
            )


def origin(archives: Sequence[Archive]) -> list[float]:
    """Where a hypervolume is measured from: 0 for accuracies, else the worst that was seen."""
    found = [scores(r) for archive in archives for r in archive.scored]
    return [
        0.0 if score.accuracy else min((s[score.place] for s in found), default=0.0)
        for score in score_list(archives[0])
    ]


def known_layer(references: Mapping[str, Outcome]) -> str | None:
    """The name that BatchNorm with ReLU has among the known layers, if it has scores there."""
    for name, outcome in references.items():
        word = re.sub(r"[^a-z]", "", name.lower())
        if word in ("batchnormrelu", "bnrelu") and outcome.told is not None:
            return name
    return None


def seconds(value: float) -> str:
    """A time in words.

    >>> seconds(4.21), seconds(75), seconds(7330)
    ('4.2 s', '1 min 15 s', '2 h 2 min')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def share(part: int, whole: int) -> str:
    """A part in per cent; a small one is not rounded to nothing, nor a large one to everything."""
    if not part or not whole:
        return "0 %"
    value = 100 * part / whole
    if value < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if 99.9 < value < 100 else f"{value:.1f} %" if value < 100 else "100 %"


def number(value: int) -> str:
    """A whole number, in groups of three digits."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)
