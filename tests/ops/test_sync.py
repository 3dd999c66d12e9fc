"""Layer(sync=True) and convert_sync_norms: a batch spread over processes is one batch.

The processes of `tests.ops.sync_worker` run every case of its table; each is compared here with a
plain layer on the whole batch, and that with torch's: nn.SyncBatchNorm itself has no CPU.
"""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

import normc
from tests.ops.sync_worker import (
    CASES,
    COUNTED,
    OPEN,
    RAGGED,
    Case,
    as_rows,
    draw,
    findings,
    gradient,
    measure,
    skewed,
    step,
)

pytestmark = pytest.mark.cpu

EPS = torch.finfo(torch.float32).eps
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # of float64
WIDE = [name for name, case in CASES.items() if case.stored == torch.float64]
NARROW = [name for name in CASES if name not in WIDE]
PARTS = ["samples", "summed", "same"]
BATCH_NORM = normc.zoo["batch_norm"]


def found(name):
    """What each process found that took part; none may have failed."""
    every = [one[name] for one in findings("sync", 3) if name in one]
    failed = [one for one in every if isinstance(one, str) and "Traceback" in one]
    assert every and not failed, failed[0]
    return every


@cache
def whole(name):
    return measure(CASES[name].layer(), CASES[name])


def joined(part, every):
    """The processes' tensors as one process would have them."""
    if part == "same":
        for one in every[1:]:
            assert_close(one, every[0], rtol=0, atol=0, equal_nan=True)
        return every[0]
    rows = zip(*every, strict=True)
    return [torch.cat(row) if part == "samples" else sum(row) for row in rows]


# --- as one process on the whole batch ----------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", WIDE)
def test_as_one_process_on_the_whole_batch(name, part):
    """Values and gradients of samples; sums of losses and of parameters' gradients; buffers."""
    want = whole(name)[part]
    nan = CASES[name].kind == "nan"
    assert_close(joined(part, [one[part] for one in found(name)]), want, equal_nan=nan, **EXACT)
    assert nan or all(t.isfinite().all() for t in want)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NARROW)
def test_narrow_numbers_are_as_near_to_the_truth_as_those_of_one_process(name, part):
    case = CASES[name]
    wide = replace(case, dtype=torch.float64)
    truth = measure(wide.layer(), wide)[part]
    got = joined(part, [one[part] for one in found(name)])
    size = max(t.abs().max() for t in (case.part(None, 0, case.kind), *truth))
    for mine, plain, true in zip(got, whole(name)[part], truth, strict=True):
        assert mine.dtype == plain.dtype
        storing = true.abs().max() * (mine.is_floating_point() and torch.finfo(mine.dtype).eps)
        assert_no_worse(mine, plain, true, max(storing, 4 * size * EPS))


def assert_no_worse(mine, plain, true, least):
    error, allowed = ((t - true).abs().max() for t in (mine, plain))
    assert error <= max(2 * allowed, least), (error, allowed, least)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_as_torchs_batch_norm_on_the_whole_batch(momentum):
    name = {0.1: "batch_norm", None: "cumulative"}[momentum]
    theirs = nn.BatchNorm2d(4, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), CASES[name].layer().parameters(), strict=True):
            p.copy_(q)
    want = measure(theirs, CASES[name])
    for part in PARTS:
        assert_close(joined(part, [one[part] for one in found(name)]), want[part], **EXACT)


@pytest.mark.parametrize("name", OPEN)
def test_processes_may_have_images_of_different_sizes(name):
    every, case = found(f"ragged {name}"), Case(name)
    parts = [draw(shape, rank) for rank, shape in enumerate(RAGGED)]
    weights = [draw(shape, 10 + rank) for rank, shape in enumerate(RAGGED)]
    layer, x = case.layer(), torch.cat([as_rows(t) for t in parts]).requires_grad_()
    y = layer(x)
    (y * torch.cat([as_rows(t) for t in weights])).sum().backward()
    assert_close(joined("samples", [one["samples"] for one in every]), [y, x.grad], **EXACT)
    grads = [gradient(p) for p in layer.parameters()]
    assert_close(joined("summed", [one["summed"] for one in every]), grads, **EXACT)
    assert_close(joined("same", [one["same"] for one in every]), list(layer.buffers()), **EXACT)


@pytest.mark.parametrize("name", OPEN)
def test_an_input_may_want_no_gradient(name):
    every, case = found(f"first {name}"), Case(name)
    layer = case.layer()
    y = layer(case.part(None, 0))
    (y * case.part(None, 50)).sum().backward()
    assert_close(joined("samples", [one["samples"] for one in every]), [y, y], **EXACT)
    grads = [gradient(p) for p in layer.parameters()]
    assert_close(joined("summed", [one["summed"] for one in every]), grads, **EXACT)


