"""Signals: blocks and branches found, moments measured, published curves met, models untouched."""

import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normc
import normc.analysis
from normc.analysis import signals_plot
from normc.analysis.signals import Signals, compare_signals, signal_propagation
from normc.errors import NormcError, ShapeError
from normc.nn.nf_resnet import NFResNet, expected_variances

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(before, after, kernel=3, stride=1):
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)


class TorchvisionBlock(nn.Module):
    """Adds in place, activates the sum."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        changes = stride > 1 or before != after
        self.downsample = (
            nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))
            if changes
            else None
        )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class DropPath(nn.Module):
    def forward(self, x):
        return x * 100 if self.training else x


class Scaled(nn.Module):
    """The last convolution's output is scaled in five ways, also in place, before it is added."""

    def __init__(self, c):
        super().__init__()
        self.f, self.drop_path = conv(c, c), DropPath()
        self.gain, self.layer_scale = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.ones(c))
        nn.init.constant_(self.layer_scale, 0.1)

    def forward(self, x):
        out = self.drop_path(self.f(x.relu() * 0.5))
        out.mul_(self.gain)
        out = out * self.layer_scale.view(-1, 1, 1)
        return (0.2 * out / 7).add(x)


class Excited(Scaled):
    """What depends on x is part of the branch."""

    def forward(self, x):
        out = self.f(x)
        return x + 0.2 * (out * out.mean((2, 3), keepdim=True).sigmoid())


def chain(block, *sizes):
    return nn.Sequential(conv(3, sizes[0]), *(block(c) for c in sizes), nn.AvgPool2d(2))


def variance(t):
    return float(t.detach().double().var((0, 2, 3), correction=0).mean())


def squared_mean(t):
    return float(t.double().mean((0, 2, 3)).square().mean())


SHAPE = (4, 3, 8, 8)


# --- what is measured ----------------------------------------------------------------------------


def test_moments_are_those_of_all_batches_together():
    net, x = chain(Scaled, 8, 8), 3 + torch.randn(12, 3, 8, 8)
    found = signal_propagation(net, x.split([5, 4, 3]), batches=3)
    assert [b.name for b in found.blocks] == ["(input)", "1", "2"]
    net.eval()
    with torch.no_grad():
        t = net[0](x)
        for row, block in zip(found.blocks, [None, net[1], net[2]], strict=True):
            if block is not None:
                branch = variance(block.f(t.relu() * 0.5))
                t = block(t)
                assert row.residual == pytest.approx(branch, rel=1e-5)
            assert row.variance == pytest.approx(variance(t), rel=1e-5)
            assert row.squared_mean == pytest.approx(squared_mean(t), rel=1e-5)
    one = signal_propagation(net, x.split([5, 4, 3]), batches=1)
    assert one != found and one == signal_propagation(net, x[:5], batches=7)


def test_labels_beside_images_are_left_out():
    net, x = chain(Scaled, 4), torch.randn(4, 3, 8, 8)
    labelled = [(x[:2], torch.zeros(2)), [x[2:], torch.zeros(2)]]
    assert signal_propagation(net, labelled) == signal_propagation(net, [x[:2], x[2:]])


def test_a_branch_ends_where_it_no_longer_depends_on_x():
    net, x = chain(Excited, 4), torch.randn(4, 3, 8, 8)
    (_, row) = signal_propagation(net, x).blocks
    out = net[1].f(net[0](x))
    want = variance(out * out.mean((2, 3), keepdim=True).sigmoid())
    assert row.residual == pytest.approx(want, rel=1e-5)
    (_, row) = signal_propagation(net, x, branches="f").blocks
    assert row.residual == pytest.approx(variance(out), rel=1e-5)


def test_blocks_are_found_in_torchvisions_way_of_writing():
    first = nn.Sequential(TorchvisionBlock(8, 8), TorchvisionBlock(8, 8))
    second = nn.Sequential(TorchvisionBlock(8, 16, 2), TorchvisionBlock(16, 16))
    net = nn.Sequential(conv(3, 8), first, second)
    found = signal_propagation(net, shape=(8, 3, 16, 16))
    assert [b.name for b in found.blocks] == ["(input)", "1.0", "1.1", "2.0", "2.1"]
    for row in found.blocks[1:]:
        assert row.residual == pytest.approx(1, rel=1e-3)  # behind bn2


