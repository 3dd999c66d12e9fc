"""Which dtype is computed in and which comes out: autocast, mixed dtypes, gradient scaling.

torch's own norms say which dtype comes out; how near a number is to the truth is judged by float64,
on what the narrow numbers are.
"""

import copy
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normc

pytestmark = pytest.mark.cpu

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EVERY = [F64, F32, BF16, F16]
HALVES = [BF16, F16]
BACKENDS = ["c", "torch"]
SHAPE = (4, 8, 6, 5)
ADD = "input r; h = x + r; h/channel_rms(h)*gamma, h"
NORMS = {  # ours, and torch's of the same name
    "batch_norm": lambda: nn.BatchNorm2d(8),
    "group_norm": lambda: nn.GroupNorm(4, 8),
    "instance_norm": lambda: nn.InstanceNorm2d(8, affine=True),
}


def named(value):
    """A dtype in the name of a test."""
    return str(value).removeprefix("torch.")


on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_halves = pytest.mark.parametrize("half", HALVES, ids=named)
on_norms = pytest.mark.parametrize("name", NORMS)


def autocast(dtype, enabled=True):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def randn(*shape, seed=0, dtype=F32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def formula(name):
    return normc.zoo[name] if name in normc.zoo else normc.parse(name)


def layer_of(name, dtype=F32, **how):
    """A layer of eight channels whose parameters have left their start."""
    layer = normc.Layer(formula(name), 8, dtype=dtype, **{"groups": 4, **how})
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(1 + 0.3 * randn(*p.shape, seed=10 + i))
    return layer


def results_of(found):
    return found if isinstance(found, tuple) else (found,)


def cotangents_of(dtypes):
    """Of results that have the dtypes; the same numbers in each, but for rounding."""
    return [randn(*SHAPE, seed=20 + i, dtype=dtype) for i, dtype in enumerate(dtypes)]


def pull(call, given, params):
    """The results and all gradients."""
    x, more = given["x"], {name: t for name, t in given.items() if name != "x"}
    found = results_of(call(x, **more))
    cotangents = cotangents_of([y.dtype for y in found])
    grads = torch.autograd.grad(found, [*given.values(), *params], cotangents)
    return [y.detach() for y in found], list(grads)


def oracle(layer, given, dtypes):
    """The same in float64, on what the numbers are, for cotangents rounded to the dtypes."""
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    wide |= {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    found = results_of(normc.reference(layer.formula)(**wide, groups=4, eps=layer.eps))
    cotangents = [t.double() for t in cotangents_of(dtypes)]
    grads = torch.autograd.grad(found, list(wide.values()), cotangents)
    return [y.detach() for y in found], list(grads)


def assert_near(mine, true, computed, slack=0.0):
    """Within one rounding to the tensor's own dtype, and some in that of the computation."""
    for one, wide in zip(mine, true, strict=True):
        rtol = 1.01 * torch.finfo(one.dtype).eps / 2
        scale = 1 + wide.abs().max().item()
        atol = scale * (slack + 32 * torch.finfo(computed).eps) + torch.finfo(one.dtype).tiny
        assert_close(one.double(), wide, rtol=rtol, atol=atol)


def assert_true(layer, given, context=nullcontext, slack=0.0):
    """Results and gradients are near the truth; gradients have the dtypes of their tensors."""
    params = list(layer.parameters())
    with context():
        ours, grads = pull(layer, given, params)
    want, slopes = oracle(layer, given, [y.dtype for y in ours])
    computed = F64 if ours[0].dtype == F64 else F32
    assert_near(ours, want, computed)
    assert [g.dtype for g in grads] == [t.dtype for t in (*given.values(), *params)]
    assert_near(grads, slopes, computed, slack)
    return [y.dtype for y in ours]


def assert_alike(mine, wide, share=0.05):
    """The distance is a small share of the length, as of what a network in halves computes."""
    distance, length = (t.double().norm().item() for t in (mine.double() - wide.double(), wide))
    assert distance <= share * length + 1e-6, (distance, length)


# --- mixed dtypes -------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "grn"])
@pytest.mark.parametrize("dtype, params", list(product(EVERY, EVERY)), ids=named)
def test_every_dtype_of_x_with_every_dtype_of_parameters(dtype, params, name, backend):
    layer = layer_of(name, params, backend=backend)
    x = randn(*SHAPE, dtype=dtype).requires_grad_()
    assert assert_true(layer, {"x": x}) == [dtype]
    assert {b.dtype for b in layer.buffers()} <= {params, torch.long}
    y = layer.eval()(x)
    wide = copy.deepcopy(layer).double()(x.double())
    assert y.dtype == dtype
    assert_near([y], [wide], F64 if dtype == F64 else F32)


@on_backends
@pytest.mark.parametrize("offset, scale", [(0, 1e4), (100, 1), (-1000, 8)])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "evonorm_s0", "rms_norm"])
@on_halves
def test_statistics_of_halves_are_computed_in_float32(half, name, offset, scale, backend):
    """Squares of float16 overflow, and a sum in bfloat16 stands still after some 256 terms."""
    x = (offset + scale * randn(4, 8, 16, 17)).to(half)
    layer = layer_of(name, backend=backend)
    wide = normc.reference(layer.formula)(
        x.double(), groups=4, eps=layer.eps, **{n: p.double() for n, p in layer.named_parameters()}
    )
    with autocast(half):
        y = layer(x)
    assert y.dtype == half
    size = max(1, abs(offset) / scale)  # digits that x - mean loses
    atol = 64 * size * torch.finfo(F32).eps * wide.abs().max().item()
    assert_close(y.double(), wide, rtol=torch.finfo(half).eps / 2 * 1.01, atol=atol)


