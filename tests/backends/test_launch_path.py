"""What a call of a compiled job does on the host: everything but the driver's own launch."""

import time
from contextlib import nullcontext

import pytest
import torch

import normc
from normc.backends.calls import Runner
from normc.backends.tile_choice import candidates
from normc.backends.triton import forced
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from tests.backends.stubs import Stubbed

pytestmark = pytest.mark.aot

SHAPE = (2, 64, 28, 28)


def prepared(name, only="", shape=SHAPE):
    """The forward job of a layer, its tensors, and the job bound to them."""
    job = all_jobs(normc.zoo[name], Target("triton", "float32"))[0]
    stub = Stubbed(candidates)
    Stubbed.launched.clear()
    given = {"x": torch.randn(shape)}
    small = [i for i in job.plan.program.inputs if i.name != "x"]
    given |= {i.name: torch.randn(shape[1]) for i in small}
    with forced(only) if only else nullcontext():
        bound = Runner(job, stub).bind(Geometry.of(shape), given)
    bound(given, 1e-5)
    return bound, given


def test_a_repeated_call_takes_microseconds():
    """8 to 9 us on a laptop's core; the bound leaves room for a busy machine."""
    bound, given = prepared("evonorm_s0")
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(500):
            bound(given, 1e-5)
        best = min(best, (time.perf_counter() - began) / 500)
    assert best < 30e-6


def test_a_call_passes_addresses_and_numbers():
    bound, given = prepared("evonorm_s0")
    done = bound(given, 1e-5)
    (silent,) = Stubbed.launched.values()
    programs, _, _, stream, *rest = silent.calls[-1]
    assert stream == 7 and programs > 1
    places = [given[name].data_ptr() for name in ("x", "gamma", "v", "beta")]
    places += [done["y"].data_ptr()]
    assert rest[5 : 5 + len(places)] == places
    assert not any(isinstance(value, torch.Tensor) for value in rest)
    assert not any(type(value) is float and value != 1e-5 for value in rest), "sizes are whole"


def test_tensors_that_are_not_aligned_get_kernels_of_their_own():
    bound, given = prepared("evonorm_s0")
    before = len(Stubbed.launched)
    wide = torch.randn(SHAPE[0] * SHAPE[1] * 28 * 28 + 1)[1:].reshape(SHAPE)
    bound(given | {"x": wide}, 1e-5)
    assert len(bound.ready) == 2 and before == 1
    bound(given, 1e-5)
    assert len(bound.ready) == 2


def test_counters_of_meetings_are_kept_per_stream_and_made_anew_for_a_graph(monkeypatch):
    bound, given = prepared("batch_norm", "cluster", (64, 4, 56, 56))
    (silent,) = Stubbed.launched.values()
    (ready,) = bound.ready.values()
    (counter,) = ready.counted[7]
    assert counter.dtype == torch.int64 and not counter.any()
    place = counter.data_ptr()
    bound(given, 1e-5)
    assert place in silent.calls[-1]
    monkeypatch.setattr(Stubbed, "stream", lambda self, tensor: None)  # a graph is captured
    bound(given, 1e-5)
    assert place not in silent.calls[-1] and list(ready.counted) == [7]
