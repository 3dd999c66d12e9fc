"""Nets: what runs in which order, as forward hooks see it, against figure 4 of the paper."""

import pytest
import torch
from torch import nn

from normc.search.nets import ARCHITECTURES, Layers, Scale, build


class E(nn.Module):
    """Stands for the layer; it only counts."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        assert x.shape[1] == self.channels
        return 2 * x


class A(E):
    """Stands for the affine transform."""


def net(name, width=8, depth=(1, 1), classes=10, channels=1, seed=0):
    return build(name, Layers(E, A), Scale(width, depth), classes, channels, seed)


def word(module):
    if isinstance(module, nn.Conv2d):
        (side, other), (stride, _) = module.kernel_size, module.stride
        assert side == other and module.padding == (side // 2, side // 2)
        depthwise = module.groups > 1
        assert not depthwise or module.groups == module.in_channels == module.out_channels
        kind = "depthwise" if depthwise else "conv"
        half = "/2" if stride == 2 else ""
        return f"{kind}{side}x{side}{half}:{module.in_channels}>{module.out_channels}"
    if isinstance(module, E):
        return f"{type(module).__name__}{module.channels}"
    return type(module).__name__


def ran(made, image):
    """The modules without children in the order in which they ran, as words."""
    found = []
    hooks = [
        m.register_forward_hook(lambda m, given, out: found.append(word(m)))
        for m in made.modules()
        if not any(m.children())
    ]
    made(image)
    for hook in hooks:
        hook.remove()
    return " ".join(found)


STEM, TAIL = "conv3x3:1>8", "E16 AdaptiveAvgPool2d Flatten Linear"
GATE = "AdaptiveAvgPool2d conv1x1:32>8 SiLU conv1x1:8>32 Sigmoid"

ORDERS = {  # stem | stage of 8 channels, second block's skip is the identity | halved | tail
    "resnet": f"{STEM} "
    "E8 conv1x1:8>8 E8 conv3x3:8>8 E8 conv1x1:8>8 Identity "
    "E8 conv1x1:8>8 E8 conv3x3/2:8>8 E8 conv1x1:8>16 conv1x1/2:8>16 "
    f"{TAIL}",
    "mobilenet": f"{STEM} "
    "conv1x1:8>32 E32 depthwise3x3:32>32 E32 conv1x1:32>8 A8 Identity "
    "conv1x1:8>32 E32 depthwise3x3/2:32>32 E32 conv1x1:32>16 A16 "
    f"{TAIL}",
    "efficientnet": f"{STEM} "
    f"conv1x1:8>32 E32 depthwise3x3:32>32 E32 {GATE} conv1x1:32>8 A8 Identity "
    f"conv1x1:8>32 E32 depthwise3x3/2:32>32 E32 {GATE} conv1x1:32>16 A16 "
    f"{TAIL}",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_those_of_the_paper(name):
    assert ran(net(name), torch.rand(2, 1, 8, 8)) == ORDERS[name]


LAYERS = {  # of a block: E, A; behind all of them one more E
    "resnet": (3, 0),
    "mobilenet": (2, 1),
    "efficientnet": (2, 1),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("depth", [(1,), (2,), (1, 1), (2, 3), (1, 2, 1)])
def test_as_many_layers_as_blocks_say(name, depth):
    made = net(name, depth=depth)
    layers = [m for m in made.modules() if type(m) is E]
    affines = [m for m in made.modules() if type(m) is A]
    of_layers, of_affines = LAYERS[name]
    assert len(layers) == of_layers * sum(depth) + 1
    assert len(affines) == of_affines * sum(depth)
    assert ran(made, torch.rand(2, 1, 8, 8)).count("E") == len(layers)  # all of them run, once


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("classes, channels, side", [(10, 1, 8), (100, 3, 24), (2, 4, 5)])
def test_shapes_fit_the_data(name, classes, channels, side):
    made = net(name, depth=(1, 1, 1), classes=classes, channels=channels)
    assert made(torch.rand(3, channels, side, side)).shape == (3, classes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_width_and_depth_scale(name):
    """Each stage has twice the channels, at half the height and width."""
    made, sizes = net(name, 12, (2, 1, 2)), []
    for module in made:
        module.register_forward_hook(lambda m, given, out: sizes.append(tuple(out.shape[1:])))
    made(torch.rand(2, 1, 16, 12))
    first, second, third = (12, 16, 12), (24, 8, 6), (48, 4, 3)
    assert sizes[:7] == [first, first, first, second, third, third, third]  # stem, blocks, E
    assert sizes[7:] == [(48, 1, 1), (48,), (10,)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_skip_adds_what_came_in(name):
    """As it is where the shape stays; else a residual block projects it, and others have none."""
    made, seen = net(name, depth=(2, 2)), []

    def look(module, given, out):
        seen.append((module.body(given[0]), given[0], out))

    blocks = list(made)[1:5]
    hooks = [b.register_forward_hook(look) for b in blocks]
    made(torch.rand(2, 1, 8, 8))
    for hook in hooks:
        hook.remove()
    for i, (inside, came, out) in enumerate(seen):
        if i != 2:  # the first block of the second stage changes the shape
            assert torch.equal(out, inside + came)
        elif name == "resnet":
            assert torch.equal(out, inside + blocks[2].skip(came))
        else:
            assert torch.equal(out, inside)


def test_squeeze_excite_weighs_channels():
    """By numbers from 0 to 1, the same at each position, each from the means of all channels."""
    made, seen = net("efficientnet", depth=(1,)), []
    gate = made[1].body[4]
    gate.register_forward_hook(lambda m, given, out: seen.append((given[0], out)))
    made(torch.rand(2, 1, 8, 8))
    ((x, y),) = seen
    weights = y / x
    assert (weights > 0).all() and (weights < 1).all()
    assert torch.allclose(weights, weights[..., :1, :1].expand_as(weights), atol=1e-5)
    rolled = x.roll(3, 2)  # the same means
    assert torch.allclose(gate(rolled), y.roll(3, 2), atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_follow_from_the_seed_alone(name):
    torch.manual_seed(1)
    one, after = net(name), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # torch's own state is as if nothing had been built
    again, other = net(name), net(name, seed=1)
    for key, weight in one.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key])
    same = [torch.equal(w, other.state_dict()[k]) for k, w in one.state_dict().items()]
    assert not any(same)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_do_not_depend_on_the_layer(name):
    """So candidates of a search start from the same networks."""
    plain = net(name)

    def hungry(channels):
        torch.rand(0)
        return nn.PReLU(channels)

    e = Layers(hungry, lambda channels: nn.GroupNorm(1, channels))
    other = build(name, e, Scale(8, (1, 1)), 10, 1, 0)
    convs = [[m.weight for m in n.modules() if isinstance(m, nn.Conv2d)] for n in (plain, other)]
    assert all(torch.equal(a, b) for a, b in zip(*convs, strict=True))
