"""What is defined at the edges: few elements, NaN, strides, autograd's own rules, modules.

torch's layers are the measure where torch has one, the oracle in float64 where it has none. Longer
than most files, for each edge is one short test.
"""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import compress, product
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normc

pytestmark = pytest.mark.cpu

WIDE = torch.float64
SHAPE = (3, 4, 3, 2)
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # of float64
INF, NAN = float("inf"), float("nan")
BACKENDS = ["c", "torch"]
NAMES = ["batch_norm", "evonorm_b0", "evonorm_s0", "group_norm", "add_rms_norm"]
TRACKED = ["batch_norm", "evonorm_b0"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_names = pytest.mark.parametrize("name", NAMES)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=WIDE, generator=generator)


def layer_of(name, backend, **how):
    """A layer of four channels whose parameters have left their start."""
    layer = normc.Layer(normc.zoo[name], 4, backend=backend, **{"groups": 2, "dtype": WIDE, **how})
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(1 + 0.3 * randn(*p.shape, seed=10 + i))
    return layer


def inputs_of(layer, shape=SHAPE):
    names = ["x", *(i.name for i in layer.formula.inputs)]
    return {name: randn(*shape, seed=i).requires_grad_() for i, name in enumerate(names)}


def prepared(name, backend, shape=SHAPE, **how):
    layer = layer_of(name, backend, **how)
    return layer, inputs_of(layer, shape)


def oracle(layer):
    """The reference with the layer's own parameters: what it computes in training."""
    how = {"groups": layer.groups, "eps": layer.eps, "channel_dim": layer.channel_dim}
    return partial(normc.reference(layer.formula), **how, **dict(layer.named_parameters()))


def results(found):
    return found if isinstance(found, tuple) else (found,)


def weights(like, seed=20):
    return randn(*like.shape, seed=seed).to(like.dtype)


def loss(found):
    """A sum with weights: that of squares hardly depends on a normalized x."""
    return sum((y * weights(y, 20 + i)).sum() for i, y in enumerate(results(found)))


def step(call, given, params):
    """The results, and the gradients of all inputs and parameters."""
    x, more = given["x"], {name: t for name, t in given.items() if name != "x"}
    found = results(call(x, **more))
    every = [*given.values(), *params]
    return [*(y.detach() for y in found), *torch.autograd.grad(loss(found), every)]


def assert_as_oracle(layer, given):
    params = list(layer.parameters())
    assert_close(step(layer, given, params), step(oracle(layer), given, params))


def buffers(module):
    return {name: getattr(module, name) for name in BUFFERS if hasattr(module, name)}


def assert_same_buffers(ours, theirs, **how):
    own, other = buffers(ours), buffers(theirs)
    assert own
    assert_close(own, {name: other[name] for name in own}, **how)


TWINS = {  # torch's layer, and where it has the channels
    "batch_norm": (lambda: nn.BatchNorm2d(4), 1),
    "group_norm": (lambda: nn.GroupNorm(2, 4), 1),
    "layer_norm": (lambda: nn.GroupNorm(1, 4), 1),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), 1),
    "layer_norm_tokens": (lambda: nn.LayerNorm(4), -1),
    "rms_norm": (lambda: nn.RMSNorm(4, eps=1e-5), -1),
}


def twins(name, backend):
    make, dim = TWINS[name]
    ours, theirs = layer_of(name, backend, channel_dim=dim), make().double()
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    return ours, theirs


# --- few elements -------------------------------------------------------------------------------

NOTHING = [(0, 4, 3, 4), (2, 4, 0, 4), (0, 4, 0, 4)]
UNKNOWN = {  # where torch itself has an IndexError, or 0/0 in the gradient of the weight
    *(("instance_norm", shape) for shape in NOTHING if shape[0] == 0),
    *((name, (2, 4, 0, 4)) for name in ("group_norm", "layer_norm")),
}
KNOWN = [(name, shape) for name in TWINS for shape in NOTHING if (name, shape) not in UNKNOWN]


