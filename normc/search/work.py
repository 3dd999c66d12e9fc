"""Work: a run while it is worked on.

Candidates are asked of the study, written down, evaluated by an engine, written down again, and
told to the study; a run that is killed anywhere in between goes on from what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from normc.errors import NormcError
from normc.language.zoo import ZOO
from normc.search.archive import Archive, Record
from normc.search.engines import Engine
from normc.search.evolve import Study
from normc.search.outcome import Outcome
from normc.search.setting import Setting
from normc.search.store import Store

REFERENCES = {"BatchNorm + ReLU": "bn_relu", "EvoNorm-B0": "evonorm_b0", "EvoNorm-S0": "evonorm_s0"}
"""The layers that every run evaluates first, to compare with; their names in the zoo."""

TICK = 0.5
"""Seconds after which who watches is called, whatever happens."""


@dataclass(frozen=True)
class Budget:
    """When no more candidates are asked for: after so many in all, or so much time."""

    evaluations: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.evaluations is None and self.minutes is None:
            raise NormcError("a search needs an end: a number of evaluations, or of minutes")


@dataclass
class Run:
    """A run while it is worked on."""

    store: Store
    setting: Setting
    study: Study
    budget: Budget
    records: list[Record]
    references: dict[str, Outcome]
    reranked: Mapping[int, Outcome]
    began: float = field(default_factory=time.monotonic)
    before: int = 0  # how many had been decided when it was begun or gone on with
    stopped: bool = False  # no more candidates; those under evaluation are finished
    pending: dict[int, str] = field(default_factory=dict[int, str])  # references are below zero

    @staticmethod
    def of(store: Store, budget: Budget) -> Run:
        """The run of a store, with all that is written there taken over."""
        archive = store.archive()
        study = Study(archive.setting.evolution, archive.setting.space)
        for record in archive.records:
            outcome = record.outcome
            told = None if outcome is None else outcome.told
            study.replay(record.candidate, told, outcome is not None)
        found = list(archive.records), dict(archive.references), archive.reranked
        before = sum(archive.statuses().values())
        return Run(store, archive.setting, study, budget, *found, before=before)

    def work(self, engine: Engine, watch: Callable[[Run], object] = lambda _: None) -> None:
        """Evaluate until the budget is spent, or until it is `stopped`."""
        self._begin(engine)
        while True:
            while self._wanted(engine):
                self._ask(engine)
            if not self.pending:
                break
            for number, outcome in engine.finished(TICK):
                self._told(number, outcome)
            watch(self)

    @property
    def archive(self) -> Archive:
        """All that is known by now."""
        return Archive(self.setting, tuple(self.records), self.references, self.reranked)

    @property
    def seconds(self) -> float:
        """Since it was begun or gone on with."""
        return time.monotonic() - self.began

    def _begin(self, engine: Engine) -> None:
        """Hand over what is written down without an outcome."""
        for place, (name, row) in enumerate(REFERENCES.items(), 1):
            if name not in self.references:
                self._submit(engine, -place, ZOO[row].text)
        for record in self.records:
            if record.outcome is None:
                self._submit(engine, record.candidate.number, record.candidate.text)

    def _wanted(self, engine: Engine) -> bool:
        spent = self.budget.minutes is not None and self.seconds >= 60 * self.budget.minutes
        most = self.budget.evaluations
        full = most is not None and len(self.study.candidates) >= most
        return not (self.stopped or spent or full) and (
            len(self.pending) < engine.depth and self.study.ready
        )

    def _ask(self, engine: Engine) -> None:
        candidate = self.study.ask()
        self.store.add(candidate)
        self.records.append(Record(candidate, None))
        self._submit(engine, candidate.number, candidate.text)

    def _submit(self, engine: Engine, number: int, text: str) -> None:
        self.pending[number] = text
        engine.submit(number, text)

    def _told(self, number: int, outcome: Outcome) -> None:
        del self.pending[number]
        if number < 0:
            name = list(REFERENCES)[-number - 1]
            self.store.refer(name, outcome)
            self.references[name] = outcome
            return
        self.store.tell(number, outcome)
        self.study.tell(number, outcome.told)
        self.records[number] = replace(self.records[number], outcome=outcome)