@pytest.mark.cpu
def test_blocks_are_found_with_compiled_layers():
    net = chain(Normed, 8, 8)
    want = signal_propagation(net, shape=SHAPE)
    normc.replace_norms(net, "batch_norm")
    found = signal_propagation(net, shape=SHAPE)
    assert [b.name for b in found.blocks] == ["(input)", "1", "2"]
    for a, b in zip(found.blocks, want.blocks, strict=True):
        assert a.variance == pytest.approx(b.variance, rel=1e-5)
        assert a.residual == (b.residual and pytest.approx(b.residual, rel=1e-5))


class Normed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.f, self.norm = conv(c, c), nn.BatchNorm2d(c)

    def forward(self, x):
        return x + self.norm(self.f(x.relu()))


@pytest.mark.cpu
def test_a_module_may_say_what_its_branch_is():
    """NFBlock adds within a compiled formula, where nobody sees it."""
    net = nf((2, 2), (16, 32))
    found = signal_propagation(net, shape=(8, 3, 16, 16))
    assert [b.name for b in found.blocks] == ["(input)", *(f"blocks.{i}" for i in range(4))]
    assert all(0.6 < b.residual < 1.3 for b in found.blocks[1:])


def test_transformers_have_their_channels_last():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(4, 10, 16)
    found = signal_propagation(net, x, channel_dim=-1)
    assert [b.name for b in found.blocks] == ["(input)", "layers.0", "layers.1", "layers.2"]
    want = x.double().var((0, 1), correction=0).mean()
    assert found.blocks[0].variance == pytest.approx(float(want))
    assert all(b.residual for b in found.blocks[1:])


def test_a_block_that_is_called_twice_has_two_rows():
    block = Scaled(8)
    net = nn.Sequential(conv(3, 8), block, block)
    found = signal_propagation(net, shape=SHAPE, batches=2)
    assert [b.name for b in found.blocks] == ["(input)", "1", "1#2"]
    assert found.blocks[1].variance != found.blocks[2].variance


def test_blocks_may_be_named():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Sequential(conv(8, 8), nn.ReLU()), nn.Flatten())
    by_name = signal_propagation(net, shape=SHAPE, blocks=["1", "2"])
    assert [b.name for b in by_name.blocks] == ["(input)", "1", "2"]
    assert all(b.residual is None for b in by_name.blocks)
    chosen = signal_propagation(net, shape=SHAPE, blocks=lambda _, m: isinstance(m, nn.ReLU))
    assert [b.name for b in chosen.blocks] == ["(input)", "1", "2.1"]


# --- what the papers show ------------------------------------------------------------------------


class PreAct(nn.Module):
    """BN-ReLU-conv with He's initialization, or ReLU-BN-conv with LeCun's."""

    def __init__(self, before, after, stride, relu_first):
        super().__init__()
        self.relu_first = relu_first
        self.norms = nn.ModuleList([nn.BatchNorm2d(before), nn.BatchNorm2d(after)])
        self.convs = nn.ModuleList([conv(before, after, 3, stride), conv(after, after)])
        changes = stride > 1 or before != after
        self.skip = conv(before, after, 1, stride) if changes else None
        for c in self.modules():
            if isinstance(c, nn.Conv2d):
                nn.init.kaiming_normal_(c.weight, nonlinearity="linear" if relu_first else "relu")

    def act(self, i, x):
        return self.norms[i](x.relu()) if self.relu_first else self.norms[i](x).relu()

    def forward(self, x):
        h = self.act(0, x)
        shortcut = x if self.skip is None else self.skip(h)
        return shortcut + self.convs[1](self.act(1, self.convs[0](h)))


def preact(relu_first, depth=4):
    torch.manual_seed(0)
    sizes = [(32, 32, 1)] * depth + [(32, 64, 2)] + [(64, 64, 1)] * (depth - 1)
    stem = conv(3, 32)
    nn.init.kaiming_normal_(stem.weight, nonlinearity="linear")
    return nn.Sequential(stem, *(PreAct(*size, relu_first) for size in sizes))


def growth(values):
    return [b - a for a, b in zip(values[:-1], values[1:], strict=True)]


def test_relu_bn_conv_grows_by_one_per_block_and_resets():
    """Arithmetic of the method; zeros around the maps take a share of it."""
    found = signal_propagation(preact(True), shape=(4, 3, 24, 24), batches=1).blocks[1:]
    assert all(0.8 < b.residual < 1.1 for b in found)
    for stage in found[:4], found[4:]:
        assert all(0.8 < step < 1.1 for step in growth([b.variance for b in stage]))
        assert all(b.squared_mean < 0.05 for b in stage)
    assert found[3].variance > 4 and found[4].variance < 2.2