@on_backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "shape"), KNOWN)
def test_no_elements_as_in_torch(name, shape, training, backend):
    ours, theirs = (module.train(training) for module in twins(name, backend))
    given = {"x": randn(*shape).requires_grad_()}
    found = step(ours, given, ours.parameters())
    assert_close(found, step(theirs, given, theirs.parameters()))
    assert [t.shape for t in found[:2]] == [shape, shape]


@on_backends
@on_names
@pytest.mark.parametrize("training", [True, False])
def test_no_elements_leave_gradients_zero_and_running_statistics_alone(name, training, backend):
    for shape in NOTHING:
        layer, given = prepared(name, backend, shape)
        before = copy.deepcopy(buffers(layer.train(training)))
        before.pop("num_batches_tracked", None)
        assert_as_oracle(layer, given)
        found = step(layer, given, layer.parameters())
        assert all(not t.any() for t in found)
        assert_close({n: getattr(layer, n) for n in before}, before, rtol=0, atol=0)


@on_backends
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_counts_as_it_does_in_torch(momentum, backend):
    ours, theirs = layer_of("batch_norm", backend, momentum=momentum), nn.BatchNorm2d(4).double()
    theirs.momentum = momentum
    for shape in ((0, 4, 3, 2), SHAPE):
        x = randn(*shape)
        ours(x), theirs(x)
        assert_same_buffers(ours, theirs)


@on_backends
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("name", [*NAMES, "instance_norm", "layer_norm"])
def test_one_value_per_channel(name, shape, backend):
    """torch's BatchNorm and InstanceNorm refuse it; the factor n/(n - 1) would divide by zero."""
    layer, given = prepared(name, backend, shape)
    assert_as_oracle(layer, given)
    layer.reset_running_stats()
    found = results(layer(**given))
    assert all(y.isfinite().all() for y in found)
    want = {"running_mean": 0.1 * given["x"].detach().view(4), "running_var": 0.9 * torch.ones(4)}
    have = {key: value for key, value in buffers(layer).items() if key in want}
    assert_close(have, {key: want[key].to(WIDE) for key in have})


@on_backends
def test_one_value_per_channel_has_the_value_beta(backend):
    layer, given = prepared("batch_norm", backend, (1, 4, 1, 1))
    y, d_x, d_gamma, d_beta = step(layer, given, layer.parameters())
    assert_close(y.view(4), layer.beta.detach())
    assert_close((d_x, d_gamma), (torch.zeros_like(d_x), torch.zeros_like(d_gamma)))
    assert_close(d_beta, weights(y).view(4))


# --- evaluation and moving averages -------------------------------------------------------------

RANKS = [
    ((3, 4), nn.BatchNorm1d),
    ((3, 4, 5), nn.BatchNorm1d),
    (SHAPE, nn.BatchNorm2d),
    ((3, 4, 2, 3, 2), nn.BatchNorm3d),
]


@on_backends
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("shape", "norm"), RANKS)
def test_before_any_training_as_batch_norm(shape, norm, training, backend):
    ours, theirs = layer_of("batch_norm", backend).train(training), norm(4).double()
    theirs.train(training).load_state_dict(
        {"weight": ours.gamma, "bias": ours.beta, **buffers(ours)}
    )
    given = inputs_of(ours, shape)
    found = step(ours, given, ours.parameters())
    assert_close(found, step(theirs, given, theirs.parameters()))
    assert_same_buffers(ours, theirs)


@on_backends
def test_evonorm_b0_is_evaluated_before_any_training_with_a_variance_of_one(backend):
    layer, given = prepared("evonorm_b0", backend)
    text = "x / max(sqrt(1 + eps), v*x + instance_std(x)) * gamma + beta"
    params = dict(layer.named_parameters())
    want = step(partial(normc.reference(text), **params), given, params.values())
    assert_close(step(layer.eval(), given, params.values()), want)


