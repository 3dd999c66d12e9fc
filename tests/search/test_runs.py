"""Runs: the same archive by any number of workers, after a stop, and after being killed."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normc.errors import NormcError
from normc.search import runs
from normc.search.data import Images
from normc.search.objectives import Objective
from normc.search.setting import Setting
from normc.search.work import REFERENCES
from tests.search.killed import TINY, facts

pytestmark = pytest.mark.cpu

COUNT = 16
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end in one go."""
    return runs.run(tmp_path_factory.mktemp("whole"), TINY, engine="inline", evaluations=COUNT)


def test_a_run_decides_what_it_was_asked_for(whole, tmp_path):
    assert [r.candidate.number for r in whole.records] == list(range(COUNT))
    assert all(r.outcome for r in whole.records)
    assert {"ok", "quality"} <= set(whole.statuses())
    assert set(whole.references) == set(REFERENCES)
    assert whole.best and len({r.candidate.text for r in whole.records}) == COUNT


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_matter(whole, tmp_path, workers):
    found = runs.run(tmp_path, TINY, workers=workers, evaluations=COUNT)
    assert facts(found) == facts(whole)
    assert facts(runs.read(tmp_path)[0]) == facts(whole)


def test_a_run_that_was_stopped_goes_on(whole, tmp_path):
    def watch(run):
        run.stopped = len(run.records) >= 9

    part = runs.run(tmp_path, TINY, engine="inline", evaluations=COUNT, watch=watch)
    assert len(part.records) < COUNT and all(r.outcome for r in part.records)
    assert facts(runs.resume(tmp_path, engine="inline")) == facts(whole)
    again = runs.resume(tmp_path, engine="inline")
    assert facts(again) == facts(whole)
    more = runs.resume(tmp_path, engine="inline", evaluations=COUNT + 3)
    assert len(more.records) == COUNT + 3


def killed(folder, count, chance, kills):
    """Begin, and go on, until so many processes were killed; then let one finish."""
    command = [sys.executable, "-m", "tests.search.killed", str(folder), str(count)]
    for _ in range(kills):
        seen = _size(folder)
        process = subprocess.Popen(command, start_new_session=True, cwd=ROOT)
        while process.poll() is None and _size(folder) == seen:
            time.sleep(0.01)  # until it has written something
        time.sleep(chance.uniform(0, 0.5))
        done = process.poll() is not None
        if not done:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if done:
            break
    else:
        done = False
    subprocess.run(command, check=True, cwd=ROOT)
    return runs.read(folder)[0], done


def _size(folder):
    return sum(f.stat().st_size for f in Path(folder).glob("search.sqlite*"))


def test_a_run_that_is_killed_loses_nothing(whole, tmp_path):
    found, _ = killed(tmp_path, COUNT, random.Random(0), 2)
    assert facts(found) == facts(whole)


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_fifty_times_loses_nothing(tmp_path):
    count = 500
    whole = runs.run(tmp_path / "whole", TINY, engine="inline", evaluations=count)
    found, done = killed(tmp_path / "killed", count, random.Random(1), 50)
    assert not done, "it was finished before it was killed fifty times"
    assert facts(found) == facts(whole)


def test_two_processes_do_not_work_on_one_run(tmp_path):
    def watch(run):
        with pytest.raises(NormcError, match="another process"):
            runs.resume(tmp_path, evaluations=9)
        run.stopped = True

    runs.run(tmp_path, TINY, engine="inline", evaluations=2, watch=watch)
    with pytest.raises(NormcError, match="a run already"):
        runs.run(tmp_path, TINY, engine="inline", evaluations=2)


def test_data_and_objectives_of_ones_own_are_passed_again(tmp_path):
    chance = torch.Generator().manual_seed(0)
    images = torch.rand(40, 2, 6, 6, generator=chance)
    classes = torch.arange(40) % 3
    given = {
        "data": Images.of(images[:30], classes[:30], images[30:], classes[30:]),
        "objectives": [Objective("short", lambda trained: -len(trained.formula.text))],
        "engine": "inline",
    }
    found = runs.run(tmp_path, TINY, evaluations=8, **given)
    assert found.names == ("accuracy resnet", "short")
    best = [r for r in found.records if r.sound]
    assert best and all(r.outcome.scores[1] == -len(r.candidate.text) for r in best)
    with pytest.raises(NormcError, match="pass the same ones"):
        runs.resume(tmp_path, evaluations=9, objectives=given["objectives"])
    with pytest.raises(NormcError, match="no objective is called `short`"):
        runs.resume(tmp_path, evaluations=9, data=given["data"])
    assert len(runs.resume(tmp_path, evaluations=9, **given).records) == 9


def test_time_is_an_end_too(tmp_path):
    found = runs.run(tmp_path, TINY, engine="inline", minutes=0.02)
    assert found.records and all(r.outcome for r in found.records)


@pytest.mark.thorough
def test_the_best_are_trained_for_longer(tmp_path):
    archive = runs.run(tmp_path, TINY, engine="inline", evaluations=COUNT)
    few = min(3, len(archive.scored))
    found = runs.rerank(tmp_path, top=few, times=2)
    assert len(found) == few and set(found) <= {r.candidate.number for r in archive.scored}
    kept = runs.read(tmp_path)[0]
    assert kept.reranked == found and facts(kept) == facts(archive)
    lines = (tmp_path / "hall_of_fame.csv").read_text().splitlines()
    assert lines[0].startswith("formula,") and len(lines) == 1 + len(archive.scored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "needs an end"),
        ({"evaluations": 3, "workers": 5}, "expected 1 to 4"),
        ({"evaluations": 3, "setting": replace(TINY, data="nothing")}, "no data are called"),
        ({"evaluations": 3, "setting": replace(TINY, objectives=("speed",))}, "no objective"),
        ({"evaluations": 3, "setting": replace(TINY, architectures=("vgg",))}, "no architecture"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, change, message):
    setting = change.pop("setting", TINY)
    with pytest.raises(NormcError, match=message):
        runs.run(tmp_path / "new", setting, **change)
    assert not (tmp_path / "new" / "search.sqlite").exists()


def test_a_folder_without_a_run_is_named(tmp_path):
    for act in (runs.read, runs.resume, runs.rerank):
        with pytest.raises(NormcError, match="there is no run"):
            act(tmp_path / "none")


def test_a_setting_is_what_a_run_was_begun_with(whole):
    assert whole.setting == TINY and Setting.from_json(TINY.to_json()) == TINY
