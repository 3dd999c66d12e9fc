"""Scaled weight standardization: value and gradients against both published formulas in plain
torch, and that the layers are nn.Conv2d and nn.Linear in everything else."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import prune
from torch.testing import assert_close

from normc.errors import NormcError, ShapeError
from normc.nn.kn_conv import KNConv2d
from normc.nn.scaled_std import GAMMAS, ScaledStdConv2d, ScaledStdLinear, gamma_of

pytestmark = [
    pytest.mark.cpu,
    # torch's own rules for jvp are TorchScript, loaded when the first tangent is asked for
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

WIDE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
FORMS = ["deepmind", "timm"]
RELU = 1.7139588594436646
on_forms = pytest.mark.parametrize("form", FORMS)
on_backends = pytest.mark.parametrize("backend", ["c", "torch"])


def column(gain, weight):
    return gain.view(-1, *[1] * (weight.dim() - 1))


def deepmind(weight, gain, gamma=1.0, eps=1e-4):
    """base.py: scale = rsqrt(max(var*N, eps))*gain; weight*scale - mean*scale."""
    dims, fan_in = tuple(range(1, weight.dim())), weight[0].numel()
    mean = weight.mean(dims, keepdim=True)
    var = weight.var(dims, correction=0, keepdim=True)
    scale = torch.rsqrt(torch.clamp(var * fan_in, min=eps)) * column(gain, weight)
    return gamma * (weight * scale - mean * scale)


def timm(weight, gain, gamma=1.0, eps=1e-6):
    """std_conv.py: F.batch_norm of (1, C_out, N) with the weight gain*gamma/sqrt(N)."""
    scale = gain * gamma * weight[0].numel() ** -0.5
    rows = weight.reshape(1, len(weight), -1)
    return F.batch_norm(rows, None, None, scale, None, True, 0.0, eps).reshape_as(weight)


PUBLISHED = {"deepmind": deepmind, "timm": timm}


def randn(*shape, seed=0, dtype=WIDE):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def drawn(layer):
    """A layer in float64 with parameters of no symmetry, far from where they start."""
    layer = layer.double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(0.3 + randn(*p.shape, seed=i + 1))
    return layer


def conv(*sizes, **options):
    return drawn(ScaledStdConv2d(*(sizes or (6, 4, (3, 2))), **options))


def gradients(y, tensors):
    wave = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * wave).sum(), tensors)


# --- value and gradients --------------------------------------------------------------------------


@on_backends
@on_forms
@pytest.mark.parametrize(
    "sizes, options",
    [((6, 4, (3, 2)), {}), ((6, 4, 1), {}), ((6, 9, 3), {"groups": 3}), ((4, 4, 3), {"groups": 4})],
)
def test_conv_is_the_published_formula(form, sizes, options, backend):
    ours = conv(*sizes, form=form, gamma="relu", backend=backend, **options)
    want = PUBLISHED[form](ours.weight, ours.gain, RELU)
    assert_close(ours.standardized_weight(), want, **EXACT)
    x = randn(2, 6 if sizes[0] == 6 else 4, 5, 5)
    theirs = F.conv2d(x, want, ours.bias, groups=ours.groups)
    assert_close(ours(x), theirs, **EXACT)
    tensors = (ours.weight, ours.gain, ours.bias)
    assert_close(gradients(ours(x), tensors), gradients(theirs, tensors), **EXACT)


@on_forms
def test_linear_is_the_published_formula(form):
    ours = drawn(ScaledStdLinear(7, 5, form=form))
    x, want = randn(3, 2, 7), PUBLISHED[form](ours.weight, ours.gain)
    theirs = F.linear(x, want, ours.bias)
    assert_close(ours(x), theirs, **EXACT)
    tensors = (ours.weight, ours.gain, ours.bias)
    assert_close(gradients(ours(x), tensors), gradients(theirs, tensors), **EXACT)


@on_forms
def test_gradients_can_be_differentiated(form):
    standardize = conv(2, 3, 2, form=form, bias=False).standardization
    args = (randn(3, 2, 2, 2).requires_grad_(), randn(3, seed=1).requires_grad_())
    assert gradcheck(standardize, args) and gradgradcheck(standardize, args)


@on_forms
def test_epsilon_stands_where_it_does_in_the_published_code(form):
    """Weights so small that epsilon decides, and rows that do not vary at all."""
    ours = conv(3, 4, 3, form=form)
    with torch.no_grad():
        ours.weight.mul_(1e-3)
        ours.weight[1] = 0.25
    want = PUBLISHED[form](ours.weight, ours.gain)
    assert_close(ours.standardized_weight(), want, **EXACT)
    both = [gradients(w, (ours.weight, ours.gain)) for w in (ours.standardized_weight(), want)]
    assert_close(both[0], both[1], rtol=1e-10, atol=1e-8)
    other = conv(3, 4, 3, form=form, eps=0.1)
    assert_close(
        other.standardized_weight(), PUBLISHED[form](other.weight, other.gain, eps=0.1), **EXACT
    )


@on_forms
@pytest.mark.parametrize(
    "dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)
def test_every_dtype(form, dtype, error):
    layer = conv(16, 8, 3, form=form).to(dtype)
    want = PUBLISHED[form](layer.weight.double(), layer.gain.double())
    found = layer.standardized_weight()
    assert found.dtype == dtype
    assert_close(found.double(), want, rtol=error, atol=error)
    assert layer(randn(1, 16, 4, 4).to(dtype)).dtype == dtype


def test_channels_last_weights_keep_their_strides():
    layer = conv(6, 4, 3)
    want = layer.standardized_weight()
    last = layer.to(memory_format=torch.channels_last)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert last.standardized_weight().stride() == last.weight.stride() != want.stride()
    assert_close(last.standardized_weight(), want, **EXACT)


# --- nn.Conv2d in all else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "dilation": (1, 2), "bias": False},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": (1, 0), "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate", "groups": 2},
    ],
)
def test_strides_padding_and_the_like_are_those_of_conv2d(options):
    ours = conv(4, 6, 3, **options)
    theirs = nn.Conv2d(4, 6, 3, **options).double()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "gain"})
    theirs.weight = nn.Parameter(deepmind(ours.weight, ours.gain))
    for x in (randn(2, 4, 7, 6), randn(4, 7, 6)):
        assert_close(ours(x), theirs(x), **EXACT)


@on_forms
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_saved_and_where_it_starts(form, bias):
    """The table of the two codes: gain 1; N(0, 1/N) and 0, or what torch starts with."""
    torch.manual_seed(0)
    ours = ScaledStdConv2d(32, 64, 3, groups=2, bias=bias, form=form)
    torch.manual_seed(0)
    theirs = nn.Conv2d(32, 64, 3, groups=2, bias=bias)
    assert list(ours.state_dict()) == ["weight", *["bias"] * bias, "gain"]
    assert ours.gain.shape == (64,) and (ours.gain == 1).all()
    if form == "timm":
        assert torch.equal(ours.weight, theirs.weight)
        assert not bias or torch.equal(ours.bias, theirs.bias)
    else:
        z = ours.weight * 144**0.5
        assert abs(z.std() - 1) < 0.03 and abs((z**4).mean() - 3) < 0.3, "not N(0, 1/N)"
        assert not bias or (ours.bias == 0).all()
    for layer in (ours, ScaledStdLinear(8, 4, form=form, bias=bias)):
        nn.init.zeros_(layer.gain)
        layer.reset_parameters()
        assert (layer.gain == 1).all() and layer.weight.std() > 0.01


@on_forms
def test_from_conv_keeps_values_sizes_and_flags(form):
    theirs = nn.Conv2d(
        4, 6, (3, 2), 2, "valid", groups=2, padding_mode="circular", dtype=WIDE
    ).eval()
    theirs.bias.requires_grad_(False)
    ours = ScaledStdConv2d.from_conv(theirs, form=form, gamma="silu")
    assert not ours.training and ours.weight.requires_grad and not ours.bias.requires_grad
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert ours.weight.data_ptr() != theirs.weight.data_ptr()
    theirs.weight = nn.Parameter(
        PUBLISHED[form](theirs.weight, torch.ones(6, dtype=WIDE), GAMMAS["silu"])
    )
    x = randn(2, 4, 6, 6)
    assert_close(ours(x), theirs(x), **EXACT)
    assert ScaledStdConv2d.from_conv(nn.Conv2d(2, 2, 1, bias=False)).bias is None


def test_from_conv_takes_what_does_as_conv2d_does():
    class Named(nn.Conv2d):
        """Nothing but a name."""

    theirs = Named(3, 2, 3)
    assert torch.equal(ScaledStdConv2d.from_conv(theirs).weight, theirs.weight)
    lazy = nn.LazyConv2d(2, 3)
    lazy(randn(1, 3, 4, 4, dtype=torch.float32))
    assert ScaledStdConv2d.from_conv(lazy).weight.shape == (2, 3, 3, 3)


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args):
        return 2 * super()._conv_forward(*args)


class OfMine(ScaledStdConv2d):
    """Standardized already, under another name."""


def pruned():
    return prune.l1_unstructured(nn.Conv2d(2, 2, 3), "weight", 0.5)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: nn.ConvTranspose2d(2, 2, 3), "not a ConvTranspose2d"),
        (lambda: nn.Linear(2, 2), "not a Linear"),
        (lambda: ScaledStdConv2d(2, 2, 3), "a plain nn.Conv2d"),
        (lambda: OfMine(2, 2, 3), "not a OfMine"),
        (lambda: KNConv2d(2, 2, 3, padding=1), "not a KNConv2d"),
        (lambda: Doubled(2, 2, 3), "not a Doubled"),
        (lambda: nn.LazyConv2d(2, 3), "no shape yet, so call the convolution once"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "remove that first"),
        (pruned, "remove that first"),
    ],
)
def test_from_conv_refuses_what_does_more(make, says):
    with pytest.raises(NormcError, match=says):
        ScaledStdConv2d.from_conv(make())


@on_forms
def test_what_timm_has_saved_loads(form):
    layer = nn.Sequential(conv(3, 4, 3, form=form))
    saved = {name: p.clone() for name, p in layer.state_dict().items()}
    saved["0.gain"] = torch.tensor([1.5, -2.0, 0.25, 3.0], dtype=WIDE).view(4, 1, 1, 1)
    layer.load_state_dict(saved)
    assert layer[0].gain.tolist() == [1.5, -2.0, 0.25, 3.0]
    assert saved["0.gain"].shape == (4, 1, 1, 1), "what is given is left as it is"
    with pytest.raises(RuntimeError, match="size mismatch for 0.gain"):
        layer.load_state_dict({**saved, "0.gain": torch.ones(5, 1, 1, 1)})


def test_copies_and_repr():
    layer = conv(3, 2, 3, form="timm", gamma=1.5)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - ours
        assert_close(again(x := randn(1, 3, 3, 3)), layer(x), **EXACT)
        assert again.gain is not layer.gain
    assert "3, 2, kernel_size=(3, 3)" in repr(layer)
    assert repr(layer).endswith("form='timm', gamma=1.5, eps=1e-06)")
    assert "in_features=3" in (text := repr(ScaledStdLinear(3, 2))) and "gamma=1.0" in text
    assert repr(ScaledStdLinear(3, 2, backend="torch")).endswith("eps=0.0001, backend='torch')")


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: ScaledStdConv2d(3, 4, 3, form="tim"), "did you mean `timm`"),
        (lambda: ScaledStdConv2d(3, 4, 3, gamma="relo"), "did you mean `relu`"),
        (lambda: ScaledStdConv2d(3, 4, 3, form=None), "no form None: deepmind or timm"),
        (lambda: ScaledStdConv2d(3, 4, 3, gamma="mish"), r"is normc.analysis.gain\('mish'\)"),
        (lambda: ScaledStdLinear(3, 4, gamma=float("nan")), "gamma must be"),
        (lambda: ScaledStdLinear(3, 4, gamma=None), "gamma must be .* above 0, not None"),
        (lambda: ScaledStdLinear(3, 4, eps=-1.0), "eps must be"),
    ],
)
def test_wrong_arguments_say_what_is_right(make, says):
    with pytest.raises(NormcError, match=says):
        make()


def test_a_fan_in_of_one_is_refused():
    for make in (lambda: ScaledStdConv2d(4, 4, 1, groups=4), lambda: ScaledStdLinear(1, 4)):
        with pytest.raises(ShapeError, match="use a plain layer"):
            make()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_fan_in_of_none_is_refused():
    for make in (lambda: ScaledStdConv2d(0, 4, 3), lambda: ScaledStdLinear(0, 4)):
        with pytest.raises(ShapeError, match="a layer without inputs"):
            make()


# --- in PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_torch_compile_sees_no_break(last):
    net = nn.Sequential(conv(2, 4, 3), nn.Flatten(), drawn(ScaledStdLinear(16, 3)))
    net = net.to(memory_format=torch.channels_last) if last else net
    x, found = randn(3, 2, 4, 4), []
    for call in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        found.append([y := call(x), *gradients(y, list(net.parameters()))])
    torch._dynamo.reset()
    assert_close(found[1], found[0], **EXACT)


def test_torch_func():
    """Gradients, tangents and a batch of weights, against the published formula."""
    layer = conv(2, 3, 2, bias=False)
    x, ones = randn(2, 2, 4, 4), (randn(3, 2, 2, 2, seed=5), randn(3, seed=6))

    def ours(weight, gain):
        return func.functional_call(layer, {"weight": weight, "gain": gain}, (x,)).sin().sum()

    def theirs(weight, gain):
        return F.conv2d(x, deepmind(weight, gain)).sin().sum()

    args = (layer.weight.detach(), layer.gain.detach())
    several = tuple(torch.stack([a, a.flip(0), 2 * a + 1]) for a in args)
    for f in (
        lambda g: func.grad(g, (0, 1))(*args),
        lambda g: func.jvp(g, args, ones),
        lambda g: func.hessian(g, (0, 1))(*args),
        lambda g: func.vmap(func.grad(g, (0, 1)))(*several),
        lambda g: func.vmap(g, (1, 0))(several[0].transpose(0, 1), several[1]),
    ):
        assert_close(f(ours), f(theirs), **EXACT)


def test_under_autocast_the_weight_is_standardized_in_full():
    layer, x = conv(2, 3, 3).float(), randn(1, 2, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.standardized_weight().dtype == torch.float32


# --- gamma ----------------------------------------------------------------------------------------

ACTIVATIONS = {
    "identity": lambda x: x, "celu": F.celu, "elu": F.elu, "leaky_relu": F.leaky_relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"), "log_sigmoid": F.logsigmoid, "relu": F.relu,
    "relu6": F.relu6, "selu": F.selu, "sigmoid": F.sigmoid, "silu": F.silu,
    "soft_sign": F.softsign, "softplus": F.softplus, "tanh": F.tanh,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gammas_are_those_of_a_standard_normal(name):
    """By quadrature; the published numbers are estimates, at most 0.09 % too large."""
    z = torch.linspace(-12, 12, 240_001, dtype=WIDE)
    density = torch.exp(-z * z / 2)
    y = ACTIVATIONS[name](z)
    mean = (y * density).sum() / density.sum()
    exact = (((y - mean) ** 2 * density).sum() / density.sum()) ** -0.5
    assert -1e-9 <= gamma_of(name) / exact - 1 < 9e-4


def test_the_table_of_gammas_is_the_published_one():
    assert set(GAMMAS) == {*ACTIVATIONS, "glu", "log_softmax"}
    assert (GAMMAS["glu"], GAMMAS["log_softmax"]) == (1.8484294414520264, 1.0002083778381348)
    assert gamma_of("relu") == RELU and gamma_of(2) == 2.0


@on_forms
def test_variance_goes_through_at_the_start(form):
    """Standard normal numbers, relu, a linear layer with relu's gamma: variance 1, mean 0."""
    torch.manual_seed(0)
    layer = ScaledStdLinear(256, 128, form=form, gamma="relu", bias=False)
    y = layer(F.relu(torch.randn(2000, 256)))
    assert abs(y.var(0).mean() - 1) < 0.02 and y.mean(0).square().mean() < 0.01
