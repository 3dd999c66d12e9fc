"""Layers: parameters, running statistics, training and evaluation, against torch's own modules."""

import copy

import pytest
import torch
from torch import nn

import normc

BATCH_NORM = "(x - batch_mean(x))/batch_std(x)*gamma + beta"
BACKENDS = ["c", "torch"]


def twins(backend, **kw):
    theirs = nn.BatchNorm2d(6, **kw).double()
    ours = normc.Layer(BATCH_NORM, 6, backend=backend, dtype=torch.float64, **kw)
    return ours, theirs


def step(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_trains_and_evaluates_as_batch_norm(backend, momentum):
    ours, theirs = twins(backend, momentum=momentum)
    for i in range(3):
        x = torch.randn(4, 6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(step(ours, x * 3 + i), step(theirs, x * 3 + i))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    torch.testing.assert_close(ours.gamma.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.beta.grad, theirs.bias.grad)
    before = ours.running_var.clone()
    torch.testing.assert_close(step(ours.eval(), x), step(theirs.eval(), x))
    assert torch.equal(before, ours.running_var), "evaluation must not touch the buffers"


def test_loads_batch_norms_state():
    ours, theirs = twins("torch")
    theirs(torch.randn(4, 6, 5, 5, dtype=torch.float64))
    renamed = {"weight": "gamma", "bias": "beta"}
    ours.load_state_dict({renamed.get(k, k): v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_without_running_stats_evaluation_uses_the_batch():
    ours, theirs = twins("c", track_running_stats=False)
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert not list(ours.buffers())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_b1", "evonorm_b2"])
def test_evonorm_b_tracks_only_the_batch_variance(backend, name):
    layer = normc.Layer(normc.zoo[name], 8, momentum=1.0, backend=backend)
    assert [n for n, _ in layer.named_buffers()] == ["running_var", "num_batches_tracked"]
    assert torch.equal(layer.running_var, torch.ones(8)), "the running variance starts at one"
    x = torch.randn(4, 8, 6, 6)
    trained = layer(x)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))
    layer.running_var.copy_(x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(layer.eval()(x), trained)


def test_nested_batch_statistics_are_tracked_each_by_its_own_value():
    layer = normc.Layer("x - batch_mean(x*batch_rms(x))", 4, momentum=1.0, dtype=torch.float64)
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    layer(x)
    square = x.square().mean((0, 2, 3))
    inner = (x * (square + 1e-5).sqrt().view(1, 4, 1, 1)).mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean_0, square)
    torch.testing.assert_close(layer.running_mean_1, inner)


def test_one_value_per_channel_keeps_the_running_variance_finite():
    layer = normc.Layer(BATCH_NORM, 3)
    layer(torch.randn(1, 3))
    assert layer.running_var.isfinite().all()


def test_an_empty_batch_leaves_the_running_statistics_alone():
    layer = normc.Layer(BATCH_NORM, 3)
    assert layer(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert layer.running_mean.tolist() == [0] * 3 and layer.num_batches_tracked == 1  # as in torch


def test_parameters_start_where_the_formula_says():
    layer = normc.Layer("param alpha = 0.5; tanh(alpha*x)*gamma + beta + v0", 4)
    assert layer.alpha.shape == () and layer.alpha.item() == 0.5
    assert layer.gamma.tolist() == [1] * 4 and layer.beta.tolist() == [0] * 4
    assert layer.v0.tolist() == [0] * 4
    nn.init.normal_(layer.gamma)
    layer.reset_parameters()
    assert layer.gamma.tolist() == [1] * 4


@pytest.mark.parametrize(
    "shape, dim", [((4, 8), 1), ((2, 5, 8), -1), ((2, 8, 3), 1), ((2, 8, 3, 4, 2), 1)]
)
def test_every_rank_and_channel_dim(shape, dim):
    x = torch.randn(shape, dtype=torch.float64)
    f = normc.parse("(x - group_mean(x))/group_std(x)*gamma + beta")
    layer = normc.Layer(f, 8, groups=2, channel_dim=dim, dtype=torch.float64)
    inner = x.movedim(dim, 1)
    want = nn.functional.group_norm(inner, 2).movedim(1, dim)
    torch.testing.assert_close(layer(x), want)


def test_repr_recreates_the_layer():
    layer = normc.Layer("x/group_rms(x)*gamma", 12, groups=4, eps=1e-3, channel_dim=-1)
    again = eval(repr(layer), {"Layer": normc.Layer})  # noqa: S307 - our own repr, in a test
    assert repr(again) == repr(layer) and again.groups == 4


def test_deepcopy_state_and_training_are_independent():
    layer = normc.Layer(BATCH_NORM, 3)
    twin = copy.deepcopy(layer)
    layer(torch.randn(4, 3))
    assert twin.num_batches_tracked == 0 and layer.num_batches_tracked == 1
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.running_mean, layer.running_mean)


def test_a_layer_trains_in_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), normc.Layer(normc.zoo["evonorm_s0"], 8, groups=4), nn.Flatten(),
        nn.LazyLinear(2)
    )  # fmt: skip
    x, y = torch.randn(32, 1, 6, 6), torch.randint(0, 2, (32,))
    optimiser = torch.optim.SGD((net(x), net)[1].parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_wrong_channel_count_names_the_dimension():
    layer = normc.Layer(BATCH_NORM, 3)
    with pytest.raises(normc.ShapeError, match="5 channels along dimension 1.*made for 3"):
        layer(torch.randn(2, 5))


def test_a_statistic_that_varies_over_positions_cannot_be_tracked():
    with pytest.raises(normc.FormulaError, match="track_running_stats=False"):
        normc.Layer("x - mean[n](x)", 3)
    normc.Layer("x - mean[n](x)", 3, track_running_stats=False)(torch.randn(2, 3, 4))


def test_a_mean_may_be_written_as_a_sum_by_a_count():
    """In evaluation the count is that of the training batches, as the sum is."""
    sums, means = (
        normc.Layer(f"x - {mean}", 4, momentum=0.5)
        for mean in ("batch_sum(x)/batch_sum(1)", "batch_mean(x)")
    )
    for n in (8, 8, 8):
        x = torch.randn(n, 4, 3) + 5
        torch.testing.assert_close(sums(x), means(x))
    torch.testing.assert_close(sums.running_count_NS / 24, 1 - 0.5**3 * 23 / 24 * torch.ones(()))
    x = torch.randn(2, 4, 3) + 5
    found = (x - sums.eval()(x))[0, :, 0]
    torch.testing.assert_close(found, sums.running_sum / sums.running_count_NS)
    assert (found - 5).abs().max() < 1
