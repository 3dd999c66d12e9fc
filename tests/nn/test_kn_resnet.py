"""KNResNets: their size, the shapes within, blocks by hand, and that a small one learns."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normc.nn
from normc.cli.digits import load, one_thread, step
from normc.errors import NormcError
from normc.nn.kn_conv import KNConv2d
from normc.nn.kn_resnet import (
    BLOCKS,
    PLANS,
    KNResNet,
    Make,
    Plan,
    Stage,
    kn_resnet18,
    kn_resnet34,
    kn_resnet50,
    kn_resnet_digits,
)

pytestmark = pytest.mark.cpu


@pytest.fixture
def seed():
    torch.manual_seed(0)


def learned(model):
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize(
    ("make", "layers", "millions"),
    # the sizes are those of the ResNets of these names with batch normalization, within 0.1 %
    [(kn_resnet18, 18, 11.69), (kn_resnet34, 34, 21.80), (kn_resnet50, 50, 25.56)],
)
def test_layers_are_as_many_as_the_name_says(make, layers, millions):
    with torch.device("meta"):
        model = make()
    assert len(learned(model)) == layers
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=1e-3)
    assert not list(model.buffers())


@pytest.fixture(scope="module")
def model18():
    torch.manual_seed(0)
    return {low: kn_resnet18(10, low_resolution=low).eval() for low in (True, False)}


@pytest.mark.parametrize(
    ("size", "low", "sides"),
    [
        (32, True, [32, 32, 16, 8, 4, 3]),
        (64, True, [64, 64, 32, 16, 8, 5]),
        (96, False, [24, 24, 12, 6, 4, 1]),
    ],
)
def test_shapes_through_the_network(size, low, sides, model18):
    model, found = model18[low], []
    parts = (model.stem, *model.stages, model.tail)
    hooks = [p.register_forward_hook(lambda *a: found.append(tuple(a[2].shape))) for p in parts]
    with torch.no_grad():
        assert model(torch.rand(1, 3, size, size)).shape == (1, 10)
    for hook in hooks:
        hook.remove()
    widths = [64, 64, 256, 512, 724, 512]
    assert found == [(1, c, s, s) for c, s in zip(widths, sides, strict=True)]


def test_the_last_stage_of_50_has_single_pixels(seed):
    first, last = PLANS["50"].stages[::3]
    model = KNResNet(Plan(8, (first, replace(last, width=24, inside=6))), 7).eval()
    with torch.no_grad():
        assert model.stages[1](torch.rand(1, 256, 4, 4)).shape == (1, 24, 2, 2)
    kernels = [m.kernel_size[0] for m in model.stages[1].modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [1, 1, 3, 1, 1, 3, 1]


@pytest.mark.parametrize(("block", "convs"), [("res", 2), ("bottleneck", 3), ("bottleneck1x1", 3)])
def test_a_block_is_its_convolutions_and_a_skip(block, convs, seed):
    made, x = BLOCKS[block](4, 6, Make(0.0, False, "auto")), torch.randn(2, 4, 5, 5)
    found = [m for m in made.body if not isinstance(m, nn.ReLU)]
    assert len(found) == convs
    y = x
    for conv in found:
        y = conv(y.clamp(min=0))
    torch.testing.assert_close(made(x), x + y)


def test_how_it_starts(seed):
    model = kn_resnet_digits()
    convs = [m for m in model.modules() if isinstance(m, KNConv2d)]
    for m in convs:
        fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
        assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        assert not m.bias.any()
    assert not model.fc.bias.any()
    assert {m.dropout_p for m in convs} == {0.05} and model.norm.dropout_p == 0.25
    assert kn_resnet_digits(dropout_p=0.02).norm.dropout_p == pytest.approx(0.1)


def test_evaluation_is_repeatable_unless_dropout_is_wished_there(seed):
    x = torch.rand(2, 1, 8, 8)
    model, always = kn_resnet_digits().eval(), kn_resnet_digits(dropout_in_eval=True).eval()
    always.load_state_dict(model.state_dict())
    assert torch.equal(model(x), model(x))
    assert not torch.equal(always(x), always(x))


def test_export_takes_any_batch_height_and_width(seed):
    model, x = kn_resnet_digits().eval(), torch.rand(2, 1, 8, 8)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
    for given in (x, torch.rand(5, 1, 12, 10)):
        torch.testing.assert_close(exported(given), model(given))


RES = Stage("res", 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Stage("bottelneck", 1, 8, 8),
            "no block is called 'bottelneck'.*mean `bottleneck`",
        ),
        (lambda: Stage(None, 1, 8, 8), "no block is called None: res, bottleneck"),
        (lambda: Stage("res", 0, 8, 8), "a stage's count must be a whole number, from 1 on, not 0"),
        (lambda: Stage("res", 1, -8, 8), "a stage's width must be"),
        (lambda: Stage("res", 1, 8, 1.5), "a stage's inside must be"),
        (lambda: Plan(8, ()), "a plan has one stage or more"),
        (lambda: Plan(-8, (RES,)), "a plan's stem must be"),
        (lambda: Plan(8, (RES,), 0), "a plan's tail must be"),
        (lambda: KNResNet("18"), "a plan is a Plan, not '18': PLANS has those of 18, 34, 50"),
        (lambda: KNResNet(Plan(8, (RES,)), 0), "num_classes must be"),
        (lambda: KNResNet(Plan(8, (RES,)), in_channels=-1), "in_channels must be"),
    ],
)
def test_plans_that_do_not_fit(make, says):
    with pytest.raises(NormcError, match=says):
        make()


def test_plans_are_public():
    assert (normc.nn.Plan, normc.nn.Stage) == (Plan, Stage)


def test_a_small_one_learns_64_digits(seed):
    digits, model = load(), kn_resnet_digits()
    images, classes = digits.train[:64], digits.train_classes[:64]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    with one_thread():
        for _ in range(20):
            step(model, optimizer, images, classes)
            losses.append(F.cross_entropy(model(images), classes).item())
    assert losses[-1] < losses[0] / 3
    assert (model.eval()(images).argmax(1) == classes).double().mean() > 0.9
