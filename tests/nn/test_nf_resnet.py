"""NF-ResNet: the schedule, the blocks against plain torch, the published sizes, and training."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normc.errors import FormulaError, NormcError
from normc.nn.nf_resnet import (
    DEPTHS,
    NFBlock,
    NFResNet,
    expected_stds,
    expected_variances,
    nf_resnet,
    nf_resnet_small,
)
from normc.nn.nf_style import ScaledActivation, Style
from normc.nn.scaled_std import GAMMAS, ScaledStdConv2d
from normc.search.data import digits

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

WIDE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
RELU = GAMMAS["relu"]


def randn(*shape, seed=0, dtype=WIDE):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- the schedule ---------------------------------------------------------------------------------

TABLE = [  # depths 3, 4, 6, 3 and alpha 0.2: the value at each block's input
    [1, 1.0198, 1.0392],
    [1.0583, 1.0198, 1.0392, 1.0583],
    [1.0770, 1.0198, 1.0392, 1.0583, 1.0770, 1.0954],
    [1.1136, 1.0198, 1.0392],
]


def test_expected_deviations_are_the_table():
    assert [[round(std, 4) for std in stage] for stage in expected_stds((3, 4, 6, 3))] == TABLE


@pytest.mark.parametrize("depths, alpha", [((1,), 0.2), ((24, 24, 24, 24), 0.2), ((1, 3, 2), 1.0)])
def test_expected_deviations_follow_the_published_rule(depths, alpha):
    """The loop of nf_resnet.py: after a stage's first block 1, then sqrt(std**2 + alpha**2)."""
    std, want, outputs = 1.0, [], []
    for depth in depths:
        for i in range(depth):
            want.append(std)
            std = ((1.0 if i == 0 else std) ** 2 + alpha**2) ** 0.5
            outputs.append(std**2)
    assert sum(expected_stds(depths, alpha), ()) == pytest.approx(want, abs=1e-12)
    assert sum(expected_variances(depths, alpha), ()) == pytest.approx(outputs, abs=1e-12)


def variances(net, size, seed):
    """Of each block's output, over samples and positions, in the mean over channels."""
    for block in net.blocks:
        nn.init.ones_(block.skip_gain)
    found = []
    with torch.no_grad():
        x = net.stem(randn(1, 3, size, size, seed=seed, dtype=torch.float32))
        for block in net.blocks:
            x = block(x)
            found.append(x.var((0, 2, 3), correction=0).mean())
    return torch.stack(found)