def test_bn_relu_conv_shifts_the_mean():
    """Of each block's second moment of 1, channels' means have 1/pi, their variances 1 - 1/pi."""
    found = signal_propagation(preact(False), shape=(4, 3, 24, 24), batches=1).blocks[1:]
    assert all(0.58 < b.residual < 0.75 for b in found)
    for stage in found[:4], found[4:]:
        both = [b.variance + b.squared_mean for b in stage]
        assert all(0.75 < step < 1.2 for step in growth(both))
        assert all(0.58 < step < 0.8 for step in growth([b.variance for b in stage]))
    assert found[3].squared_mean > 0.7 and found[4].variance < 1.6


def nf(depths, widths):
    torch.manual_seed(0)
    net = NFResNet(depths, widths, 10, low_resolution=True, bottleneck=0.5)
    for name, p in net.named_parameters():
        if name.endswith("skip_gain"):
            nn.init.ones_(p)  # at 0, as they start, nothing is added
    return net


def off(found, depths):
    want = [v for stage in expected_variances(depths) for v in stage]
    return [b.variance / v - 1 for b, v in zip(found.blocks[1:], want, strict=True)]


@pytest.mark.cpu
def test_nf_resnet_keeps_to_its_schedule():
    depths = (3, 3)
    found = signal_propagation(nf(depths, (64, 64)), shape=(4, 3, 32, 32), batches=1)
    assert max(map(abs, off(found, depths))) < 0.1
    assert off(found, depths) != [0] * 6


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.thorough
def test_nf_resnet_keeps_to_it_over_fifty_blocks():
    depths = (12, 13, 13, 12)
    found = signal_propagation(nf(depths, (128,) * 4), shape=(4, 3, 96, 96), batches=1)
    assert max(map(abs, off(found, depths))) < 0.1


# --- nothing is changed --------------------------------------------------------------------------


class Moody(nn.Module):
    """A buffer that is replaced, random numbers, dropout, a norm, a hook of its own."""

    def __init__(self):
        super().__init__()
        self.block, self.drop, self.norm = Scaled(8), nn.Dropout(0.9), nn.BatchNorm2d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False

    def forward(self, x):
        self.calls = self.calls + 1
        if self.fails:
            raise RuntimeError("on purpose")
        return self.block(self.drop(self.norm(x + 0.1 * torch.randn_like(x))))


def test_a_model_is_left_as_it_was():
    net = nn.Sequential(conv(3, 8), Moody(), Scaled(8))
    net[1].norm.eval()
    seen = []
    handle = net[1].register_forward_hook(lambda *_: seen.append(1))
    buffers = {n: (b, b.clone(), b._version) for n, b in net.named_buffers()}
    modes = [m.training for m in net.modules()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()]
    state = torch.get_rng_state()
    for fails in False, True:
        net[1].fails = fails
        if fails:
            with pytest.raises(NormcError, match="RuntimeError: on purpose"):
                signal_propagation(net, shape=SHAPE)
        else:
            assert len(signal_propagation(net, shape=SHAPE).blocks) == 3
        assert [m.training for m in net.modules()] == modes
        assert hooks == [
            (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()
        ]
        for name, buffer in net.named_buffers():
            before, value, version = buffers[name]
            assert buffer is before and torch.equal(buffer, value) and buffer._version == version
        assert torch.equal(state, torch.get_rng_state())
        assert all(p.grad is None for p in net.parameters())
    assert seen  # hooks of others do run
    handle.remove()


def test_data_are_left_as_they_were():
    x = torch.randn(SHAPE)
    before, net = x.clone(), nn.Sequential(nn.ReLU(inplace=True), chain(Scaled, 4))
    assert len(signal_propagation(net, x).blocks) == 2
    assert torch.equal(x, before)


def test_it_is_repeatable_and_without_dropout():
    net = nn.Sequential(conv(3, 8), Moody())
    first = signal_propagation(net, shape=SHAPE, seed=1)
    torch.randn(7)
    assert signal_propagation(net, shape=SHAPE, seed=1) == first
    assert signal_propagation(net, shape=SHAPE, seed=2) != first
    net[1].drop.p = 0.0
    assert signal_propagation(net, shape=SHAPE, seed=1) == first


def test_running_statistics_are_used_on_demand():
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), Scaled(8))
    x = 5 * torch.randn(4, 3, 8, 8)
    batch, running = (signal_propagation(net, x, training=t).blocks[0] for t in (True, False))
    assert batch.variance == pytest.approx(1, rel=1e-3)
    assert running.variance == pytest.approx(variance(net[0](x)), rel=1e-3)