# --- autocast -----------------------------------------------------------------------------------


def as_torch(name):
    """Our layer and torch's, with the same parameters, which are float32."""
    ours, theirs = layer_of(name), NORMS[name]()
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    return ours, theirs


@on_norms
@on_halves
@pytest.mark.parametrize("dtype", [F32, *HALVES], ids=named)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_the_dtypes_that_it_gives_with_torchs_norms(training, dtype, half, name):
    """Of the result, and of all gradients; parameters and running statistics stay float32."""
    found = []
    for norm in (m.train(training) for m in as_torch(name)):
        x = randn(*SHAPE, dtype=dtype).requires_grad_()
        with autocast(half):
            y = norm(x)
        (y.float() * randn(*SHAPE, seed=1)).sum().backward()
        assert all(p.dtype == F32 for p in norm.parameters())
        found.append([y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    ours, theirs = ([t.dtype for t in one] for one in found)
    assert ours[:4] == theirs[:4] == [dtype, dtype, F32, F32]
    assert set(ours[4:]) <= {F32, torch.long}
    if dtype == F32:
        assert_close(found[0], found[1][: len(found[0])], rtol=1e-4, atol=1e-4)


def network(name, **how):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), layer_of(name, **how), nn.Flatten(), nn.Linear(72, 5)
    return nn.Sequential(*parts)


@on_halves
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "batch_norm", "layer_norm_tokens"])
def test_a_network_under_autocast(half, name):
    """Convolutions make halves; a layer takes and gives them, and what it learns is float32."""
    how = {"channel_dim": -3} if name == "layer_norm_tokens" else {}
    net, x = network(name, **how), randn(4, 3, 5, 5)
    wide = copy.deepcopy(net)
    seen = []
    net[1].register_forward_hook(lambda _, args, y: seen.extend([args[0].dtype, y.dtype]))
    with autocast(half):
        y = net(x)
    y.float().square().sum().backward()
    want = wide(x)
    want.square().sum().backward()
    assert [*seen, y.dtype] == [half] * 3
    assert_alike(y, want)
    for p, q in zip(net[1:].parameters(), wide[1:].parameters(), strict=True):
        assert p.dtype == p.grad.dtype == F32
        assert_alike(p.grad, q.grad)


