"""The C backend's ways through memory: lanes, kept slices, halves; each against the oracle."""

import ctypes
import subprocess

import pytest
import torch

import normc
from normc.backends import c_compiler
from normc.backends.c_spelling import declarations
from normc.language.axes import members
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.ops.op import Op
from normc.ops.target import target_of

pytestmark = pytest.mark.cpu

LAYERS = [
    ("evonorm_s0", (3, 32, 9, 7), 8),
    ("evonorm_b0", (3, 32, 9, 7), 8),
    ("batch_norm", (5, 24, 6, 5), 1),
    ("layer_norm", (2, 18, 5, 7), 1),
    ("grn", (3, 40, 6, 6), 1),
    ("x/layer_std(silu(x))*silu(x)*gamma", (3, 20, 9, 7), 1),
    ("x/all_max(silu(x))*silu(x)*gamma + beta", (3, 20, 9, 7), 1),
    ("x/group_max(silu(x))*silu(x)*gamma", (3, 20, 9, 7), 5),
    ("silu(x)/group_std(silu(x))*gamma", (2, 2100, 2, 3), 1),  # a group of more lanes than arrays
    ("silu(x)/group_std(silu(x))*gamma", (2, 4200, 2, 3), 2100),
    ("silu(x)/instance_std(silu(x))*gamma", (2, 1030, 2, 70), 1),  # a tile that is not full
    ("silu(x)/channel_std(silu(x))*gamma", (2, 3, 70, 71), 1),
    ("silu(x)/batch_std(silu(x))*gamma", (2, 130, 17, 17), 1),
    ("(x - batch_group_mean(x))/batch_group_rms(tanh(x))*tanh(x)", (4, 12, 5, 5), 3),
    ("x/rms[n,g](x)*gamma", (3, 12, 5, 7), 3),
    ("tanh(x)/rms[s,k](tanh(x)) - mean[k](x)", (3, 12, 5, 7), 3),
    ("x/max[k](x)*gamma + mean[g](x)*sum[n](x)", (3, 12, 5, 7), 3),
    ("x/std[n,g,k](tanh(x))*tanh(x)", (3, 12, 5, 7), 3),
    ("x*channel_max(x)/instance_l2(exp(x)) + exp(x)*channel_mean(instance_l2(x))", (2, 7, 6, 5), 1),
]


def run(function, x, params, **sizes):
    leaves = [x.detach().requires_grad_(), *[p.detach().requires_grad_() for p in params.values()]]
    y = function(leaves[0], **dict(zip(params, leaves[1:], strict=True)), **sizes)
    torch.manual_seed(1)
    cotangent = torch.randint(-8, 9, y.shape) / 4  # the same number in every dtype
    return y, *torch.autograd.grad(y, leaves, cotangent.to(y))


def layer(text, shape, groups, dtype, last):
    torch.manual_seed(0)
    f = normc.zoo[text] if text in normc.zoo else normc.parse(text)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = {p.name: torch.rand(shape[1] if p.axes else (), dtype=wide) + 0.5 for p in f.params}
    ours = run(Op(f, "c"), x, params, groups=groups)
    doubles = {name: p.double() for name, p in params.items()}
    return ours, run(normc.reference(f), x.double(), doubles, groups=groups)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("text", "shape", "groups"), LAYERS)
def test_every_way_through_memory_is_right(text, shape, groups, last):
    for ours, oracle in zip(*layer(text, shape, groups, torch.float64, last), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("text", "shape", "groups"), LAYERS[:8])
def test_halves_are_computed_in_float32(text, shape, groups, dtype, last):
    ours, oracle = layer(text, shape, groups, dtype, last)
    rounding = torch.finfo(dtype).eps
    assert ours[0].dtype == ours[1].dtype == dtype
    for i, (mine, exact) in enumerate(zip(ours, oracle, strict=True)):
        error = (mine.double() - exact).norm() / exact.norm()
        assert error <= (rounding if i < 2 else 1e-5), i  # gradients of parameters are float32


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def conversions(request, tmp_path_factory):
    code = (
        "void widen(const store *x, float *y, long n) {\n#pragma omp simd\n"
        "for (i64 i = 0; i < n; i++) y[i] = widen_(x[i]); }\n"
        "void narrow(const float *x, store *y, long n) {\n#pragma omp simd\n"
        "for (i64 i = 0; i < n; i++) y[i] = narrow_(x[i]); }\n"
    )
    folder = tmp_path_factory.mktemp("halves")
    (folder / "h.c").write_text(declarations(code, request.param) + "\n" + code)
    files = ["-o", str(folder / "h.so"), str(folder / "h.c"), "-lm"]
    subprocess.run([c_compiler.compiler(), *c_compiler.flags(), *files], check=True)
    library = ctypes.CDLL(str(folder / "h.so"))

    def convert(name, x, dtype):
        y = torch.empty(x.shape, dtype=dtype)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
        getattr(library, name)(*pointers, ctypes.c_long(x.numel()))
        return y

    return getattr(torch, request.param), convert


def test_every_half_is_widened_as_torch_does(conversions):
    dtype, convert = conversions
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(
        convert("widen", halves, torch.float32), halves.float(), rtol=0, atol=0, equal_nan=True
    )


def test_floats_are_narrowed_as_torch_does(conversions):
    dtype, convert = conversions
    torch.manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (halves[1:] + halves[:-1]) / 2  # ties
    floats = torch.cat([some.view(torch.float32), halves, between, torch.tensor([65519.9, 65520])])
    found = convert("narrow", floats, dtype)
    torch.testing.assert_close(found, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    x = torch.randn(6, 40, 30, 30).contiguous(memory_format=torch.channels_last)
    params = {"v": torch.rand(40), "gamma": torch.rand(40), "beta": torch.rand(40)}
    before = torch.get_num_threads()
    for text in ("evonorm_s0", "evonorm_b0"):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(Op(normc.zoo[text], "c"), x, params))
        torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("text", ["gn_silu", "layer_norm", "(x - all_mean(x))/all_std(x)*gamma"])
def test_few_large_reductions_are_shared_among_instances(text, last):
    shape = (1, 16, 256, 257)
    for ours, oracle in zip(*layer(text, shape, 2, torch.float64, last), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-9)
    f = normc.zoo[text] if text in normc.zoo else normc.parse(text)
    x = torch.empty(shape, memory_format=torch.channels_last if last else torch.contiguous_format)
    target = target_of(f, "c", x, (), Geometry.of(shape, 2))
    plan = all_jobs(f, target)[0].plan
    whole = [k for k in plan.kernels if any(v.name == "x" for v in k.reads)]
    assert target.split and len(whole) == 2
    assert all(len(members(k.grid)) >= 2 for k in whole)  # no pass over x is left to one thread