@pytest.mark.slow
def test_compiled_models_are_looked_at_uncompiled():
    net = chain(Scaled, 8, 8)
    want = signal_propagation(net, shape=SHAPE)
    found = signal_propagation(torch.compile(net, backend="eager"), shape=SHAPE)
    assert [b.name for b in found.blocks] == ["(input)", "_orig_mod.1", "_orig_mod.2"]
    assert [b.variance for b in found.blocks] == [b.variance for b in want.blocks]


# --- refusals ------------------------------------------------------------------------------------


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv(3, 3)

    def forward(self, x):
        return x + self.f(x)


def test_refusals():
    net = chain(Scaled, 8)
    plain = nn.Sequential(conv(3, 8), nn.ReLU())
    with pytest.raises(NormcError, match="nothing is added"):
        signal_propagation(plain, shape=SHAPE)
    with pytest.raises(NormcError, match="the model's own forward method"):
        signal_propagation(Alone(), shape=SHAPE)
    for wrong in (dict(), dict(data=torch.randn(SHAPE), shape=SHAPE)):
        with pytest.raises(ShapeError, match="either data or shape"):
            signal_propagation(net, **wrong)
    for data in ([], ["text"], [("text", torch.ones(2))]):
        with pytest.raises(NormcError, match="no batches"):
            signal_propagation(net, data)
    with pytest.raises(NormcError, match=r"no module `1.g` \(did you mean `1.f`"):
        signal_propagation(net, shape=SHAPE, blocks=["1.g"])
    with pytest.raises(NormcError, match="no module was chosen"):
        signal_propagation(net, shape=SHAPE, blocks=lambda *_: False)
    with pytest.raises(NormcError, match="no block has a module `conv9`"):
        signal_propagation(net, shape=SHAPE, branches="conv9")
    with pytest.raises(NormcError, match="`drop_pth`.*did you mean `drop_path`"):
        signal_propagation(net, shape=SHAPE, branches="drop_pth")
    for blocks in ("1", "layer1", net[1], [net[1]], [1]):
        with pytest.raises(NormcError, match="list of paths"):
            signal_propagation(net, shape=SHAPE, blocks=blocks)
    for dim in (7, -5):
        with pytest.raises(ShapeError, match=f"channel_dim={dim} .*`1`.*shape"):
            signal_propagation(net, shape=SHAPE, channel_dim=dim)
    with pytest.raises(NormcError, match="meta device"):
        signal_propagation(chain(Scaled, 8).to("meta"), shape=SHAPE)
    with pytest.raises(NormcError, match="`0` is no block"):
        signal_propagation(net, shape=SHAPE, branches={"0": "1.f"})
    with pytest.raises(NormcError, match="no module `1.h`"):
        signal_propagation(net, shape=SHAPE, branches={"1": "1.h"})
    with pytest.raises(NormcError, match="lazy modules"):
        signal_propagation(nn.Sequential(nn.LazyConv2d(3, 3)), shape=SHAPE)
    net[1].unused = nn.ReLU()
    with pytest.raises(NormcError, match="no block ran"):
        signal_propagation(net, shape=SHAPE, blocks=["1.unused"])


# --- what goes in --------------------------------------------------------------------------------


def test_floating_data_take_the_dtype_of_the_model():
    net, x = chain(Scaled, 4), torch.randn(SHAPE)
    assert signal_propagation(net, x.double()) == signal_propagation(net, x)
    half = chain(Scaled, 4).bfloat16()
    assert signal_propagation(half, x).blocks
    nothing = nn.Sequential(nn.Identity())  # has no dtype to take
    found = signal_propagation(nothing, x.double() + 1e9, blocks=["0"]).blocks[0]
    assert found.variance == pytest.approx(variance(x), rel=1e-5)


def test_tokens_stay_integers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, tokens = nn.Sequential(nn.Embedding(10, 8), layer), torch.randint(10, (4, 5))
    assert len(signal_propagation(net, tokens, channel_dim=-1).blocks) == 2