@on_halves
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_half_activations_are_float32(half, momentum):
    """They are those of the activations to float32's digits: not rounded on the way."""
    layer = layer_of("batch_norm", momentum=momentum)
    wide = nn.BatchNorm2d(8, momentum=momentum, dtype=F64)
    for seed in range(4):
        x = (3 + randn(*SHAPE, seed=seed)).to(half)
        with autocast(half):
            layer(x)
        wide(x.double())
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(layer, name), getattr(wide, name)
        assert ours.dtype == F32
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    with autocast(half):
        assert layer.eval()(x).dtype == half


@on_backends
@on_halves
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_float64_is_left_alone(name, half, backend):
    layer = layer_of(name, F64, backend=backend)
    x = randn(*SHAPE, dtype=F64).requires_grad_()
    want = pull(layer, {"x": x}, list(layer.parameters()))
    with autocast(half):
        found = pull(layer, {"x": x}, list(layer.parameters()))
    assert_close(found, want, rtol=0, atol=0)
    assert want[0][0].dtype == F64


# --- autocast and several inputs ----------------------------------------------------------------

MIXED = [pair for pair in product(EVERY, EVERY) if pair[0] != pair[1]]


def pair_of(dtype, other):
    x, r = (randn(*SHAPE, seed=i, dtype=d) for i, d in enumerate((dtype, other)))
    return {"x": x.requires_grad_(), "r": r.requires_grad_()}


@on_backends
@pytest.mark.parametrize("dtype, other", MIXED, ids=named)
def test_under_autocast_the_widest_of_two_inputs_comes_out(dtype, other, backend):
    """As autocast promotes what `torch.addcmul` and its like are given; in halves, to float32."""
    layer = layer_of(ADD, backend=backend)
    given, half = pair_of(dtype, other), BF16
    found = assert_true(layer, given, partial(autocast, half))
    assert found == [torch.promote_types(dtype, other)] * 2


@on_backends
@pytest.mark.parametrize("dtype, other", MIXED, ids=named)
def test_without_autocast_results_have_the_dtype_of_x(dtype, other, backend):
    layer, given = layer_of(ADD, backend=backend), pair_of(dtype, other)
    found, grads = pull(layer, given, list(layer.parameters()))
    assert [y.dtype for y in found] == [dtype] * 2
    assert [g.dtype for g in grads] == [dtype, other, F32]
    rounded = {"x": given["x"], "r": given["r"].detach().to(dtype)}
    want, slopes = oracle(layer, rounded, [dtype] * 2)
    computed = F64 if dtype == F64 else F32
    assert_near(found, want, computed)
    slack = torch.finfo(dtype).eps  # backward reads the second result, as it was rounded
    assert_near([grads[0], grads[2]], [slopes[0], slopes[2]], computed, slack)
    assert_close(grads[1], grads[0].to(other), rtol=0, atol=0)


@on_halves
def test_small_inputs_decide_no_dtype(half):
    """A scale per sample and channel is no activation: x alone says what comes out."""
    layer = layer_of("input s[n,c]; x/group_rms(x)*(1 + s)")
    given = {"x": randn(*SHAPE, dtype=half), "s": randn(4, 8)}
    given = {name: t.requires_grad_() for name, t in given.items()}
    assert assert_true(layer, given, partial(autocast, half)) == [half]


# --- regions, compilers, checkpoints ------------------------------------------------------------


@on_halves
def test_a_region_without_autocast_within_one_with_it(half):
    net, x = network("evonorm_s0"), randn(4, 3, 5, 5)
    add = layer_of(ADD)
    with autocast(half):
        h = net[0](x)
        inside = net[1](h)
        with autocast(half, enabled=False):
            left, wide = net[1](h), net[1](h.float())
            mixed = add(h, r=h.float())
            with autocast(half):
                again = add(h, r=h.float())
        outer = add(h, r=h.float())
    assert [t.dtype for t in (h, inside, left, wide)] == [half, half, half, F32]
    assert torch.equal(left, inside)
    assert {t.dtype for t in mixed} == {half}
    assert {t.dtype for t in (*again, *outer)} == {F32}