@pytest.mark.parametrize("name", OPEN)
def test_gradients_of_narrow_inputs_are_rounded_once(name):
    """What passes through the statistics may cancel nearly all of what does not."""
    case = Case(name, stored=torch.bfloat16)
    layer, x = case.layer(), case.part(None, 0).requires_grad_()
    layer(x).backward((case.part(None, 1).bfloat16() + 30).double())
    plain = skewed(name, None, None)
    assert_no_worse(torch.cat(found(f"skewed {name}")), plain, x.grad, x.grad.abs().max() * 2**-8)


# --- what is exchanged --------------------------------------------------------------------------


@pytest.mark.parametrize("name, levels", list(zip(COUNTED, [0, 1, 1, 1, 2, 3], strict=True)))
def test_one_exchange_per_level_of_statistics_and_none_in_evaluation(name, levels):
    assert found(f"exchanges of {name}") == [[levels, levels, 0]] * 2


def stepped(layer, case):
    found = {"samples": [], "summed": []}
    names = ["x", *(i.name for i in layer.formula.inputs)]
    step(layer, case, None, case.inputs(None, names, 0), found)
    return found, list(layer.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["batch_norm", "nested", "two results", "group_norm"])
def test_without_other_processes_nothing_is_different(name, training, tmp_path):
    case = Case(name)
    want = stepped(case.layer().train(training), case)
    assert_close(stepped(case.layer(sync=True).train(training), case), want, rtol=0, atol=0)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        assert_close(stepped(case.layer(sync=True).train(training), case), want, rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "c"])
@pytest.mark.parametrize("name", ["batch_norm", "evonorm_b0", "nested", "maximum", "two results"])
def test_no_samples_have_zero_gradients(name, backend):
    """What an empty process adds to the sums of all; of the second order too."""
    case = Case(name, (0,), backend)
    got = measure(case.layer(), case)["summed"]
    assert_close(got, [torch.zeros_like(t) for t in got], rtol=0, atol=0)


# --- the module ---------------------------------------------------------------------------------


def test_repr_shows_sync_and_recreates_the_layer():
    layer = normc.Layer(BATCH_NORM, 6, sync=True)
    assert "sync=True" in repr(layer) and "sync" not in repr(normc.Layer(BATCH_NORM, 6))
    again = eval(repr(layer), {"Layer": normc.Layer})  # noqa: S307 - our own repr, in a test
    assert again.sync and repr(again) == repr(layer)


@pytest.mark.parametrize("sync", [True, False])
def test_state_travels_between_synchronized_and_plain_layers(sync):
    one, other = normc.Layer(BATCH_NORM, 4, sync=sync), normc.Layer(BATCH_NORM, 4, sync=not sync)
    nn.init.normal_(one.gamma)
    one(torch.randn(5, 4, 3))
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 4, 3)
    assert torch.equal(other.eval()(x), one.eval()(x))
    assert other.num_batches_tracked == 1 and list(other.state_dict()) == list(one.state_dict())


class Deep(nn.Module):
    """Layers at several depths, one of them twice, and one of torch's."""

    def __init__(self):
        super().__init__()
        self.first = normc.Layer(BATCH_NORM, 4)
        inner = nn.Sequential(nn.ReLU(), nn.Sequential(normc.Layer(normc.zoo["evonorm_b0"], 4)))
        self.rows = nn.ModuleDict({"a": inner})
        self.same = self.first
        self.plain = normc.Layer(normc.zoo["group_norm"], 4)
        self.untracked = normc.Layer("x/all_rms(x)", 4, track_running_stats=False)
        self.torchs = nn.BatchNorm2d(4)


def state_of(model):
    return [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]


def test_convert_changes_layers_with_batch_statistics_in_place():
    model = Deep()
    before = state_of(model)
    group = object()
    assert normc.convert_sync_norms(model, group) is model
    after = state_of(model)
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
    converted = {n for n, m in model.named_modules() if getattr(m, "sync", False)}
    assert converted == {"first", "rows.a.1.0", "untracked"}
    assert model.first.process_group is model.untracked.process_group is group
    assert model.plain.process_group is None and not model.plain.sync
    assert isinstance(model.torchs, nn.BatchNorm2d)


def test_convert_takes_a_model_that_is_a_layer_and_keeps_its_mode():
    layer = normc.Layer(BATCH_NORM, 4).eval()
    assert normc.convert_sync_norms(layer) is layer
    assert layer.sync and layer.process_group is None and not layer.training
    assert copy.deepcopy(layer).sync, "a copy is synchronized too"


def test_convert_follows_replace_norms():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    normc.convert_sync_norms(normc.replace_norms(model, "bn_relu"))
    assert model[1].sync