def test_what_a_caller_has_set_for_his_own_tensors_changes_nothing():
    net = chain(Scaled, 4)
    want = signal_propagation(net, shape=SHAPE)
    torch.set_default_dtype(torch.float64)
    try:
        assert signal_propagation(net, shape=SHAPE) == want
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"), torch.inference_mode():
        assert signal_propagation(net, shape=SHAPE) == want


@pytest.mark.parametrize("kind", [tuple, list])
def test_images_and_labels_are_not_two_batches(kind):
    net, x = chain(Scaled, 4), torch.randn(SHAPE)
    for labels in (torch.zeros(4, dtype=torch.long), torch.zeros(4), x.long()):
        for how in ({}, {"batches": 1}):
            with pytest.raises(NormcError, match=r"pass \[\(images, labels\)\], or the images"):
                signal_propagation(net, kind((x, labels)), **how)
    assert signal_propagation(net, kind((x, x))).source == "data, 2 batches of 4x3x8x8"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"image": torch.ones(SHAPE)}], "but dict: give a tensor"),
        ({"image": torch.ones(SHAPE)}, "but dict: give a tensor"),
        (np.ones(SHAPE), "but ndarray: give a tensor"),
        ([np.ones(SHAPE)], "but ndarray: give a tensor"),
        ("images", "but str: give a tensor"),
        (3, "but int: give a tensor"),
        ([()], "but tuple: give a tensor"),
        (torch.ones(0, 3, 8, 8), r"of shape \(0, 3, 8, 8\) has no samples"),
        ([torch.ones(SHAPE), torch.ones(0, 3, 8, 8)], "has no samples"),
        (torch.tensor(1.0), r"of shape \(\) has no samples"),
        (torch.full(SHAPE, torch.inf), "nan or infinite"),
        (torch.full(SHAPE, torch.nan), "nan or infinite"),
    ],
)
def test_data_that_are_none(data, words):
    with pytest.raises(NormcError, match=words):
        signal_propagation(chain(Scaled, 4), data)


def test_numbers_that_the_dtype_of_the_model_does_not_hold():
    with pytest.raises(NormcError, match="nan or infinite numbers in float16"):
        signal_propagation(chain(Scaled, 4).half(), torch.full(SHAPE, 1e6))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (4, -3, 8, 8), (4, 3.5, 8, 8), 4, "4388", ()])
def test_shapes_that_are_none(shape):
    with pytest.raises(ShapeError, match=f"shape={re.escape(repr(shape))}: "):
        signal_propagation(chain(Scaled, 4), shape=shape)


@pytest.mark.parametrize("batches", [0, -1])
def test_at_least_one_batch(batches):
    net, x = chain(Scaled, 4), torch.randn(SHAPE)
    for given in (dict(shape=SHAPE), dict(data=x), dict(data=[x])):
        with pytest.raises(ShapeError, match=f"batches={batches}: "):
            signal_propagation(net, **given, batches=batches)
        with pytest.raises(ShapeError, match=f"batches={batches}: "):
            compare_signals({"net": net}, **given, batches=batches)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, a, b):
        return self.f(a) + b


class Speechless(nn.Module):
    def forward(self, x):
        raise AssertionError


def test_a_model_that_does_not_run_says_why():
    start = r"the model does not run on one tensor of shape \(2, 3, 8, 8\), float32: "
    for model, cause, way_out in (
        (Two(), "TypeError: .*missing 1 required positional argument: 'b'", "that takes one"),
        (chain(Scaled, 4)[1], "RuntimeError: Given groups=1, weight", "that takes one tensor"),
        (Speechless(), "AssertionError; ", "that takes one tensor"),
        (nn.DataParallel(chain(Scaled, 4)), "RuntimeError: .*DataParallel", "give model.module"),
        (scripted(chain(Scaled, 4)), "RuntimeError: .*ScriptModules", "before torch.jit"),
    ):
        with pytest.raises(NormcError, match=f"{start}{cause}.*{way_out}") as caught:
            signal_propagation(model, shape=(2, 3, 8, 8))
        assert caught.value.__cause__ is not None and "\n" not in str(caught.value)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.jit.script(model)


# --- shown ---------------------------------------------------------------------------------------