@on_backends
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", TRACKED)
def test_moving_averages_over_batches_of_different_size(name, momentum, backend):
    ours, theirs = layer_of(name, backend, momentum=momentum), nn.BatchNorm2d(4).double()
    theirs.momentum = momentum
    for i, (n, h, w) in enumerate([(3, 3, 2), (1, 2, 1), (7, 3, 2), (2, 5, 4)]):
        x = randn(n, 4, h, w, seed=i) * (i + 1) + i
        ours(x), theirs(x)
        assert_same_buffers(ours, theirs, **EXACT)
    for module in (ours, theirs):
        module.reset_running_stats()
    ours(x), theirs(x)
    assert_same_buffers(ours, theirs, **EXACT)


@on_backends
@pytest.mark.parametrize("name", TRACKED)
def test_without_running_statistics_training_changes_nothing(name, backend):
    layer, given = prepared(name, backend, track_running_stats=False)
    assert not list(layer.buffers())
    for training in (True, False):
        assert_as_oracle(layer.train(training), given)


# --- numbers that are not finite ----------------------------------------------------------------

PLACES = ["x", "residual", "cotangent", "gamma"]


def pass_through(call, given, cotangents):
    found = results(call(**given))
    return [*found, *torch.autograd.grad(found, list(given.values()), cotangents)]


