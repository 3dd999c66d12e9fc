"""Engines: each candidate gets its own outcome, once, whatever becomes of the others."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from normc.errors import NormcError
from normc.search import engines
from normc.search.data import Images
from normc.search.engines import Inline, Job, Local
from normc.search.objectives import Objective
from normc.search.setting import Limits
from tests.search import faults
from tests.search.faults import BAD, FAULT, GOOD, LOGGED, MIXED, PATIENCE, PROCESS, job, outcomes

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def closing():
    """Closes engines when the test ends."""
    made = []
    yield lambda engine: made.append(engine) or engine
    for engine in made:
        engine.close()


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What workers have written down: a list of words, with a time at the end, for each line."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("NORMC_TEST_LOG", str(path))

    def read(*start):
        lines = [line.split() for line in path.read_text().splitlines()]
        return [line for line in lines if line[: len(start)] == list(start)]

    return read


def until(condition, seconds=120):
    """Wait for something to happen."""
    for _ in range(int(seconds * 20)):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"it has not happened in {seconds} s")


def alive(pid):
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def timeless(outcome):
    return replace(outcome, seconds=0.0)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fault_is_the_outcome_of_its_candidate_and_of_no_other(closing):
    inline, local = Inline(job(FAULT)), closing(Local(job(FAULT), 2))
    expected = dict(zip(GOOD, outcomes(inline, GOOD), strict=True))
    assert len({o.scores for o in expected.values()}) > 1
    for text, outcome in zip(MIXED, outcomes(local, MIXED), strict=True):
        if text in BAD:
            status, reason = BAD[text]
            assert (outcome.status, outcome.scores) == (status, ()), text
            assert outcome.reason.startswith(reason)
        else:
            assert timeless(outcome) == timeless(expected[text])


def test_one_process_goes_on_after_errors_and_another_comes_after_a_death(closing):
    local = closing(Local(job(FAULT, PROCESS), 1))

    def pid():
        (found,) = outcomes(local, [GOOD[0]])
        number, threads = divmod(found.scores[-1], 1)
        assert threads == pytest.approx(0.001, abs=1e-4), "it computes on one thread"
        return int(number)

    local.submit(0, GOOD[0])
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGINT)  # as Ctrl-C does to all of a terminal's, here at its start
    assert [outcome.status for _, outcome in local.finished(PATIENCE)] == ["ok"]
    first = pid()
    assert first == process.pid
    assert [o.status for o in outcomes(local, ["x - 3", "x - 4"])] == ["memory", "failed"]
    assert pid() == first
    os.kill(first, signal.SIGINT)
    assert pid() == first
    os.kill(first, signal.SIGKILL)  # while it has nothing to do: no candidate is to blame
    until(lambda: not alive(first))
    assert pid() != first


def test_what_still_runs_ends_when_the_engine_is_closed(log):
    local = Local(job(LOGGED, limits=Limits(seconds=600.0)), 1)
    local.submit(0, "x - 500")
    local.submit(1, "x - 0")
    until(lambda: log("train", "x-500"))
    assert local.finished(0) == []
    (process,) = multiprocessing.active_children()
    began = time.perf_counter()
    local.close()
    assert time.perf_counter() - began < 3
    assert not process.is_alive() and not multiprocessing.active_children()
    assert local.finished(0) == []
    local.close()
    assert not log("trained")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_when_its_parent_is_killed(log):
    search = subprocess.Popen([sys.executable, "-m", "tests.search.faults"], cwd=ROOT)
    try:
        until(lambda: log("train"))
        ((*_, pid, _),) = log("train")
        assert alive(pid)
    finally:
        search.kill()
        search.wait()
    until(lambda: not alive(pid), 20)


# --- what is nobody's fault -----------------------------------------------------------------------


def test_a_worker_that_cannot_begin_ends_the_run_and_not_each_candidate(closing):
    local = closing(Local(job(data="cifar10:/nowhere"), 1))
    with pytest.raises(NormcError, match="a worker cannot begin: cannot read data_batch_1.bin"):
        outcomes(local, GOOD)


def test_so_does_a_layer_that_cannot_fail_and_fails(closing):
    local = closing(Local(job(backend="triton"), 1))  # which runs on a GPU
    with pytest.raises(NormcError, match="a worker cannot begin: BackendError: the Triton"):
        outcomes(local, GOOD)


@pytest.mark.thorough
def test_so_does_an_objective_that_workers_cannot_import(closing, capfd, monkeypatch):
    gone = types.ModuleType("gone")
    monkeypatch.setitem(sys.modules, "gone", gone)
    gone.measure = lambda trained: 0.0
    gone.measure.__module__, gone.measure.__qualname__ = "gone", "measure"
    local = closing(Local(job(Objective("gone", gone.measure)), 1))
    with pytest.raises(NormcError, match="workers end before they begin"):
        outcomes(local, GOOD)
    assert "No module named 'gone'" in capfd.readouterr().err


def test_so_does_one_that_cannot_travel(closing):
    local = closing(Local(job(Objective("here", lambda trained: 0.0)), 1))
    with pytest.raises(NormcError, match="a worker cannot be started: .*lambda"):
        local.submit(0, GOOD[0])


def test_without_pebble_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pebble", None)
    with pytest.raises(NormcError, match=r"pip install 'normc\[search\]'"):
        Local(job(), 1)


# --- in this process ------------------------------------------------------------------------------


def test_inline_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (found,) = outcomes(Inline(job(PROCESS)), [GOOD[0]])
        assert found.scores[-1] == pytest.approx(os.getpid() + 0.001, abs=1e-4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_travel_as_numbers_and_not_through_shared_memory(dtype):
    chance = torch.Generator().manual_seed(0)
    x = torch.randint(255, (12, 3, 6, 5), generator=chance).to(dtype)
    classes = torch.arange(12) % 4
    images = Images.of(x[:8], classes[:8], x[8:], classes[8:], crop=3)
    sent = Job(job(FAULT).setting, images, (FAULT,))
    found = ForkingPickler.loads(ForkingPickler.dumps(sent))
    assert isinstance(found, Job) and not images.train.is_shared()
    assert (found.setting, found.objectives) == (sent.setting, sent.objectives)
    for name, value in vars(images).items():
        other = getattr(found.images, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    assert ForkingPickler.loads(ForkingPickler.dumps(job(data="digits"))).images is None


# --- compiling ahead ------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.slow
def test_the_next_are_prepared_while_others_train(closing, log, monkeypatch):
    monkeypatch.setattr(engines, "begin_preparing", faults.begin_preparing)
    monkeypatch.setattr(engines, "prepare", faults.prepare)
    local = closing(Local(job(LOGGED, limits=Limits(seconds=4.0)), 1, preparers=1))
    assert local.depth == 2
    outcomes(local, ["x - 0.01"])  # now both processes are there
    texts = ["x - 1.5", "x - 0.4", "x - 0.5", "x - 0.1", "x - 0.2", "x - 0.3", "x - 0"]
    assert {o.status for o in outcomes(local, texts)} == {"ok"}
    when = {(what, text): float(end) for what, text, _, end in log()}
    for text in (text.replace(" ", "") for text in texts):
        assert when["prepare", text] < when["train", text]
    for text in ("x-0.4", "x-0.5"):
        assert when["train", "x-1.5"] < when["prepared", text] < when["trained", "x-1.5"]
    for text in ("x-0.1", "x-0.2", "x-0.3"):  # an error, a death, no end
        assert ("prepared", text) not in when
    assert {pid for what, _, pid, _ in log() if what.startswith("train")}.isdisjoint(
        pid for what, _, pid, _ in log() if what.startswith("prepare")
    )
