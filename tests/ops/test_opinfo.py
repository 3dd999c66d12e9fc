"""PyTorch's own samples for its five norms, OpInfo's: torch's function and a formula, side by side.

A formula sees x of rank 2 to 5 and one weight per channel; where a norm counts its dimensions
otherwise, x is reshaped before and after, and nothing else. Compared are the value, the gradient of
every tensor that asks for one, and the running statistics as the call has left them.
"""

import os
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from math import prod
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.func import functional_call
from torch.nn import functional
from torch.testing import assert_close

import normc

pytestmark = pytest.mark.cpu

# Importing torch's own tests loads a profile of hypothesis, freezes the flags of torch.backends and
# replaces methods of torch.jit, for good: a process of its own draws the samples. From expecttest,
# which need not be installed, they want a base class for test cases only.
DRAW = """
import inspect, sys, types, unittest
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal.common_methods_invocations import op_db

def arguments(info, sample):
    bound = inspect.signature(info.op).bind(sample.input, *sample.args, **sample.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)

def draw(info, dtype):
    torch.manual_seed(0)
    drawn = info.sample_inputs("cpu", dtype, requires_grad=True)
    return [arguments(info, sample) for sample in drawn]

path, *names = sys.argv[1:]
drawn = {name: {} for name in names}
for info in op_db:
    name = info.name.removeprefix("nn.functional.")
    if name in drawn:
        drawn[name] |= {d: draw(info, d) for d in info.supported_dtypes("cpu")}
torch.save(drawn, path)
"""


@lru_cache(maxsize=1)
def samples():
    """The arguments of every sample by norm and dtype, drawn once for all workers."""
    path = Path(os.environ["NORMC_CACHE_DIR"]) / "opinfo.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            subprocess.run([sys.executable, "-c", DRAW, path, *NORMS], check=True)
    return torch.load(path)


def layer_norm(a, backend):
    return by_rows(centred("channel", a), a, backend)


def rms_norm(a, backend):
    return by_rows("x/channel_rms(x)" + affine(a), a, backend)


def by_rows(text, a, backend):
    """All that is normalized is one dimension of channels: a weight per element is per channel."""
    x = a["input"].reshape(-1, prod(a["normalized_shape"]))
    y = normc.compile(text, backend)(x, channel_dim=-1, eps=eps_of(a), **weights(a))
    return y.reshape(a["input"].shape)


def group_norm(a, backend):
    op = normc.compile(centred("group", a), backend)
    return op(a["input"], groups=a["num_groups"], eps=a["eps"], **weights(a))


def batch_norm(a, backend):
    shape = a["input"].shape
    x = a["input"].reshape(shape if len(shape) > 1 else (1, 0, 0))  # of rank 1: no channels
    if a["running_mean"] is not None:
        return in_layer(x, a, backend, a["training"]).reshape(shape)
    op = normc.compile(centred("batch", a), backend)
    return op(x, eps=a["eps"], **weights(a)).reshape(shape)


def instance_norm(a, backend):
    if a["running_mean"] is not None:
        track_instances(a, backend)
    op = normc.compile(centred("instance", a), backend)
    return op(a["input"], eps=a["eps"], **weights(a))


def track_instances(a, backend):
    """Torch's definition: each instance is a channel of batch norm, then the mean over samples."""
    n, c, *space = a["input"].shape
    x = a["input"].reshape(1, n * c, *space)
    each = {name: a[name].repeat(n) for name in RUNNING}
    in_layer(x, {**a, **each, "weight": None, "bias": None}, backend, training=True)
    for name in RUNNING:
        a[name].copy_(each[name].view(n, c).mean(0))


def in_layer(x, a, backend, training):
    """Batch norm as a layer, which updates in place the sample's own running statistics."""
    how = dict(eps=a["eps"], momentum=a["momentum"], dtype=x.dtype, backend=backend)
    layer = normc.Layer(centred("batch", a), x.shape[1], **how).train(training)
    return functional_call(layer, {**weights(a), **{name: a[name] for name in RUNNING}}, (x,))


def centred(kind, a):
    return f"(x - {kind}_mean(x))/{kind}_std(x)" + affine(a)