@on_backends
@on_names
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_where_the_oracle_has_it(name, bad, backend):
    layer, given = prepared(name, backend)
    given |= {n: p.detach().clone() for n, p in layer.named_parameters()}
    for place in PLACES:
        tensors = {n: t.detach().clone() for n, t in given.items()}
        cotangents = [randn(*SHAPE, seed=i) for i in range(1 + (name == "add_rms_norm"))]
        there = cotangents[0] if place == "cotangent" else tensors.get(place)
        if there is None:
            continue
        there.view(-1)[there.numel() // 2] = bad
        tensors = {n: t.requires_grad_() for n, t in tensors.items()}
        found, want = (
            pass_through(partial(call, groups=2), tensors, cotangents)
            for call in (layer.op, normc.reference(layer.formula))
        )
        assert_as_unfinished(found, want, place)


def assert_as_unfinished(found, want, place):
    """Equal; but products of an infinite gamma are regrouped, and may be infinite or NaN."""
    if place == "gamma":
        assert all(
            torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(found, want, strict=True)
        )
        found, want = ([t.nan_to_num(0, 0, 0) for t in every] for every in (found, want))
    assert_close(found, want, equal_nan=True, msg=lambda text: f"{place}: {text}")


@on_backends
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", TRACKED)
def test_running_statistics_take_what_is_not_finite_as_batch_norm(name, bad, momentum, backend):
    ours, theirs = layer_of(name, backend, momentum=momentum), nn.BatchNorm2d(4).double()
    theirs.momentum = momentum
    for i in range(3):
        x = randn(*SHAPE, seed=i)
        if i == 1:
            x[1, 2, 0, 1] = bad
        ours(x), theirs(x)
        assert_same_buffers(ours, theirs, equal_nan=True)


@on_backends
def test_running_statistics_that_are_nan_are_evaluated_as_by_batch_norm(backend):
    ours, theirs = (module.eval() for module in twins("batch_norm", backend))
    for module in (ours, theirs):
        module.running_var[1], module.running_mean[2] = NAN, -INF
    given = inputs_of(ours)
    want = step(theirs, given, theirs.parameters())
    assert_close(step(ours, given, ours.parameters()), want, equal_nan=True)


# --- which gradients are wanted -----------------------------------------------------------------


@on_backends
def test_frozen_parameters_leave_the_other_gradients_alone(backend):
    """Every subset in turn, through the same layer."""
    layer, given = prepared("evonorm_b0", backend)
    every = [given["x"], *layer.parameters()]
    want = torch.autograd.grad(loss(oracle(layer)(**given)), every)
    for count, chosen in enumerate(product([False, True], repeat=4), 1):
        for t, choice in zip(every, chosen, strict=True):
            t.requires_grad_(choice).grad = None
        y = layer(**given)
        assert y.requires_grad == any(chosen)
        if any(chosen):
            loss(y).backward()
        assert [t.grad is not None for t in every] == [*chosen]
        assert_close([t.grad for t in every if t.requires_grad], [*compress(want, chosen)])
        assert layer.num_batches_tracked == count


# --- strides ------------------------------------------------------------------------------------


def negated(t):
    """The same numbers under a negation that is still to be carried out."""
    return torch.complex(t.detach(), -t.detach()).conj().imag


COTANGENTS = {
    "dense": lambda: randn(*SHAPE),
    "one number": lambda: torch.tensor(3.0, dtype=WIDE).expand(SHAPE),
    "the same for all samples": lambda: randn(1, *SHAPE[1:]).expand(SHAPE),
    "the same for all channels": lambda: randn(3, 1, 3, 2).expand(SHAPE),
    "channels last": lambda: randn(*SHAPE).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: randn(3, 4, 2, 3).transpose(2, 3),
    "permuted": lambda: randn(2, 3, 4, 3).permute(1, 2, 3, 0),
    "a slice": lambda: randn(7, 9, 5, 5)[1:4, ::2, 2:, :2][:, :4],
    "overlapping": lambda: randn(64).as_strided(SHAPE, (5, 3, 2, 1)),
    "to be negated": lambda: negated(randn(*SHAPE)),
}

LAYOUTS = {
    "dense": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "a slice": lambda t: nn.functional.pad(t, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "the same for all samples": lambda t: t[:1].expand(t.shape),
}


@on_backends
@on_names
def test_inputs_and_cotangents_of_any_strides(name, backend):
    """One after the other through the same layer, whose kernels are bound to strides once."""
    layer, given = prepared(name, backend)
    every = [*given.values(), *layer.parameters()]
    for layout, (kind, make) in product(LAYOUTS, COTANGENTS.items()):
        laid = {n: LAYOUTS[layout](t) for n, t in given.items()}
        found, want = results(layer(**laid)), results(oracle(layer)(**laid))
        assert_close(found, want)
        cotangents = [make(), *(randn(*SHAPE, seed=5) for _ in found[1:])]
        a, b = (torch.autograd.grad(outs, every, cotangents) for outs in (found, want))
        where = f"x {layout}, its cotangent {kind}"
        assert_close(a, b, msg=lambda text, where=where: f"{where}: {text}")


FOLLOWED = {
    "a transposed copy": lambda y: y.transpose(2, 3).contiguous().view(-1),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
    "part of it": lambda y: y[1:, 1:3, :, ::2],
    "a mean": lambda y: y.mean((0, 2)),
    "twice": lambda y: torch.cat([y, 2 * y.flip(1)], 1),
}


def followed(call, follow, x, **more):
    """A function of the first result."""
    return follow(results(call(x, **more))[0])


@on_backends
@on_names
def test_whatever_follows_may_read_the_result_in_its_own_order(name, backend):
    layer, given = prepared(name, backend)
    params = list(layer.parameters())
    for kind, follow in FOLLOWED.items():
        found, want = (
            step(partial(followed, call, follow), given, params) for call in (layer, oracle(layer))
        )
        assert_close(found, want, msg=lambda text, kind=kind: f"{kind}: {text}")


@on_backends
@pytest.mark.parametrize("which", ["x", "residual", "gamma"])
def test_tensors_that_are_still_to_be_negated(which, backend):
    layer, given = prepared("add_rms_norm", backend)
    given["gamma"] = layer.gamma.detach().requires_grad_()
    cotangents = [randn(*SHAPE, seed=i) for i in (5, 6)]
    want = pass_through(normc.reference(layer.formula), given, cotangents)
    view = negated(given[which]).requires_grad_()
    assert view.is_neg()
    assert_close(pass_through(layer.op, given | {which: view}, cotangents), want)


@on_backends
def test_what_hooks_have_kept_may_come_back_in_another_order(backend):
    """As from torch.autograd.graph.save_on_cpu with pinned memory, which is always contiguous."""
    layer, given = prepared("evonorm_s0", backend)
    laid = {"x": given["x"].contiguous(memory_format=torch.channels_last)}
    want = torch.autograd.grad(loss(oracle(layer)(**laid)), given["x"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.Tensor.contiguous):
        assert_close(torch.autograd.grad(loss(layer(**laid)), given["x"]), want)


# --- backward more than once, and changes in between --------------------------------------------


@on_backends
@on_names
def test_backward_runs_again_where_the_graph_is_retained(name, backend):
    layer, given = prepared(name, backend)
    found, every = results(layer(**given)), [*given.values(), *layer.parameters()]
    backward = partial(torch.autograd.grad, found, every, [weights(y) for y in found])
    first = backward(retain_graph=True)
    assert_close(backward(), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward()


CHANGED = "modified by an inplace operation"
RIGHT, RAISES, EITHER = {"right"}, {"raises"}, {"right", "raises"}
CHANGES = [
    *((name, what, RAISES) for name in NAMES[:4] for what in ("x", "gamma")),
    *((name, "beta", RIGHT) for name in NAMES[:4]),
    *((name, "v", RAISES) for name in ("evonorm_b0", "evonorm_s0")),
    *((name, "y0", EITHER) for name in NAMES),
    # the sum is kept, which is a result; neither of the two that are added is needed
    *(("add_rms_norm", what, RIGHT) for what in ("x", "residual")),
    *(("add_rms_norm", what, RAISES) for what in ("gamma", "y1")),
]


@on_backends
@pytest.mark.parametrize(("name", "what", "allowed"), CHANGES)
def test_a_change_in_place_before_backward(name, what, allowed, backend):
    assert outcome(name, what, backend) in [*allowed]


def outcome(name, what, backend):
    """Whether backward raises, is right or is wrong after a change in place."""
    layer, given = prepared(name, backend)
    every = [*given.values(), *layer.parameters()]
    want = list(results(oracle(layer)(**given)))
    if what in ("y0", "y1"):
        want[int(what[1])] = 2 * want[int(what[1])]
    want = torch.autograd.grad(loss(tuple(want)), every)
    held = {n: t * 1 for n, t in given.items()}  # no leaves, as in a network
    found = results(layer(**held))
    places = held | dict(layer.named_parameters()) | {f"y{i}": y for i, y in enumerate(found)}
    with nullcontext() if what in ("y0", "y1") else torch.no_grad():
        places[what].mul_(2)
    return verdict(found, every, want)


def verdict(found, every, want):
    try:
        grads = torch.autograd.grad(loss(found), every)
    except RuntimeError as error:
        assert CHANGED in str(error)
        return "raises"
    return "right" if all(map(torch.allclose, grads, want)) else "wrong"


@on_backends
@on_names
def test_an_activation_in_place_behind_it(name, backend):
    layer, given = prepared(name, backend)
    params = list(layer.parameters())
    found, want = (
        step(partial(followed, call, act), given, params)
        for call, act in ((layer, torch.relu_), (oracle(layer), torch.relu))
    )
    assert_close(found, want)


BETWEEN = {
    "changed": lambda layer: layer.running_var.mul_(4),
    "loaded": lambda layer: layer.load_state_dict({"running_var": torch.ones(4)}, strict=False),
    "trained": lambda layer: layer.train()(randn(*SHAPE, seed=7)),
}


@on_backends
@pytest.mark.parametrize("between", BETWEEN)
def test_running_statistics_that_change_before_backward(between, backend):
    layer, given = prepared("evonorm_b0", backend)
    layer.running_var.fill_(0.3)
    every = [*given.values(), *layer.parameters()]
    want = torch.autograd.grad(loss(layer.eval()(**given)), every)
    found = results(layer(**given))
    with torch.no_grad():
        BETWEEN[between](layer)
    assert verdict(found, every, want) in [*EITHER]


# --- graphs of several uses ---------------------------------------------------------------------


@on_backends
@on_names
def test_gradients_accumulate_until_they_are_set_to_none(name, backend):
    layer, given = prepared(name, backend)
    every = [*given.values(), *layer.parameters()]
    want = torch.autograd.grad(loss(oracle(layer)(**given)), every)
    for times in (1, 2):
        loss(layer(**given)).backward()
        assert_close([t.grad for t in every], [times * g for g in want])
    layer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in layer.parameters())
    loss(layer(**given)).backward()
    assert_close([p.grad for p in layer.parameters()], [*want[len(given) :]])


@on_backends
@on_names
def test_an_input_may_be_used_twice(name, backend):
    layer, given = prepared(name, backend)
    params = list(layer.parameters())

    def twice(call, x, **more):
        first, second = results(call(x, **more)), results(call(x.flip(0), **more))
        return tuple(a + 2 * b + x for a, b in zip(first, second, strict=True))

    found, want = (step(partial(twice, call), given, params) for call in (layer, oracle(layer)))
    assert_close(found, want)


SHARED = {
    "the same tensor": lambda t: (t, t),
    "two halves": lambda t: (t[:2], t[2:]),
    "overlapping": lambda t: (t[:, :, :3], t[:, :, 1:]),
    "two views of all": lambda t: (t, t.transpose(2, 3)),
    "interleaved": lambda t: (t[..., ::2], t[..., 1::2]),
}


@on_backends
@pytest.mark.parametrize("kind", SHARED)
def test_x_and_residual_may_share_their_memory(kind, backend):
    layer, base = layer_of("add_rms_norm", backend), randn(4, 4, 4, 4)
    given = {"x": base.requires_grad_()}

    def call(function, x):
        first, second = SHARED[kind](x)
        return function(first, residual=second)

    found, want = (step(partial(call, f), given, [layer.gamma]) for f in (layer, oracle(layer)))
    assert_close(found, want)


@on_backends
@pytest.mark.parametrize("which", [0, 1])
def test_hooks_on_results_change_the_gradient_that_arrives(which, backend):
    layer, given = prepared("add_rms_norm", backend)
    every = [*given.values(), *layer.parameters()]
    found, want = results(layer(**given)), list(results(oracle(layer)(**given)))
    found[which].retain_grad()
    found[which].register_hook(lambda g: 3 * g.contiguous(memory_format=torch.channels_last))
    wanted = weights(want[which], 20 + which)
    value = loss(tuple(3 * y if i == which else y for i, y in enumerate(want)))
    loss(found).backward()
    assert_close([t.grad for t in every], [*torch.autograd.grad(value, every)])
    assert_close(found[which].grad, 3 * wanted)


@on_backends
@on_names
def test_what_is_detached_gets_no_gradient(name, backend):
    layer, given = prepared(name, backend)
    found = results(layer(**{n: t.detach() for n, t in given.items()}))
    assert not any(y.detach().requires_grad for y in found)
    loss(found).backward()
    assert all(t.grad is None for t in given.values())
    want = torch.autograd.grad(loss(oracle(layer)(**given)), [*layer.parameters()])
    assert_close([p.grad for p in layer.parameters()], [*want])


# --- without a graph ----------------------------------------------------------------------------


@on_backends
@on_names
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_a_graph_still_moves_the_running_statistics(name, mode, backend):
    layer, given = prepared(name, backend)
    twin, theirs = copy.deepcopy(layer), nn.BatchNorm2d(4).double()
    want = results(twin(**given))
    with mode():
        found = results(layer(**given))
        theirs(given["x"])
    assert all(y.is_inference() == (mode is torch.inference_mode) for y in found)
    assert not any(y.requires_grad for y in found)
    assert_close(found, tuple(y.detach() for y in want), rtol=0, atol=0)
    if buffers(layer):
        assert_same_buffers(layer, theirs)


KEPT = "Inference tensors cannot be saved for backward"


@on_backends
def test_tensors_made_for_inference_are_refused_where_backward_needs_them(backend):
    layer, given = prepared("evonorm_s0", backend)
    with torch.inference_mode():
        made = {"x": given["x"] * 1, "gamma": layer.gamma * 1}
    with pytest.raises(RuntimeError, match=KEPT):
        layer(made["x"])
    params = dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match=KEPT):
        layer.op(**given | params | made, groups=2)
    with torch.no_grad():
        assert_close(layer(made["x"]), oracle(layer)(**given))
    for p in layer.parameters():
        p.requires_grad_(False)
    found = layer(made["x"])
    assert not found.requires_grad
    assert_close(found, oracle(layer)(given["x"].detach()))


@on_backends
def test_tensors_made_for_inference_are_taken_where_backward_does_without(backend):
    layer, given = prepared("group_norm", backend)
    params = dict(layer.named_parameters())
    with torch.inference_mode():
        beta, cotangent = layer.beta * 1, randn(*SHAPE)
    found = layer.op(given["x"], groups=2, gamma=layer.gamma, beta=beta)
    want = normc.reference(layer.formula)(given["x"], groups=2, **params)
    assert_close(found, want)
    wanted = [given["x"], layer.gamma]
    a, b = (torch.autograd.grad(y, wanted, cotangent) for y in (found, want))
    assert_close(a, b)


# --- modules ------------------------------------------------------------------------------------

KEYS = {
    "batch_norm": ["gamma", "beta", *BUFFERS],
    "evonorm_b0": ["v", "gamma", "beta", *BUFFERS[1:]],
    "evonorm_s0": ["v", "gamma", "beta"],
    "group_norm": ["gamma", "beta"],
    "add_rms_norm": ["gamma"],
}


def trained(name, backend, **how):
    layer, given = prepared(name, backend, **how)
    for i in range(2):
        layer(**{n: t.detach() * (i + 2) + i for n, t in given.items()})
    return layer, given


def stored(layer):
    """A state as files of tensors hold it: names and dense arrays, nothing else."""
    arrays = {key: value.numpy().copy() for key, value in layer.state_dict().items()}
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def on_meta(state, name, backend):
    layer = normc.Layer(normc.zoo[name], 4, groups=2, backend=backend, device="meta", dtype=WIDE)
    assert all(t.is_meta for t in layer.state_dict().values())
    return layer, state


def to_empty(state, name, backend):
    layer, state = on_meta(state, name, backend)
    layer.to_empty(device="cpu").load_state_dict(state)
    return layer


def assigned(state, name, backend):
    layer, state = on_meta(state, name, backend)
    layer.load_state_dict(state, assign=True)
    return layer


def loaded(state, name, backend):
    layer = layer_of(name, backend)
    layer.load_state_dict(state)
    return layer


@on_backends
@on_names
@pytest.mark.parametrize("restore", [loaded, to_empty, assigned])
def test_a_state_goes_through_files(name, restore, backend):
    layer, given = trained(name, backend)
    state = stored(layer)
    assert list(state) == KEYS[name]
    again = restore(state, name, backend)
    for training in (False, True):
        a, b = (step(m.train(training), given, m.parameters()) for m in (layer, again))
        assert_close(a, b, rtol=0, atol=0)
    assert_close(stored(again), stored(layer), rtol=0, atol=0)


@on_backends
def test_a_state_is_loaded_strictly(backend):
    layer, _ = trained("evonorm_b0", backend)
    state, other = stored(layer), layer_of("evonorm_b0", backend)
    with pytest.raises(RuntimeError, match="Unexpected key.*rho"):
        other.load_state_dict({**state, "rho": state["v"]})
    with pytest.raises(RuntimeError, match="size mismatch for v"):
        other.load_state_dict({**state, "v": torch.ones(5)})
    for key in state:
        with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
            other.load_state_dict({k: v for k, v in state.items() if k != key})


@on_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_state_of_another_dtype_takes_the_layers(dtype, backend):
    layer, _ = trained("batch_norm", backend)
    again = layer_of("batch_norm", backend, dtype=dtype)
    again.load_state_dict(stored(layer))
    want = {k: v.to(dtype) if v.is_floating_point() else v for k, v in stored(layer).items()}
    assert_close(again.state_dict(), want, rtol=0, atol=0)
    back = layer_of("batch_norm", backend)
    back.load_state_dict(stored_as(again, dtype))
    assert_close(back.state_dict(), {k: v.to(back.state_dict()[k].dtype) for k, v in want.items()})


def stored_as(layer, dtype):
    assert {t.dtype for t in layer.state_dict().values()} == {dtype, torch.long}
    return {key: value.clone() for key, value in layer.state_dict().items()}


CASTS = {
    "half": (nn.Module.half, torch.float16),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "float": (nn.Module.float, torch.float32),
    "double": (nn.Module.double, WIDE),
}


@on_backends
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_layer_trains_and_evaluates_as_batch_norm(cast, backend):
    to, dtype = CASTS[cast]
    ours, theirs = (to(module) for module in twins("batch_norm", backend))
    assert {t.dtype for t in ours.state_dict().values()} == {dtype, torch.long}
    how = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    for training in (True, False):
        x = (randn(5, 4, 3, 2) * 2 + 1).to(dtype)
        assert_close(ours.train(training)(x), theirs.train(training)(x), **how)
        assert_same_buffers(ours, theirs, **how)


@on_backends
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_variance_that_half_precision_cannot_hold_is_tracked(dtype, wide, backend):
    """A tenth of it can be held; with wide buffers, as under autocast, all of it."""
    held = torch.float32 if wide else dtype
    ours = layer_of("batch_norm", backend, dtype=held)
    theirs = nn.BatchNorm2d(4).to(held)
    x = (randn(16, 4, 4, 4) * 400 + 30).to(dtype)
    assert x.isfinite().all() and x.double().var() > torch.finfo(torch.float16).max
    ours(x), theirs(x)
    eps = torch.finfo(held).eps
    assert_same_buffers(ours, theirs, rtol=4 * eps, atol=4 * eps)


@on_backends
@on_names
def test_a_copy_trains_on_its_own(name, backend):
    layer, given = trained(name, backend)
    loss(layer(**given)).backward()
    before, grads = stored(layer), [p.grad.clone() for p in layer.parameters()]
    twin = copy.deepcopy(layer)
    assert repr(twin) == repr(layer)
    loss(twin(**given)).backward()
    with torch.no_grad():
        for p in twin.parameters():
            p.sub_(p.grad)
    assert_close(stored(layer), before, rtol=0, atol=0)
    assert_close([p.grad for p in layer.parameters()], grads, rtol=0, atol=0)
    assert_as_oracle(twin, given)
    assert_close([p.grad for p in twin.parameters()], grads)


# --- threads ------------------------------------------------------------------------------------


@pytest.fixture
def restless():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


PARALLEL = [(2, 4, 2, 2), (3, 4, 2, 2), (5, 4), (2, 4, 2, 1, 3)]


@on_backends
def test_one_op_in_several_threads(restless, backend):
    """No kernel is there at first, and none of the calls finds another's."""
    text = "x*sigmoid(v*x)/group_std(x)*gamma + batch_mean(x)*beta"
    op, params = normc.compile(text, backend), [randn(4, seed=30 + i) for i in range(3)]
    start = Barrier(len(PARALLEL))

    def work(call, k, turns, wait=lambda: None):
        leaves = [p.clone().requires_grad_() for p in params]
        given = dict(zip(("v", "gamma", "beta"), leaves, strict=True))
        x = randn(*PARALLEL[k], seed=k).requires_grad_()
        wait()
        return [step(partial(call, groups=2, **given), {"x": x}, leaves) for _ in range(turns)]

    with ThreadPoolExecutor(len(PARALLEL)) as pool:
        jobs = [pool.submit(work, op, k, 20, start.wait) for k in range(len(PARALLEL))]
    for k, job in enumerate(jobs):
        (want,) = work(normc.reference(text), k, 1)
        for found in job.result():
            assert_close(found, want)
