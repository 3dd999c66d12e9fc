"""Kernel normalization: windows one by one in plain torch, dropout, modes, precision, errors."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normc.errors import NormcError, ShapeError
from normc.nn.kernel_norm import KernelNorm1d, KernelNorm2d, KernelNorm2d1x1
from normc.nn.kn_conv import KNConv2d

pytestmark = pytest.mark.cpu

WINDOWS = [  # kernel, stride, padding, and the padding as left, right, top, bottom
    (2, 1, 1, (1, 1, 1, 1)),
    ((3, 2), (2, 1), (1, 0, 2, 1), (1, 0, 2, 1)),
    (3, (1, 2), (2, 0), (2, 2, 0, 0)),
    ((1, 4), 3, 0, (0, 0, 0, 0)),
]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twice(value):
    return (value, value) if isinstance(value, int) else value


def direct(x, kernel, stride, around, eps=1e-5):
    """Each window cut out, normalized, and laid beside the one before."""
    (kh, kw), (sh, sw), x = twice(kernel), twice(stride), F.pad(x, around)
    rows = []
    for top in range(0, x.shape[2] - kh + 1, sh):
        row = []
        for left in range(0, x.shape[3] - kw + 1, sw):
            u = x[:, :, top : top + kh, left : left + kw]
            mean = u.mean((1, 2, 3), keepdim=True)
            var = (u - mean).square().mean((1, 2, 3), keepdim=True)
            row.append((u - mean) / (var + eps).sqrt())
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def gradient(y, x):
    return torch.autograd.grad((y * numbers(*y.shape, seed=9, dtype=y.dtype)).sum(), x)[0]


# --- what it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "around"), WINDOWS)
def test_windows_one_by_one(kernel, stride, padding, around, backend):
    x = numbers(2, 3, 6, 9).requires_grad_()
    layer = KernelNorm2d(kernel, stride, padding, dropout_p=0, eps=1e-3, backend=backend)
    y, want = layer(x), direct(x, kernel, stride, around, 1e-3)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(y, x), gradient(want, x), rtol=1e-11, atol=1e-11)


def test_padded_zeros_count():
    y = KernelNorm2d(2, padding=(1, 0, 0, 0), dropout_p=0, eps=0.0)(torch.full((1, 1, 2, 1), 3.0))
    torch.testing.assert_close(y, torch.tensor([[[[-1.0, 1.0], [-1.0, 1.0]]]]))


def test_single_pixels_are_layer_norm_over_channels():
    x = numbers(2, 5, 3, 4).requires_grad_()
    want = F.layer_norm(x.movedim(1, -1), (5,)).movedim(-1, 1)
    y = KernelNorm2d1x1(dropout_p=0)(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradient(y, x), gradient(want, x))
    torch.testing.assert_close(KernelNorm2d(1, dropout_p=0)(x), want)


def test_sequences_are_images_of_one_row():
    x = numbers(2, 3, 8).requires_grad_()
    y = KernelNorm1d(3, 2, (1, 0), dropout_p=0)(x)
    want = direct(x.unsqueeze(2), (1, 3), (1, 2), (1, 0, 0, 0)).squeeze(2)
    assert y.shape == (2, 3, 4 * 3)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradient(y, x), gradient(want, x))


# --- dropout --------------------------------------------------------------------------------------


def test_the_mask_touches_the_statistics_alone():
    x, p = numbers(2, 3, 5, 4).requires_grad_(), 0.3
    torch.manual_seed(5)
    y = KernelNorm2d(2, dropout_p=p)(x).reshape(2, 3, 4, 2, 3, 2).permute(0, 1, 3, 5, 2, 4)
    u = F.unfold(x, 2)
    torch.manual_seed(5)
    kept = (torch.rand_like(u) >= p).double() / (1 - p)  # of each window by itself
    assert 0.6 < (kept > 0).double().mean() < 0.8
    var, mean = torch.var_mean(u * kept, 1, correction=0, keepdim=True)
    want = ((u - mean) / (var + 1e-5).sqrt()).reshape(y.shape)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(y, x), gradient(want, x), rtol=1e-11, atol=1e-11)


def test_what_is_kept_is_scaled_up():
    torch.manual_seed(0)
    y = KernelNorm2d1x1(dropout_p=0.25, eps=0.0)(torch.ones(1, 40_000, 1, 1))
    # mean(d) is 1 as without dropout, and unscaled it were 0.75, which would give 0.58
    assert y.abs().max() < 0.03


@pytest.mark.parametrize("make", [KernelNorm2d1x1, lambda **kw: KernelNorm2d(2, **kw)])
def test_nothing_is_dropped_in_evaluation_unless_wished(make):
    x = numbers(2, 4, 5, 5)
    layer, always, never = make(), make(dropout_in_eval=True), make(dropout_p=0)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first), "the generator's seed decides"
    assert torch.equal(layer.eval()(x), never(x))
    assert not torch.equal(always.eval()(x), always(x))


# --- in PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives(p):
    layer = KernelNorm2d(2, padding=(1, 0, 0, 0), dropout_p=p, eps=1e-2)

    def run(x):
        torch.manual_seed(3)
        return layer(x)

    x = numbers(1, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (x,)) and torch.autograd.gradgradcheck(run, (x,))


def test_a_large_mean_costs_float32_few_digits():
    x = 1e4 + numbers(2, 8, 7, 7)
    exact = direct(x.float().double(), 3, 1, (0,) * 4)
    plain = (direct(x.float(), 3, 1, (0,) * 4) - exact).abs().max()
    ours = (KernelNorm2d(3, dropout_p=0)(x.float()) - exact).abs().max()
    assert ours < max(2 * plain, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_layout(dtype):
    x = numbers(2, 4, 6, 5, dtype=dtype)
    y = KernelNorm2d(2, padding=1, dropout_p=0)(x.to(memory_format=torch.channels_last))
    assert y.dtype == dtype
    want = direct(x.double(), 2, 1, (1,) * 4)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)
    dropped = KernelNorm2d(2, padding=1)(x)
    assert dropped.dtype == dtype and dropped.isfinite().all()


def test_no_samples():
    x = torch.empty(0, 3, 5, 5, requires_grad=True)
    y = KernelNorm2d(2)(x)
    y.sum().backward()
    assert y.shape == (0, 3, 8, 8) and x.grad.shape == x.shape


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_torch_compile_sees_one_graph(p):
    layer, x = KernelNorm2d(2, padding=1, dropout_p=p), numbers(2, 3, 4, 4).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), y)
    torch.manual_seed(0)
    torch.testing.assert_close(gradient(compiled(x), x), gradient(y, x))


def test_copies_and_says_what_it_is():
    layer, x = KernelNorm2d(2, 1, 1).eval(), numbers(2, 3, 4, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert repr(KernelNorm2d(2, dropout_in_eval=True)) == (
        "KernelNorm2d((2, 2), stride=(1, 1), padding=(0, 0, 0, 0), dropout_p=0.1, eps=1e-05, "
        "dropout_in_eval=True)"
    )
    assert repr(KernelNorm2d1x1(0.2, backend="torch")) == (
        "KernelNorm2d1x1(dropout_p=0.2, eps=1e-05, backend='torch')"
    )


def test_what_a_sequences_layer_says_makes_it_anew():
    layer = KernelNorm1d(3, stride=2, padding=(1, 0), dropout_p=0.2, eps=1e-3, backend="torch")
    assert repr(layer) == (
        "KernelNorm1d(3, stride=2, padding=(1, 0), dropout_p=0.2, eps=0.001, backend='torch')"
    )


def test_sizes_may_be_numpys_and_lists():
    layer = KernelNorm2d(np.int64(3), [np.int64(2), 1], np.int64(1), np.float64(0.1))
    assert layer.windows == KernelNorm2d(3, (2, 1), 1).windows
    assert repr(layer) == repr(KernelNorm2d(3, (2, 1), 1))
    assert repr(KernelNorm1d(np.int64(3))) == repr(KernelNorm1d(3))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"padding": (1, 2, 3)}, r"four \(left, right, top, bottom\), from 0 on, not \(1, 2, 3\)"),
        ({"padding": -1}, "padding must be one whole number, .* from 0 on, not -1"),
        ({"padding": (1.5, 1)}, "padding must be one whole number"),
        ({"padding": "same"}, "padding must be .* not 'same'"),
        ({"padding": ()}, "padding must be"),
        ({"stride": 0}, "stride must be .* from 1 on"),
        ({"stride": None}, "stride must be .* not None"),
        (
            {"kernel_size": (3, 3, 3)},
            r"kernel_size must be one whole number or two \(rows, columns",
        ),
        ({"kernel_size": (3,)}, "kernel_size must be"),
        ({"kernel_size": 1.5}, "kernel_size must be"),
        ({"dropout_p": 1.0}, "dropout_p must be a finite number from 0 on and below 1, not 1.0"),
        ({"dropout_p": None}, "dropout_p must be"),
        ({"eps": -1e-5}, "eps must be a finite number from 0 on, not -1e-05"),
        ({"eps": float("nan")}, "eps must be"),
    ],
)
@pytest.mark.parametrize("kind", [KernelNorm2d, KNConv2d])
def test_arguments_that_do_not_fit(arguments, says, kind):
    channels = {"in_channels": 3, "out_channels": 4} if kind is KNConv2d else {}
    with pytest.raises(NormcError, match=says):
        kind(**channels, **{"kernel_size": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"padding": (1, 1, 5, 5)}, r"one whole number or two \(left, right\), from 0 on"),
        ({"kernel_size": (3,)}, r"kernel_size must be a whole number, from 1 on, not \(3,\)"),
        ({"stride": 0}, "stride must be a whole number, from 1 on"),
        ({"eps": -1.0}, "eps must be"),
    ],
)
def test_arguments_that_do_not_fit_a_sequence(arguments, says):
    with pytest.raises(NormcError, match=says):
        KernelNorm1d(**{"kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    ("layer", "shape", "says"),
    [
        (KernelNorm2d(4), (1, 2, 3, 5), "4 x 4 does not fit into x, which is 3 x 5"),
        (KernelNorm2d(1), (2, 3, 5), r"must be \(N, C, H, W\)"),
        (KernelNorm2d1x1(), (2, 3, 5), r"must be \(N, C, H, W\)"),
        (KernelNorm1d(2), (2, 3, 5, 5), r"must be \(N, C, L\)"),
    ],
)
def test_inputs_that_do_not_fit(layer, shape, says):
    with pytest.raises(ShapeError, match=says):
        layer(torch.zeros(shape))
