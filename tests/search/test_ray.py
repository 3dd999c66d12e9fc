"""Ray: the same outcomes as without it, also when machines of a cluster fail."""

import gc
import sys
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from normc.errors import NormcError
from normc.search import ray_engine, runs
from normc.search.engines import Inline, Local
from normc.search.objectives import Objective
from normc.search.ray_engine import RayEngine
from normc.search.setting import Limits
from tests.search.faults import FAULT, GOOD, LOGGED, MIXED, PATIENCE, job, outcomes
from tests.search.killed import TINY, facts

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def swept():
    """Ray leaves processes it has told to end to the garbage collector, which warns of them."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def closing():
    """Closes engines when the test ends."""
    made = []
    yield lambda engine: made.append(engine) or engine
    for engine in made:
        engine.close()
        engine.close()
    assert not ray.is_initialized()


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Where workers write down what they do, on any machine."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("NORMC_TEST_LOG", str(path))
    return path


@pytest.fixture
def cluster(log):
    """Two machines with room for one worker each, as Ray pretends them on this one."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    made.shutdown()


def parent(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def raylets(node):
    return [str(one.process.pid) for one in node.all_processes["raylet"]]


def timeless(found):
    return [replace(outcome, seconds=0.0) for outcome in found]


@pytest.mark.slow
def test_outcomes_are_those_without_ray(closing):
    there = outcomes(closing(RayEngine(job(FAULT), 2, None)), MIXED)
    here = outcomes(closing(Local(job(FAULT), 2)), MIXED)
    assert timeless(there) == timeless(here)
    assert len({o.status for o in there}) == 6


@pytest.mark.slow
def test_a_run_has_the_same_archive(tmp_path):
    here = runs.run(tmp_path / "here", TINY, engine="inline", evaluations=12)
    there = runs.run(tmp_path / "there", TINY, engine="ray", workers=2, evaluations=12)
    assert facts(there) == facts(here)


@pytest.mark.slow
def test_a_machine_that_fails_takes_no_candidate_with_it(cluster, closing, log):
    how = job(LOGGED, limits=Limits(seconds=100.0))
    texts = ["x - 8", "x - 0.5", "x - 0.25", "x - 0"]
    expected = outcomes(Inline(how), texts)
    log.write_text("")
    engine = closing(RayEngine(how, 2, cluster.address))
    for number, text in enumerate(texts):
        engine.submit(number, text)
    found = {}
    while "train x-8" not in log.read_text():
        assert 0 not in found
        found |= dict(engine.finished(0.1))
    (worker,) = (line.split()[2] for line in log.read_text().splitlines() if "train x-8" in line)
    raylet = parent(parent(worker))
    cluster.remove_node(next(n for n in cluster.nodes if raylet in raylets(n)))
    while len(found) < len(texts):
        found |= dict(engine.finished(PATIENCE))
    assert timeless(found[n] for n in range(len(texts))) == timeless(expected)
    assert log.read_text().count("train x-8") == 2


def test_what_still_runs_ends_when_the_engine_is_closed(log):
    engine = RayEngine(job(LOGGED, limits=Limits(seconds=600.0)), 1, None)
    engine.submit(0, "x - 500")
    while not log.read_text():
        assert engine.finished(0.1) == []
    began = time.perf_counter()
    engine.close()
    assert time.perf_counter() - began < 10
    assert not ray.is_initialized() and engine.finished(1) == []


def test_a_worker_that_cannot_begin_ends_the_run(closing):
    engine = closing(RayEngine(job(data="cifar10:/nowhere"), 1, None))
    with pytest.raises(NormcError, match="a worker cannot begin: cannot read data_batch_1.bin"):
        outcomes(engine, GOOD)


def test_so_does_an_objective_that_machines_cannot_import(closing, monkeypatch):
    gone = types.ModuleType("gone")
    monkeypatch.setitem(sys.modules, "gone", gone)
    gone.measure = lambda trained: 0.0
    gone.measure.__module__, gone.measure.__qualname__ = "gone", "measure"
    engine = closing(RayEngine(job(Objective("gone", gone.measure)), 1, None))
    with pytest.raises(NormcError, match="No module named 'gone'"):
        outcomes(engine, GOOD)


def test_machines_with_another_normc_are_refused(closing, monkeypatch):
    engine = closing(RayEngine(job(), 1, None))
    monkeypatch.setattr(ray_engine, "versions", lambda: {"normc": "0.0.1"})
    with pytest.raises(NormcError, match=r"has normc \d.*, this one 0.0.1"):
        outcomes(engine, GOOD)


def test_an_objective_of_the_script_itself_cannot_travel():
    def measure(trained):
        return 0.0

    measure.__module__ = "__main__"
    with pytest.raises(NormcError, match="`own` is of the script itself"):
        RayEngine(job(Objective("own", measure)), 1, None)


def test_a_cluster_that_is_not_there_is_an_error():
    with pytest.raises(NormcError, match="Ray is not reached at 127.0.0.1:1"):
        RayEngine(job(), 1, "127.0.0.1:1")


def test_without_ray_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NormcError, match=r"pip install 'normc\[ray\]'"):
        RayEngine(job(), 1, None)