def affine(a):
    """The end of a formula for the weights that a sample has."""
    given = weights(a)
    return "*gamma" * ("gamma" in given) + " + beta" * ("beta" in given)


def weights(a):
    """A sample's weights as the formula calls them."""
    named = {"gamma": a["weight"], "beta": a.get("bias")}
    return {name: t.reshape(-1) for name, t in named.items() if t is not None}


def eps_of(a):
    """Torch's default for rms_norm is that of the type computed in, not of a half's own."""
    return torch.finfo(wide(a)).eps if a["eps"] is None else a["eps"]


def wide(a):
    return torch.promote_types(a["input"].dtype, torch.float32)


RUNNING = ("running_mean", "running_var")
NORMS = {f.__name__: f for f in (layer_norm, group_norm, rms_norm, batch_norm, instance_norm)}


def outcome(call, sample, dtype, **changed):
    """The value, all gradients, and the other tensors as the call has left them."""
    given = {k: fresh(v, dtype) if torch.is_tensor(v) else v for k, v in sample.items()}
    y = call({**given, **changed})
    kept = {k: t for k, t in given.items() if torch.is_tensor(t) and not t.requires_grad}
    leaves = {k: t for k, t in given.items() if torch.is_tensor(t) and t.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent(sample).to(dtype))
    named = zip([f"gradient of {k}" for k in leaves], gradients, strict=True)
    return {"value": y.detach(), **kept, **dict(named)}


def fresh(t, dtype):
    return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)


def cotangent(sample):
    x = sample["input"]
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def agree(found, theirs, exact, where, **allowed):
    """Within torch's default tolerances of torch's result, or of its result in float64.

    The second is no looser: where terms cancel, torch's own rounding can be all of the difference.
    """
    try:
        assert_close(found, theirs)
    except AssertionError:
        exact = exact.to(theirs.dtype)
        assert_close(found, exact, **allowed, msg=lambda text: f"{where}: {text}")


def cancelled(name, key, sample):
    """What is allowed where x has one element: two float32 ulps (float64's in float64).

    Such an element is its own mean, so two equal terms of its gradient cancel. Torch's own kernel
    does the same to the gradient of the weight.
    """
    if (name, key) != ("layer_norm", "gradient of input") or sample["input"].numel() != 1:
        return {}
    times = cotangent(sample).double() * sample["weight"].double()
    term = times.abs().item() / sample["eps"] ** 0.5
    return {"rtol": 0, "atol": 2 * torch.finfo(wide(sample)).eps * term}


@pytest.mark.parametrize("backend", ["c", pytest.param("torch", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NORMS)
def test_every_sample_agrees_with_torch(name, dtype, backend):
    def torchs(a):
        return getattr(functional, name)(**a)

    storage = getattr(torch, dtype)
    for i, sample in enumerate(samples()[name][storage]):
        found = outcome(lambda a: NORMS[name](a, backend), sample, storage)
        theirs = outcome(torchs, sample, storage)
        exact = outcome(torchs, sample, torch.float64, eps=eps_of(sample))
        assert found.keys() == theirs.keys()
        for key, want in theirs.items():
            where = f"sample {i}, x of shape {tuple(sample['input'].shape)}, {key}"
            agree(found[key], want, exact[key], where, **cancelled(name, key, sample))


COMPLEX = "complex numbers"
COUNTS = {  # over all dtypes
    "layer_norm": {"expressed": 24},
    "group_norm": {"expressed": 84},
    "rms_norm": {"expressed": 24, COMPLEX: 12},
    "batch_norm": {"expressed": 48},
    "instance_norm": {"expressed": 36},
}


def test_all_samples_of_real_numbers_are_expressed():
    counts = {}
    for name, by_dtype in samples().items():
        reasons = {d: COMPLEX if d.is_complex else "expressed" for d in by_dtype}
        counts[name] = Counter(reasons[d] for d, drawn in by_dtype.items() for _ in drawn)
    assert counts == COUNTS


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_refused(dtype):
    for sample in samples()["rms_norm"][dtype]:
        with pytest.raises(normc.ShapeError, match="`x` must be floating point"):
            rms_norm(sample, "c")