def test_autocast_keeps_no_copy_of_parameters():
    """Its cache holds the weights it has cast; a step within a region is seen at once."""
    layer, x = layer_of("group_norm"), randn(*SHAPE, dtype=BF16)
    with autocast(BF16):
        before = layer(x)
        with torch.no_grad():
            layer.gamma.add_(1)
        after = layer(x)
    assert torch.equal(after, layer(x)) and not torch.equal(after, before)


@on_halves
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_backward_outside_and_inside_of_the_region_is_the_same(half, name):
    found = []
    for within in (True, False):
        net, x = network(name), randn(4, 3, 5, 5).requires_grad_()
        with autocast(half):
            loss = net(x).float().square().sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_close(found[0], found[1], rtol=0, atol=0)


@on_halves
def test_a_checkpoint_computes_again_under_the_same_autocast(half):
    """What it recomputes in backward has the dtypes that forward had, or torch complains."""
    found = []
    for run in (lambda net, x: net(x), partial(checkpoint, use_reentrant=False)):
        net, x = network("evonorm_s0"), randn(4, 3, 5, 5).requires_grad_()
        with autocast(half):
            loss = run(net, x).float().square().sum()
        loss.backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_close(found[0], found[1], rtol=0, atol=0)


@on_halves
def test_a_gradient_penalty_under_autocast(half):
    """The derivative of a derivative, whose tensors may be of several dtypes."""
    net, x = network("evonorm_s0"), randn(4, 3, 5, 5)
    want = penalized(copy.deepcopy(net), x, nullcontext())
    for mine, theirs in zip(penalized(net, x, autocast(half)), want, strict=True):
        assert mine.dtype == F32
        assert_alike(mine, theirs, 0.1)


def penalized(net, x, context):
    x = x.clone().requires_grad_()
    with context:
        (slope,) = torch.autograd.grad(net(x).float().square().sum(), x, create_graph=True)
        slope.float().square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@on_halves
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_compiled_under_autocast(name, half):
    net, x = network(name), randn(4, 3, 5, 5)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    found = []
    for call, model in ((net, net), (compiled, twin)):
        with autocast(half):
            y = call(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    assert found[1][0].dtype == half
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert mine.dtype == theirs.dtype
        assert_alike(mine, theirs, 0.01)


@pytest.mark.parametrize("dtype, other", [(BF16, F32), (F32, BF16), (BF16, F16)], ids=named)
@pytest.mark.parametrize("enabled", [True, False])
def test_two_inputs_compiled_under_autocast(enabled, dtype, other):
    layer, given = layer_of(ADD), pair_of(dtype, other)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for call in (layer, compiled):
        with autocast(BF16, enabled):
            found.append(pull(call, given, list(layer.parameters())))
    assert_close(found[1], found[0])
    assert found[1][0][0].dtype == (torch.promote_types(dtype, other) if enabled else dtype)


# --- gradient scaling ---------------------------------------------------------------------------

STEPS, PLANTED = 20, 7


def scaled_training(norm, half):
    """Losses, and the scale after every step, with an infinity in the images of one of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    x, y = randn(16, 1, 6, 6), torch.arange(16) % 2
    x[y == 1] += 0.5
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)
    losses, scales = [], []
    for turn in range(STEPS):
        images = x.clone()
        images[0, 0, 0, 0] = torch.inf if turn == PLANTED else images[0, 0, 0, 0]
        optimiser.zero_grad()
        with autocast(half):
            loss = nn.functional.cross_entropy(net(images), y)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert all(p.isfinite().all() for p in net.parameters()), "the step was skipped"
    return losses, scales


@on_halves
@pytest.mark.parametrize("name", ["group_norm", "batch_norm"])
def test_gradient_scaling_skips_the_steps_that_it_skips_with_torchs_norms(name, half):
    ours, theirs = as_torch(name)
    losses, scales = scaled_training(ours, half)
    want, steps = scaled_training(theirs, half)
    assert scales == steps
    assert scales[PLANTED] == scales[PLANTED - 1] / 2 and scales[-1] > scales[PLANTED]
    finite = [i for i in range(STEPS) if i != PLANTED]
    assert_close([losses[i] for i in finite], [want[i] for i in finite], rtol=0.05, atol=0.02)
    assert losses[-1] < 0.5 * losses[0]
