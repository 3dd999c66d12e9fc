"""Runs: a search from its folder, begun, gone on with, and ranked again.

RUN/search.sqlite       the run, see `normc.search.store`
RUN/hall_of_fame.csv    its survivors, the best first
RUN/lock                held by the process that works on it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import filelock
import torch

from normc.errors import NormcError
from normc.search.archive import Archive, mean, scores
from normc.search.data import Images, load
from normc.search.engines import Engine, Inline, Job, Local
from normc.search.evaluate import check
from normc.search.evolve import Candidate
from normc.search.export import hall_of_fame
from normc.search.objectives import Objective
from normc.search.outcome import Outcome
from normc.search.setting import Setting
from normc.search.store import NAME, Store
from normc.search.work import TICK, Budget, Run

EngineName = Literal["local", "ray", "inline"]

GIVEN = "given:"
"""Before the digest of data that were passed, where a setting names its data."""


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
