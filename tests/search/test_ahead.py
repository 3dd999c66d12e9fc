"""Ahead: what is compiled without a GPU is what a GPU would have compiled, kernel by kernel."""

from dataclasses import replace

import pytest

from normc.backends import triton
from normc.backends.calls import Runner
from normc.search.ahead import Ahead
from normc.search.evaluate import Evaluation
from normc.search.nets import Scale
from normc.search.setting import Stability
from normc.search.training import Training
from tests.backends.stubs import Stubbed
from tests.search.faults import images, job

pytestmark = pytest.mark.aot

LAYER = "x*sigmoid(v*x)/batch_std(x)*gamma + beta"
OTHER = "tanh(x)/group_rms(x)*gamma + beta"

HOW = job(
    architectures=("mobilenet",),
    scale=Scale(8, (1, 1)),
    stability=Stability(steps=1, limit=float("inf")),
    backend="triton",
).setting


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Kernels in the order in which they are asked for: whether the cache on the disk has each."""
    found = []

    def listen(*, src, cache_hit, **_):
        found.append((src.name, cache_hit))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a knob once set asks it no more
    monkeypatch.setattr(triton.triton.knobs.compilation, "listener", listen)
    return found


@pytest.fixture
def gpu(monkeypatch):
    """Evaluates as on a GPU, but nothing is launched: numbers are whatever memory holds."""
    backend = triton.TritonBackend
    load = lambda self, jobs, sources: [Runner(job, Stubbed(self.choose)) for job in jobs]  # noqa: E731
    monkeypatch.setattr(backend, "load", load)
    monkeypatch.setattr(backend, "why_not", lambda self, dtype, device: "")
    monkeypatch.setattr(Training, "_finite", lambda self: True)
    # A CPU by another name: images lie in memory as they do for a GPU.
    return Evaluation(replace(HOW, device="cpu:0"), images())


@pytest.mark.slow
def test_an_evaluation_finds_all_its_kernels_in_the_cache(compiled, gpu):
    ahead = Ahead(HOW, images(), "sm_90")
    calls = ahead.calls(LAYER)
    assert ahead(LAYER) == len(calls) == len(set(calls))
    before = {name for name, hit in compiled if not hit}
    assert any("vjp_backward" in name for name in before), "second derivatives are among them"
    compiled.clear()
    assert gpu(LAYER).status == "ok"
    assert {name for name, _ in compiled} == before
    assert all(hit for _, hit in compiled)


@pytest.mark.thorough
@pytest.mark.slow
def test_those_of_another_layer_are_not_there(compiled, gpu):
    Ahead(HOW, images(), "sm_90")(LAYER)
    compiled.clear()
    assert gpu(OTHER).status == "ok"
    first = dict(reversed(compiled))
    assert first and not any(first.values())


def test_every_way_of_calling_a_layer_is_noted():
    ahead = Ahead(HOW, images(), "sm_90")
    calls = ahead.calls(LAYER)
    sizes = {call.shape[0] for call in calls}
    assert sizes == {HOW.recipe.batch, HOW.stability.batch, len(images().test)}
    modes = {call.options[0].split("|")[1] for call in calls}
    assert modes == {"track", "frozen", "batch"}
    assert {call.part for call in calls} == {"forward", "backward"}
    calm = replace(ahead, setting=replace(ahead.setting, stability=Stability(steps=0)))
    assert len(calm.calls(LAYER)) < len(calls)


def test_a_layer_that_triton_refuses_is_left_to_who_trains(monkeypatch):
    def refuse(*_):
        raise triton.BackendError("no")

    monkeypatch.setattr(triton, "compile_ahead", refuse)
    assert Ahead(HOW, images(), "sm_90")(LAYER) == 0


def test_nothing_is_compiled_for_a_gpu_that_normc_does_not_know():
    assert Ahead(HOW, images(), "")(LAYER) == 0
