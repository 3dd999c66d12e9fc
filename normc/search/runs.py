"""Runs: a search from its folder, begun, gone on with, and ranked again.

    RUN/search.sqlite       the run, see `normc.search.store`
    RUN/hall_of_fame.csv    its survivors, the best first
    RUN/lock                held by the process that works on it

Candidates are asked of the study, written down, evaluated by an engine, written down again, and
told to the study; a run that is killed anywhere in between goes on from what is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import filelock
import torch

from normc.errors import NormcError
from normc.language.zoo import ZOO
from normc.search.archive import Archive, Record, mean, scores
from normc.search.data import Images, load
from normc.search.engines import Engine, Inline, Job, Local
from normc.search.evaluate import check
from normc.search.evolve import Candidate, Study
from normc.search.export import hall_of_fame
from normc.search.objectives import Objective
from normc.search.outcome import Outcome
from normc.search.setting import Setting
from normc.search.store import NAME, Store

EngineName = Literal["local", "ray", "inline"]

REFERENCES = {"BatchNorm + ReLU": "bn_relu", "EvoNorm-B0": "evonorm_b0", "EvoNorm-S0": "evonorm_s0"}
"""The layers that every run evaluates first, to compare with; their names in the zoo."""

BASELINE = "BatchNorm + ReLU"
"""The one of them that others have to beat."""

GIVEN = "given:"
"""Before the digest of data that were passed, where a setting names its data."""

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


# --- from outside ---------------------------------------------------------------------------------


def run(
    folder: Path | str,
    setting: Setting | None = None,
    *,
    evaluations: int | None = None,
    minutes: float | None = None,
    workers: int = 1,
    engine: EngineName = "local",
    address: str | None = None,
    data: Images | None = None,
    objectives: Sequence[Objective] = (),
    watch: Callable[[Run], object] = lambda _: None,
) -> Archive:
    """Search, from the beginning, in a new folder; the archive of all that was found.

    ``data`` and ``objectives`` are Python objects in place of, or beside, those that the setting
    names. The engine "inline" evaluates in this process, without limits. ``watch`` is called again
    and again with the `Run`, whose ``stopped`` it may set.
    """
    setting = _completed(setting or Setting(), data, objectives)
    check(setting, objectives)
    _fits(setting, workers)
    job = Job(setting, data or load(setting.data), tuple(objectives))
    budget = Budget(evaluations, minutes)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        notes = {**versions(), "budget": _text(budget)}
        with _closing(Store.create(place / NAME, setting, notes)) as store:
            made = Run.of(store, budget)
            return _go(place, made, _engine(engine, job, workers, address), watch)


def resume(
    folder: Path | str,
    *,
    evaluations: int | None = None,
    minutes: float | None = None,
    workers: int = 1,
    engine: EngineName = "local",
    address: str | None = None,
    data: Images | None = None,
    objectives: Sequence[Objective] = (),
    watch: Callable[[Run], object] = lambda _: None,
) -> Archive:
    """Go on with a search; without an end of its own, to the one that it was begun with.

    ``evaluations`` counts those from before, ``minutes`` does not. Data and objectives that were
    passed at the beginning are passed again.
    """
    place = Path(folder)
    with _alone(place), _closing(Store.open(place / NAME)) as store:
        setting = store.setting()
        job = Job(setting, _images(setting, data), tuple(objectives))
        check(setting, objectives)
        _fits(setting, workers)
        given = evaluations is not None or minutes is not None
        budget = Budget(evaluations, minutes) if given else _budget(store.notes()["budget"])
        made = Run.of(store, budget)
        return _go(place, made, _engine(engine, job, workers, address), watch)


def rerank(
    folder: Path | str,
    top: int = 10,
    times: float = 4.0,
    *,
    workers: int = 1,
    data: Images | None = None,
    objectives: Sequence[Objective] = (),
    watch: Callable[[int, Outcome], object] = lambda _, __: None,
) -> dict[int, Outcome]:
    """Train the best on average again, ``times`` as long; outcomes by number, the best first.

    Weights and batches are those of the next seed, so that luck does not count twice. Outcomes
    that the run has already, from a rerank before, are kept.
    """
    place = Path(folder)
    with _alone(place), _closing(Store.open(place / NAME)) as store:
        archive = store.archive()
        setting = archive.setting
        job = Job(_longer(setting, times), _images(setting, data), tuple(objectives))
        best = sorted(archive.scored, key=lambda r: (-mean(scores(r)), r.candidate.number))[:top]
        found = dict(archive.reranked)
        wanted = [r.candidate for r in best if r.candidate.number not in found]
        for number, outcome in _evaluated(Local(job, workers), wanted):
            store.rerank(number, outcome)
            watch(number, outcome)
            found[number] = outcome
        _written(place, store.archive())
    ranked = [(n, o) for n, o in found.items() if o.told]
    return dict(sorted(ranked, key=lambda one: -mean(one[1].scores)))


def read(folder: Path | str) -> tuple[Archive, dict[str, str]]:
    """What is written of a run, and the notes on it; it may be running meanwhile."""
    with _closing(Store.open(Path(folder) / NAME)) as store:
        return store.archive(), store.notes()


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"normc": version("normc"), "torch": torch.__version__}


def _go(place: Path, made: Run, engine: Engine, watch: Callable[[Run], object]) -> Archive:
    try:
        made.work(engine, watch)
    finally:
        engine.close()
        _written(place, made.archive)
    return made.archive


def _evaluated(engine: Engine, candidates: Sequence[Candidate]) -> Generator[tuple[int, Outcome]]:
    left = len(candidates)
    try:
        for c in candidates:
            engine.submit(c.number, c.text)
        while left:
            for found in engine.finished(TICK):
                left -= 1
                yield found
    finally:
        engine.close()


def _fits(setting: Setting, workers: int) -> None:
    lag = setting.evolution.lag
    if not 1 <= workers <= lag:
        raise NormcError(
            f"{workers} workers: expected 1 to {lag}, the candidates that the setting lets be "
            "under evaluation at the same time (evolution.lag)"
        )


def _engine(name: EngineName, job: Job, workers: int, address: str | None) -> Engine:
    if name == "ray":
        from normc.search.ray_engine import RayEngine

        return RayEngine(job, workers, address)
    return Inline(job) if name == "inline" else Local(job, workers)


def _completed(setting: Setting, data: Images | None, objectives: Sequence[Objective]) -> Setting:
    """The setting with the names of what is passed."""
    names = tuple(o.name for o in objectives if o.name not in setting.objectives)
    content = setting.data if data is None else GIVEN + data.digest
    return replace(setting, data=content, objectives=(*setting.objectives, *names))


def _images(setting: Setting, data: Images | None) -> Images:
    """The images of a run that is gone on with."""
    if not setting.data.startswith(GIVEN):
        return data or load(setting.data)
    if data is None or GIVEN + data.digest != setting.data:
        raise NormcError("this run was begun with data of its own: pass the same ones again")
    return data


def _longer(setting: Setting, times: float) -> Setting:
    recipe = replace(setting.recipe, steps=max(1, round(times * setting.recipe.steps)))
    evolution = replace(setting.evolution, seed=setting.evolution.seed + 1)
    return replace(setting, recipe=recipe, evolution=evolution)


def _written(place: Path, archive: Archive) -> None:
    """The hall of fame, which appears whole or stays as it was."""
    room = place / "hall_of_fame.csv.new"
    room.write_text(hall_of_fame(archive), encoding="utf-8")
    room.replace(place / "hall_of_fame.csv")


def _text(budget: Budget) -> str:
    return json.dumps([budget.evaluations, budget.minutes])


def _budget(text: str) -> Budget:
    evaluations, minutes = json.loads(text)
    return Budget(evaluations, minutes)


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Keep other processes from working on the same run."""
    if not folder.is_dir():
        raise NormcError(f"there is no run: {folder} is not a folder")
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise NormcError(f"another process is working on {folder}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _closing(store: Store) -> Generator[Store]:
    try:
        yield store
    finally:
        store.close()
