"""Archive: all that a run has found, as its readers see it: report, hall of fame, exports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from normc.search.evolve import Candidate
from normc.search.objectives import score_names
from normc.search.outcome import Outcome
from normc.search.pareto import front, hypervolume
from normc.search.setting import Setting


@dataclass(frozen=True)
class Record:
    """A candidate, and what became of it."""

    candidate: Candidate
    outcome: Outcome | None  # None: still to be evaluated

    @property
    def sound(self) -> bool:
        """Whether it has scores."""
        return self.outcome is not None and self.outcome.told is not None


@dataclass(frozen=True)
class Archive:
    """A run; records in the order of their numbers, 0, 1, ..."""

    setting: Setting
    records: tuple[Record, ...]
    references: Mapping[str, Outcome] = field(default_factory=dict[str, Outcome])
    reranked: Mapping[int, Outcome] = field(default_factory=dict[int, Outcome])

    @property
    def names(self) -> tuple[str, ...]:
        """What the scores are of: one name for each place in an outcome's scores."""
        return score_names(self.setting)

    @property
    def scored(self) -> list[Record]:
        """Those with scores."""
        return [r for r in self.records if r.sound]

    @property
    def best(self) -> list[Record]:
        """Those on the Pareto front, the best on average first."""
        found = self.scored
        on_front = [found[i] for i in front([scores(r) for r in found])]
        return sorted(on_front, key=lambda r: (-mean(scores(r)), r.candidate.number))

    def screened(self) -> Counter[str]:
        """Graphs looked at before any training, by the stage that rejected them."""
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(record.candidate.screened)
        return total

    def statuses(self) -> Counter[str]:
        """Candidates by what became of them."""
        return Counter(r.outcome.status for r in self.records if r.outcome)

    def progress(self, records: Sequence[Record], reference: Sequence[float]) -> list[float]:
        """The hypervolume of the front after each of some records."""
        found: list[float] = []
        points: list[tuple[float, ...]] = []
        for record in records:
            if record.sound:
                points.append(scores(record))
                points = [points[i] for i in front(points)]
                found.append(hypervolume(points, reference))
            else:
                found.append(found[-1] if found else 0.0)
        return found

    def lineage(self, number: int) -> list[int]:
        """An individual and those it descends from, the oldest last."""
        found = [number]
        while (parent := self.records[found[-1]].candidate.parent) is not None:
            found.append(parent)
        return found


def scores(record: Record) -> tuple[float, ...]:
    """The scores of one that has some."""
    assert record.outcome is not None
    return record.outcome.scores


def mean(values: Sequence[float]) -> float:
    """The average of several scores."""
    return sum(values) / len(values)
