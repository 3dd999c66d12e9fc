"""KNConv: the same as KernelNorm and a strided convolution, and as its definition with dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normc.errors import ShapeError
from normc.nn.kernel_norm import KernelNorm2d
from normc.nn.kn_conv import KNConv2d, KNConv2d1x1

pytestmark = pytest.mark.cpu

WINDOWS = [  # kernel, stride, padding
    (2, 1, 1),
    ((3, 2), (2, 1), (1, 0, 2, 1)),
    (3, 2, (1, 0)),
    ((1, 2), 3, (0, 1, 0, 1)),
    (1, 1, 0),
]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conv(*args, seed=1, dtype=torch.float64, **kw):
    torch.manual_seed(seed)
    return KNConv2d(*args, dtype=dtype, **kw)


def gradients(y, *tensors):
    return torch.autograd.grad((y * numbers(*y.shape, seed=9, dtype=y.dtype)).sum(), tensors)


def definition(layer, x, dropped, eps=1e-5):
    """The convolution of the windows of x, normalized by the statistics of those of ``dropped``."""
    windows = layer.windows
    columns, copies = (
        F.unfold(F.pad(t, windows.padding), windows.kernel, stride=windows.stride)
        for t in (x, dropped)
    )
    var, mean = torch.var_mean(copies, 1, correction=0, keepdim=True)
    u = ((columns - mean) / (var + eps).sqrt()).unflatten(1, (layer.groups, -1))
    w = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    y = torch.einsum("gok,ngkl->ngol", w, u).flatten(1, 2)
    y = y if layer.bias is None else y + layer.bias.view(1, -1, 1)
    return y.unflatten(2, layer.windows.count(x))


# --- what it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
def test_equals_kernel_norm_and_a_strided_convolution(kernel, stride, padding, backend, groups):
    x = numbers(2, 4, 6, 7).requires_grad_()
    layer = conv(4, 6, kernel, stride, padding, groups, dropout_p=0, eps=1e-3, backend=backend)
    norm = KernelNorm2d(kernel, stride, padding, dropout_p=0, eps=1e-3, backend=backend)
    w, b = layer.weight, layer.bias
    y, want = layer(x), F.conv2d(norm(x), w, b, norm.windows.kernel, groups=groups)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    pairs = gradients(y, x, w, b), gradients(want, x, w, b)
    torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-10)


def test_single_pixels():
    x, layer = numbers(2, 4, 3, 3).requires_grad_(), conv(4, 6, 1, dropout_p=0, groups=2)
    single = KNConv2d1x1(4, 6, dropout_p=0, groups=2, dtype=torch.float64)
    single.conv.load_state_dict(layer.state_dict())
    y, want = single(x), layer(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradients(y, x), gradients(want, x))


def test_takes_the_weights_of_a_convolution():
    torch.manual_seed(0)
    plain, layer = nn.Conv2d(3, 4, 3, bias=False), KNConv2d(3, 4, 3, bias=False).eval()
    layer.load_state_dict(plain.state_dict())
    x = numbers(2, 3, 5, 5, dtype=torch.float32)
    torch.testing.assert_close(layer(x), definition(layer, x, x))


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [(1, 1), (1, 0, 0, 1)])
def test_a_pixel_is_dropped_for_all_windows_that_hold_it(around):
    p, x = 0.3, numbers(2, 4, 5, 6).requires_grad_()
    layer = conv(4, 3, (2, 3), 1, around, dropout_p=p)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    kept = (torch.rand_like(x.transpose(0, 1)).transpose(0, 1) >= p).double() / (1 - p)
    assert 0.6 < (kept > 0).double().mean() < 0.8
    want = definition(layer, x, x * kept)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    every = x, layer.weight, layer.bias
    torch.testing.assert_close(gradients(y, *every), gradients(want, *every))


def test_nothing_is_dropped_in_evaluation_unless_wished():
    x, layer, always = numbers(2, 3, 5, 5), conv(3, 2, 2), conv(3, 2, 2, dropout_in_eval=True)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first), "the generator's seed decides"
    torch.testing.assert_close(layer.eval()(x), definition(layer, x, x))
    assert not torch.equal(always.eval()(x), always(x))


# --- precision ------------------------------------------------------------------------------------

LIT = torch.where(torch.arange(9) > 4, 1e4, 0.0)  # a dark and a bright half: no one shift fits both


@pytest.mark.parametrize("offset", [torch.tensor(1e4), LIT], ids=["everywhere", "right half"])
def test_a_large_mean_does_not_cost_the_variance(offset):
    x = (offset + numbers(2, 8, 9, 9)).float()
    layer = conv(8, 6, 3, dtype=torch.float32).eval()
    exact = definition(copy.deepcopy(layer).double(), x.double(), x.double())

    def error(mean, var):
        total = layer.weight.sum((1, 2, 3)).view(1, -1, 1, 1)
        y = F.conv2d(x, layer.weight) - mean.unflatten(2, (7, 7)) * total
        y = y / (var.unflatten(2, (7, 7)) + 1e-5).sqrt() + layer.bias.view(1, -1, 1, 1)
        return (y - exact).abs().max()

    var, mean = torch.var_mean(F.unfold(x, 3), 1, correction=0, keepdim=True)  # in two passes
    ours = (layer(x) - exact).abs().max()
    assert ours < 2 * error(mean, var) and ours < 0.01
    squares = F.unfold(x * x, 3).mean(1, keepdim=True)
    assert not error(mean, squares - mean**2) < 0.1, "a difference of squares would do as well"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_layout(dtype):
    x = numbers(2, 4, 6, 5, dtype=dtype).requires_grad_()
    layer = conv(4, 6, 2, padding=1, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
    assert x.grad.isfinite().all()
    exact = definition(copy.deepcopy(layer).double(), x.double(), x.double())
    y = layer.eval()(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_autocast_gives_its_dtype():
    x, layer = numbers(2, 4, 6, 5, dtype=torch.float32), conv(4, 6, 2, dtype=torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.05)


HALVES = [  # x's dtype, autocast's, and the error of KernelNorm2d and a convolution at most
    (torch.float32, torch.bfloat16, 0.008),
    (torch.float32, torch.float16, 0.001),
    (torch.bfloat16, None, 0.008),
    (torch.float16, None, 0.001),
]


@pytest.mark.parametrize(("dtype", "cast", "most"), HALVES)
@pytest.mark.parametrize("padding", [0, 1, (1, 0, 0, 2)])
def test_half_precision_sees_a_small_spread_about_a_large_mean(dtype, cast, most, padding):
    """x is 0.8 +- 0.02: the convolution of x as it is would be 1 to 14 % off."""
    x = (0.8 + 0.02 * numbers(2, 16, 12, 12)).to(dtype).requires_grad_()
    layer = conv(16, 8, 3, 1, padding, dtype=dtype).eval()
    wide, exact = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    with torch.autocast("cpu", cast, enabled=cast is not None):
        y = layer(x)
    want = definition(wide, exact, exact)
    assert y.dtype == (cast or dtype)
    # without the border, where zeros beside 0.8 make the spread large
    inner = layer.windows.unfolded(torch.ones_like(x[:1])).amin((0, 1)).view(y.shape[2:]) == 1
    assert (y.double() - want)[..., inner].norm() < most * want[..., inner].norm()
    found = gradients(y, x, layer.weight, layer.bias)
    for mine, theirs in zip(found, gradients(want, exact, wide.weight, wide.bias), strict=True):
        assert (mine.double() - theirs).norm() < 3 * most * theirs.norm()


def test_half_precision_drops_as_the_definition_does():
    p, x = 0.3, (0.8 + 0.02 * numbers(2, 4, 5, 6)).bfloat16()
    layer = conv(4, 3, 2, padding=1, dropout_p=p, dtype=torch.bfloat16)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    drawn = torch.rand_like(x.transpose(0, 1), dtype=torch.float32).bfloat16().transpose(0, 1)
    kept = (drawn.float() >= p).double() / (1 - p)
    want = definition(copy.deepcopy(layer).double(), x.double(), x.double() * kept)
    assert (y.double() - want).norm() < 0.008 * want.norm()


def test_tensors_without_memory():
    layer = KNConv2d(3, 4, 2, device="meta")
    assert layer(torch.empty(2, 3, 5, 5, device="meta")).shape == (2, 4, 4, 4)


def test_backward_keeps_no_windows():
    def kept(run):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = run(x)
        return sum(sizes.values()) if y.requires_grad else 0

    x, layer = numbers(1, 32, 12, 12).requires_grad_(), conv(32, 32, 3, padding=1, dropout_p=0)
    norm = KernelNorm2d(3, padding=1, dropout_p=0)
    windows = kept(lambda x: F.conv2d(norm(x), layer.weight, layer.bias, 3))
    assert windows > 9 * x.nbytes
    assert kept(layer) < 3 * x.nbytes + layer.weight.nbytes


# --- in PyTorch -----------------------------------------------------------------------------------


def test_second_derivatives():
    layer = conv(2, 1, (1, 2), padding=(1, 0, 0, 0), dropout_p=0.3, eps=1e-2)

    def run(x, weight, bias):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    tensors = numbers(1, 2, 2, 2).requires_grad_(), layer.weight, layer.bias
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_torch_compile_sees_one_graph():
    layer, x = conv(3, 4, 2, padding=(1, 0, 1, 0)), numbers(2, 3, 4, 4).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), y)
    torch.manual_seed(0)
    every = x, layer.weight, layer.bias
    torch.testing.assert_close(gradients(compiled(x), *every), gradients(y, *every))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_takes_any_batch_height_and_width(dtype):
    layer = conv(3, 4, 2, padding=(1, 0, 1, 0), dtype=dtype).eval()
    x, other = (numbers(*shape, dtype=dtype) for shape in ((2, 3, 6, 6), (5, 3, 7, 9)))
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    for given in (x, other):
        torch.testing.assert_close(exported(given), layer(given))


def test_gradients_of_each_sample():
    layer, x = conv(3, 4, 2, padding=1).eval(), numbers(3, 3, 4, 4)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, one):
        return torch.func.functional_call(layer, weights, (one[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, one in enumerate(x):
        want = torch.autograd.grad(layer(one[None]).square().sum(), layer.parameters())
        torch.testing.assert_close([found[name][i] for name in weights], list(want))


def test_no_samples():
    x = torch.empty(0, 3, 5, 5, requires_grad=True)
    layer = conv(3, 4, 2, dtype=torch.float32)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 4, 4, 4) and x.grad.shape == x.shape
    assert not layer.weight.grad.any()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 2, 5, 5), "has 2 channels .* made for 3"),
        ((1, 3, 1, 5), "2 x 2 does not fit into x, which is 1 x 5"),
        ((3, 5, 5), r"must be \(N, C, H, W\)"),
    ],
)
def test_inputs_that_do_not_fit(shape, says):
    with pytest.raises(ShapeError, match=says):
        KNConv2d(3, 4, 2)(torch.zeros(shape))


def test_says_what_it_is():
    assert repr(KNConv2d(2, 4, (2, 3), padding=(1, 0), groups=2, bias=False)) == (
        "KNConv2d(2, 4, (2, 3), stride=(1, 1), padding=(1, 1, 0, 0), groups=2, bias=False, "
        "dropout_p=0.05, eps=1e-05)"
    )
    text = repr(KNConv2d(2, 4, 2, dropout_in_eval=True, backend="torch"))
    assert text.endswith("eps=1e-05, dropout_in_eval=True, backend='torch')")