@pytest.mark.parametrize("depths, widths", [((50,), (64,)), ((12, 13, 13, 12), (32, 64, 64, 64))])
def test_variance_over_fifty_blocks_is_the_expected_one(depths, widths):
    """Unit Gaussian input, skip gains of 1: plus 0.04 per block, back to 1.04 at a transition."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = NFResNet(depths, widths, 10, low_resolution=True)
        found.append(variances(net, 64, seed))
    want = torch.tensor(sum(expected_variances(depths), ()))
    assert want.max() == pytest.approx(1 + 0.04 * max(depths))
    ratio = torch.stack(found).mean(0) / want
    assert 0.9 < ratio.min() and ratio.max() < 1.1, ratio


# --- a block --------------------------------------------------------------------------------------


def branch(block, h, act):
    """The residual branch in plain torch: conv act conv act conv."""
    for name in ("conv0", "conv1", "conv2"):
        one = getattr(block.branch, name)
        h = h if name == "conv0" else act(h)
        h = F.conv2d(h, one.standardized_weight(), one.bias, one.stride, one.padding)
    return h


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("before, after, stride", [(8, 8, 1), (8, 12, 1), (8, 8, 2)])
@pytest.mark.parametrize("excite", [0.0, 0.25])
def test_a_block_is_the_published_one(before, after, stride, excite, activation):
    gelu = {"approximate": "tanh"} if activation == "gelu" else {}
    block = NFBlock(
        before, after, Style(activation, alpha=0.3, excite=excite), stride, std=1.25
    ).double()
    nn.init.constant_(block.skip_gain, 0.7)

    def act(x):
        return getattr(F, activation)(x, **gelu) * GAMMAS[activation]

    def published(x):
        h = act(x) / 1.25
        shortcut, p = x, block.project
        if stride > 1 or before != after:
            shortcut = F.conv2d(h, p.standardized_weight(), p.bias, p.stride)
        out = branch(block, h, act)
        if excite:
            means = block.branch.excite.gate(out.mean((2, 3)))
            out = 2 * torch.sigmoid(means)[:, :, None, None] * out
        return out * block.skip_gain * 0.3 + shortcut

    x, found = randn(2, before, 6, 6).requires_grad_(), []
    wave = randn(2, after, 6 // stride, 6 // stride, seed=1)
    for call in (block, published):
        found.append([y := call(x), *torch.autograd.grad((y * wave).sum(), [x, block.skip_gain])])
    assert_close(found[0], found[1], **EXACT)


def test_a_block_starts_as_its_shortcut():
    block, x = NFBlock(8, 8, Style()), randn(2, 8, 5, 5, dtype=torch.float32)
    assert block.skip_gain.shape == () and torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.skip_gain.grad != 0 and (block.branch.conv0.weight.grad == 0).all()


def test_stochastic_depth_drops_whole_branches_in_training_and_scales_none():
    torch.manual_seed(0)
    block = NFBlock(8, 8, Style(), depth_rate=0.25)
    nn.init.ones_(block.skip_gain)
    x = randn(8, 8, 2, 2, dtype=torch.float32).repeat(50, 1, 1, 1)
    whole, some = block.eval()(x), block.train()(x)
    dropped, kept = (some == x).flatten(1).all(1), (some == whole).flatten(1).all(1)
    assert torch.equal(dropped, ~kept), "a sample's branch is there as a whole, or not at all"
    assert 0.15 < dropped.float().mean() < 0.35


# --- the activation as a formula ------------------------------------------------------------------

POINTWISE = {
    "identity": lambda x: x, "celu": F.celu, "elu": F.elu, "leaky_relu": F.leaky_relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"), "log_sigmoid": F.logsigmoid, "relu": F.relu,
    "relu6": F.relu6, "selu": F.selu, "sigmoid": F.sigmoid, "silu": F.silu,
    "soft_sign": F.softsign, "softplus": F.softplus, "tanh": F.tanh,
}  # fmt: skip


@pytest.mark.parametrize("name", POINTWISE)
def test_every_published_activation(name):
    x = 3 * randn(2, 3, 4, 4)
    act = Style(name, backend="torch").act(1.6)
    assert_close(act(x), POINTWISE[name](x) * GAMMAS[name] / 1.6, **EXACT)


def test_an_activation_may_be_any_expression():
    act = Style("x*sigmoid(1.5*x)", gamma=2.0).act(0.5)
    x = randn(2, 3)
    assert_close(act(x), 4 * x * torch.sigmoid(1.5 * x), **EXACT)
    assert repr(act) == "ScaledActivation(4 * x*sigmoid(1.5*x))"


def test_an_activation_may_be_any_function_with_its_gamma():
    x = randn(2, 3)
    assert_close(Style("mish", gamma=2.0).act()(x), 2 * F.mish(x), **EXACT)
    two = Style("h = tanh(x)\nh*h", gamma=1.0).act(0.5)
    assert_close(two(x), 2 * x.tanh() ** 2, **EXACT)


NOT_ONE = [  # texts that are no expression of one element of x
    ("scale*x", NormcError, "one expression of x alone, not `scale\\*x`"),
    ("v*x", NormcError, "one expression of x alone"),
    ("x) + (3", FormulaError, "closes nothing"),
    ("input h; h + x", NormcError, "of x alone"),
    ("x, -x", NormcError, "one expression"),
    ("3", NormcError, "of x alone"),
    ("x/group_std(x)", NormcError, "`x/group_std\\(x\\)` has statistics"),
]


@pytest.mark.parametrize("text, error, says", NOT_ONE)
def test_an_activation_is_parsed_alone(text, error, says):
    for make in (lambda: ScaledActivation(text, 2.0), lambda: Style(text, gamma=2.0).act()):
        with pytest.raises(error, match=says):
            make()


def test_blocks_share_a_kernel_and_conversions_keep_the_scale():
    first, second = Style().act(1.0), Style().act(1.25)
    assert first.op.formula is second.op.formula and first.scale == 1.25 * second.scale
    assert not list(first.buffers()) and not first.state_dict()
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert second.bfloat16()(x) == torch.tensor(RELU / 1.25).bfloat16()


# --- networks -------------------------------------------------------------------------------------

# Weights, biases and norms of the ResNet with the same convolutions, as its trainings report them.
# A gain and a bias of a convolution are as many as the two parameters of the norm behind it.
RESNETS = {50: 25_557_032, 101: 44_549_160, 152: 60_192_808, 200: 64_673_832}


@pytest.mark.parametrize("variant", [50, 101, 152, 200, 288])
def test_published_networks(variant):
    with torch.device("meta"):
        net = nf_resnet(variant)
    depths = DEPTHS[variant]
    assert len(net.blocks) == sum(depths) and 3 * sum(depths) + 2 in (variant, 290)
    found = sum(p.numel() for p in net.parameters())
    assert variant not in RESNETS or found == RESNETS[variant] + len(net.blocks)
    conv, blocks = net.stem[0], iter(net.blocks)
    assert (conv.out_channels, conv.kernel_size, conv.stride) == (64, (7, 7), (2, 2))
    for stage, (depth, width) in enumerate(zip(depths, (256, 512, 1024, 2048), strict=True)):
        for i in range(depth):
            block, stride = next(blocks), 2 if stage and not i else 1
            three, last = block.branch.conv1, block.branch.conv2
            assert (three.out_channels, last.out_channels) == (width // 4, width)
            assert three.stride == (stride, stride) and (block.project is None) == (i > 0)
            std = expected_stds(depths)[stage][i]
            assert block.act.scale == pytest.approx(RELU / std) and block.skip_gain.shape == ()
    assert all(conv.bias is not None for conv in net.modules() if isinstance(conv, nn.Conv2d))


def test_a_published_network_runs_and_starts_as_published():
    torch.manual_seed(0)
    net = nf_resnet(50, num_classes=10, stochastic_depth=0.1, dropout=0.2, excite=0.25)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert abs(net.fc.weight.std() - 0.01) < 5e-4 and (net.fc.bias == 0).all()
    rates = [block.depth_rate for block in net.blocks]
    assert rates == pytest.approx([0.1 * i / 16 for i in range(16)])
    assert all((block.skip_gain == 0).all() for block in net.blocks)


@pytest.mark.parametrize("form", ["deepmind", "timm"])
def test_options_reach_the_convolutions(form):
    net = nf_resnet_small(4, 2, form=form, alpha=0.5, backend="torch", activation="silu")
    convs = [m for m in net.modules() if isinstance(m, ScaledStdConv2d)]
    assert len(convs) == 4 * 3 + 2 + 1
    assert all((c.standardization.form, c.standardization.gamma) == (form, 1) for c in convs)
    assert net.blocks[1].act.scale == pytest.approx(GAMMAS["silu"] / 1.25**0.5)
    assert net(torch.randn(1, 2, 8, 8)).shape == (1, 4)


def test_numbers_may_be_numpys():
    small = nf_resnet_small(np.int64(4), alpha=np.float64(0.5), stochastic_depth=np.float32(0.1))
    assert small(torch.randn(1, 1, 8, 8)).shape == (1, 4)
    assert small.blocks[1].act.scale == pytest.approx(RELU / 1.25**0.5)
    assert expected_stds(np.array([3]), np.float64(0.5)) == expected_stds([3], 0.5)
    with torch.device("meta"):
        assert len(nf_resnet(np.int64(50)).blocks) == 16


def test_export_takes_any_batch_height_and_width():
    net = nf_resnet_small(3, stochastic_depth=0.1)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    x, other = randn(2, 1, 8, 8).float(), randn(5, 1, 12, 10).float()
    exported = torch.export.export(net, (x,), dynamic_shapes=(sizes,)).module()
    for given in (x, other):  # no branch is there at the start, kept or not
        assert_close(exported(given), net(given))


def test_torch_compile_sees_no_break():
    net = nf_resnet_small(3, 1, stochastic_depth=0.1, excite=0.25).double().eval()
    x, found = randn(2, 1, 6, 6), []
    with torch.no_grad():
        for block in net.blocks:
            block.skip_gain.fill_(1)
    for call in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        y = call(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
    torch._dynamo.reset()
    assert_close(found[1], found[0], **EXACT)


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: nf_resnet(18), NormcError, "one of 50, 101, 152, .* not 18"),
        (lambda: nf_resnet("50"), NormcError, "one of 50, 101, 152, .* not '50'"),
        (lambda: NFResNet((1, 2), (8,), 10), NormcError, "blocks and a width"),
        (lambda: NFResNet((0,), (8,), 10), NormcError, "a depth must be a whole number, from 1"),
        (lambda: NFResNet((1,), (-8,), 10), NormcError, "a width must be a whole number"),
        (lambda: nf_resnet_small(0), NormcError, "num_classes must be"),
        (lambda: nf_resnet_small(in_channels=-1), NormcError, "in_channels must be"),
        (lambda: nf_resnet_small(stochastic_depth=1.0), NormcError, "stochastic_depth"),
        (lambda: nf_resnet_small(activation="mish(x)"), NormcError, "no gamma is published"),
        (lambda: nf_resnet_small(activation="mish"), NormcError, r"analysis.gain\('mish'\)"),
        (lambda: nf_resnet_small(activation="glu"), NormcError, "`glu` is no function of one el"),
        (lambda: Style("log_softmax", gamma=1.0).act(), NormcError, "is no function of one elem"),
        (lambda: Style("relo", gamma=1.0).act(), FormulaError, "did you mean `relu`"),
        (lambda: Style(F.relu), NormcError, "activation is a name or an expression"),
        (lambda: Style().act(0.0), NormcError, "std must be"),
        (lambda: nf_resnet_small(actvation="relu"), NormcError, "`actvation`.* `activation`"),
        (lambda: nf_resnet(50, classes=10), NormcError, "`classes` .*mean `num_classes`"),
        (lambda: nf_resnet_small(alpha=float("nan")), NormcError, "alpha must be .* not nan"),
        (lambda: nf_resnet_small(alpha=-0.2), NormcError, "alpha must be"),
        (lambda: nf_resnet_small(alpha="0.2"), NormcError, "alpha must be"),
        (lambda: nf_resnet_small(bottleneck=0.0), NormcError, "bottleneck must be .* above 0"),
        (lambda: nf_resnet_small(excite=-1), NormcError, "excite must be"),
        (lambda: expected_stds([3], float("nan")), NormcError, "alpha must be"),
        (lambda: expected_stds([-3]), NormcError, "a depth must be"),
    ],
)
def test_wrong_arguments_say_what_is_right(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_small_network_learns_digits():
    torch.manual_seed(0)
    data, chance = digits(), torch.Generator().manual_seed(0)
    net = nf_resnet_small(data.classes, data.channels)
    start = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        chosen = torch.randint(len(data.train), (64,), generator=chance)
        images, classes = data.batch(chosen, chance)
        loss = F.cross_entropy(net(images), classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = net.eval()(data.prepared(data.test)).argmax(1) == data.test_classes
    assert right.float().mean() > 0.6
    moved = zip(net.parameters(), start.parameters(), strict=True)
    assert all(not torch.equal(now, before) for now, before in moved), "all of it is trained"