def two():
    nets = {"short": chain(Scaled, 4), "a longer label": chain(Scaled, 4, 4)}
    return compare_signals(nets, iter([torch.randn(SHAPE), torch.randn(SHAPE)]))


def test_models_are_compared_on_the_same_batches():
    net = chain(Scaled, 4)
    one, other = compare_signals({"one": net, "two": net}, iter([torch.randn(SHAPE)] * 2))
    assert one.blocks == other.blocks and (one.label, other.label) == ("one", "two")
    assert "data, 2 batches of 4x3x8x8" in one.show()
    (gaussian,) = compare_signals({"": net}, shape=SHAPE, batches=1)
    assert gaussian.show().startswith("signals, unit Gaussian, 1 batches of 4x3x8x8\nblock")
    assert len(gaussian.show().splitlines()) == 4


def test_an_endless_loader_is_read_no_further_than_needed():
    net, read = chain(Scaled, 4), []

    def endless():
        for i in count():
            read.append(i)
            yield torch.full(SHAPE, float(i)), torch.zeros(4)

    one, other = compare_signals({"one": net, "two": net}, endless(), batches=3)
    assert read == [0, 1, 2] and one.blocks == other.blocks
    assert compare_signals({"": net}, endless())[0].source == "data, 4 batches of 4x3x8x8"


@pytest.mark.parametrize("models", [{}, [nn.ReLU()], nn.ReLU(), nn.Sequential(nn.ReLU())])
def test_models_to_compare_have_names(models):
    with pytest.raises(NormcError, match="a mapping from names to models"):
        compare_signals(models, shape=SHAPE)


def test_a_table_shows_them_side_by_side():
    text = signals_plot.table(*two(), name="residual")
    head, first, *rows = text.splitlines()
    assert head.split() == ["residual", "short", "a", "longer", "label"]
    assert first.split() == ["(input)", "-", "-"]
    assert [row.split()[0] for row in rows] == ["1", "2"] and rows[-1].split()[1] == "-"
    with pytest.raises(NormcError, match="no curve 'mean'"):
        signals_plot.table(*two(), name="mean")
    with pytest.raises(NormcError, match="nothing to compare"):
        signals_plot.table()


def test_a_figure_without_matplotlib_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in signals_plot.figure, lambda *s: signals_plot.save(tmp_path / "a.svg", *s):
        with pytest.raises(NormcError, match=r"pip install 'normc\[bench\]'"):
            draw(*two())


@pytest.mark.skipif(not find_spec("matplotlib"), reason="draws with matplotlib")
def test_a_figure(tmp_path):
    signals = two()
    drawn = signals_plot.figure(*signals, expected=[1, 2, 3], title="two")
    squared, variances, residuals = drawn.axes
    assert [len(line.get_xdata()) for line in variances.lines] == [2, 3, 3]
    assert [len(line.get_xdata()) for line in residuals.lines] == [1, 2]
    assert list(squared.lines[1].get_ydata()) == [b.squared_mean for b in signals[1].blocks]
    for name in "a.svg", "b.svg", "c.png":
        signals_plot.save(tmp_path / name, *signals)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "a longer label" in (tmp_path / "a.svg").read_text()


def test_a_record_is_a_value():
    first = two()[0]
    assert isinstance(first, Signals)
    assert first == Signals(first.label, first.source, first.blocks)
    assert hash(first)


# --- the public names, and their page ------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there():
    shown = dir(normc.analysis)
    assert shown == sorted(set(shown)) and not {"Any", "TYPE_CHECKING"} & set(shown)
    for name in normc.analysis.__all__:
        assert callable(getattr(normc.analysis, name)) and name in shown
    assert "signals_plot" in shown
    code = "from normc.analysis import *; assert gain and signal_propagation and find_blocks"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="'normc.analysis' has no attribute 'gains_of'"):
        _ = normc.analysis.gains_of


@pytest.mark.cpu
def test_the_page_runs(tmp_path):
    """Its blocks in their order, in a folder of its own; without matplotlib but for the plot."""
    page = (ROOT / "docs" / "analysis.md").read_text("utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(found) >= 4
    draws = find_spec("matplotlib") is not None
    code = "\n".join(text for text in found if draws or "signals_plot.save" not in text)
    file = tmp_path / "page.py"
    file.write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    how = dict(cwd=tmp_path, env=env, capture_output=True, text=True)
    done = subprocess.run([sys.executable, str(file)], **how)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "signals.svg").exists() == draws
