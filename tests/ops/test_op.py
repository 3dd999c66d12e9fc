"""Ops: autograd, wanted gradients, layouts, and every way a call can be wrong."""

import pytest
import torch

import normc
from normc import config

TEXT = "x*sigmoid(v*x)/group_std(x)*gamma + beta"


def ones(c, *names):
    return {name: torch.ones(c) for name in names}


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(
    "wrt", ["x", "v", "gamma", "beta", "x v", "gamma beta", "v gamma beta", ""]
)
def test_gradients_of_every_subset(backend, wrt):
    op, x = normc.compile(TEXT, backend), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    tensors = {n: torch.rand(8, dtype=torch.float64) for n in ("v", "gamma", "beta")}
    given = {"x": x, **tensors}
    wanted = [given[n].requires_grad_() for n in wrt.split()]
    y = op(groups=4, **given)
    assert y.requires_grad == bool(wanted)
    if wanted:
        want = torch.autograd.grad(normc.reference(TEXT)(groups=4, **given).square().sum(), wanted)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), wanted), want)


def test_no_grad_saves_nothing():
    x = torch.randn(2, 8, 3, requires_grad=True)
    with torch.no_grad():
        assert normc.compile(TEXT)(x, **ones(8, "v", "gamma", "beta")).grad_fn is None


def test_several_results_share_one_backward():
    f = "input r; h = x + r; h/channel_rms(h)*gamma, h"
    x, r = (torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in "xr")
    gamma = torch.rand(8, dtype=torch.float64, requires_grad=True)
    y, h = normc.compile(f)(x, channel_dim=-1, r=r, gamma=gamma)
    torch.testing.assert_close(h, x + r)
    only_h = torch.autograd.grad(h.sum(), [x, r], retain_graph=True)
    torch.testing.assert_close(only_h, (torch.ones_like(x), torch.ones_like(r)))
    want = normc.reference(f)(x, channel_dim=-1, r=r, gamma=gamma)
    a = torch.autograd.grad((y * h).sum(), [x, r, gamma])
    torch.testing.assert_close(a, torch.autograd.grad((want[0] * want[1]).sum(), [x, r, gamma]))


def test_a_gradient_without_memory_of_its_own():
    """``.sum()`` sends an expanded gradient of stride 0."""
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    normc.compile("x/group_rms(x)")(x, groups=2).sum().backward()
    y = x.detach().clone().requires_grad_()
    normc.reference("x/group_rms(x)")(y, groups=2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_results_keep_the_memory_format(backend):
    x = torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = normc.compile("x/instance_rms(x)", backend)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_statistics_in_float32(dtype):
    x = (torch.randn(2, 8, 16, 16) * 300).to(dtype)
    y = normc.compile("x/instance_rms(x)")(x)
    assert y.dtype == dtype and y.isfinite().all()
    want = normc.reference("x/instance_rms(x)")(x.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2)


def test_parameters_may_have_another_dtype_than_x():
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    gamma = torch.rand(8, requires_grad=True)
    y = normc.compile("x*gamma")(x, gamma=gamma)
    y.sum().backward()
    assert y.dtype == torch.float64 and gamma.grad.dtype == torch.float32


WRONG = [
    ("groups that do not divide", dict(groups=3), "groups=3 does not divide the 8 channels"),
    ("no groups", dict(groups=0), "positive whole number"),
    ("channel_dim", dict(channel_dim=4), "channel_dim=4 is not a dimension"),
    ("missing", dict(drop="v"), "parameter `v` is missing"),
    ("extra", dict(vv=torch.ones(8)), r"no tensor `vv` \(did you mean `v`"),
    ("shape", dict(v=torch.ones(7)), r"`v\[c\]` must have shape \(8,\)"),
    ("dtype", dict(v=torch.ones(8, dtype=torch.int64)), "`v` must be floating point"),
    ("device", dict(v=torch.ones(8, device="meta")), "`v` is on meta and x on cpu"),
    ("rank", dict(x=torch.ones(8)), "2 to 5 dimensions"),
]


@pytest.mark.parametrize("case", WRONG, ids=[w[0] for w in WRONG])
def test_wrong_calls_name_what_is_wrong(case):
    _, change, message = case
    given = {"x": torch.randn(2, 8, 3), **ones(8, "v", "gamma", "beta"), **change}
    given.pop(given.pop("drop", ""), None)
    with pytest.raises(normc.ShapeError, match=message):
        normc.compile(TEXT)(**given)


def test_inputs_are_required_and_shaped():
    op = normc.compile("input scale[n,c]; x*scale")
    with pytest.raises(normc.ShapeError, match=r"input `scale\[n,c\]` is missing"):
        op(torch.randn(2, 8, 3))
    with pytest.raises(normc.ShapeError, match=r"`scale\[n,c\]` must have shape \(2, 8\)"):
        op(torch.randn(2, 8, 3), scale=torch.ones(8))


def test_the_backend_follows_the_configuration():
    op, x = normc.compile("x/layer_rms(x)"), torch.randn(2, 3, 4)
    op(x)
    with config.override(backend="troch"), pytest.raises(normc.BackendError, match="torch"):
        op(x)
    with config.override(backend="torch"):
        torch.testing.assert_close(op(x), op(x.clone()))


def test_unknown_backends_are_named():
    with pytest.raises(normc.BackendError, match="did you mean `torch`"):
        normc.compile("x", backend="troch")
    with pytest.raises(normc.BackendError, match="not on meta"):
        normc.compile("x", backend="c")(torch.ones(2, 3, device="meta"))


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 1, 1), (1, 1), (3, 1, 1)])
def test_empty_and_single_inputs(backend, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = normc.compile("(x - instance_mean(x))/batch_std(x)*gamma", backend)(
        x, gamma=torch.ones(shape[1], dtype=torch.float64)
    )
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape and (y.numel() == 0 or y.isfinite().all())


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", ["batch_norm", "evonorm_b0", "layer_norm_tokens", "group_norm"])
def test_an_empty_batch_has_parameter_gradients_of_zero(name, backend):
    f = normc.zoo[name]
    tensors = {p.name: torch.full((4,), p.init, requires_grad=True) for p in f.params}
    y = normc.compile(f, backend)(torch.randn(0, 4, 3, 3, requires_grad=True), **tensors)
    for g in torch.autograd.grad(y.sum(), list(tensors.values())):
        assert g.tolist() == [0] * 4


def test_a_large_offset_keeps_its_digits():
    x = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0)) + 1e4
    y = normc.compile("(x - group_mean(x))/group_std(x)", "c")(x, groups=2)
    want = normc.reference("(x - group_mean(x))/group_std(x)")(x.double(), groups=2)
    theirs = torch.nn.functional.group_norm(x, 2)
    assert (y - want).abs().max() <= 1.5 * (theirs - want).abs().max()


def test_nan_and_inf_stay_where_they_are():
    x = torch.randn(3, 4, 5)
    x[0, 0, 0], x[1, 2, 3] = float("nan"), float("inf")
    for text in ("(x - instance_mean(x))/instance_std(x)", "max(x, 0)", "x/layer_max(x)"):
        want = normc.reference(text)(x.double())
        for backend in ("c", "torch"):
            y = normc.compile(text, backend)(x)
            assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


def test_results_are_bitwise_repeatable_with_any_number_of_threads():
    x, v = torch.randn(8, 16, 33, 7, requires_grad=True), torch.rand(16, requires_grad=True)
    op = normc.compile("x*sigmoid(v*x)/group_std(x) + batch_mean(x)", "c")
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        y = op(x, v=v, groups=4)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, v])))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(run, found[0], strict=True))


def test_what_backward_does_not_read_is_not_kept():
    op = normc.compile("input residual; h = x + residual; h/channel_rms(h)*gamma, h")
    x, residual = (torch.randn(4, 8, 5, requires_grad=True) for _ in range(2))
    gamma = torch.ones(8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, h = op(x, residual=residual, gamma=gamma)
    assert {t.data_ptr() for t in kept if t.shape == x.shape} == {h.data_ptr()}
    first, second = torch.autograd.grad(y.sum() + h.square().sum(), [x, residual])
    assert torch.equal(first, second)
    sum(t.sum() for t in op(x, residual=residual, gamma=gamma)).backward()
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0  # leaves do not share their .grad


BETWEEN = {
    "channels between": (lambda: torch.randn(2, 3, 4, 5), 2),
    "channels first": (lambda: torch.randn(4, 3, 2, 5), 0),
    "permuted": (lambda: torch.randn(2, 5, 4, 3).permute(0, 2, 1, 3), 1),
}


@pytest.mark.parametrize("backend", ["c", "torch", "tape"])
@pytest.mark.parametrize("kind", BETWEEN)
def test_positions_that_no_single_stride_walks(kind, backend):
    make, channel_dim = BETWEEN[kind]
    x = make().double().requires_grad_()
    how = {"groups": 2, "channel_dim": channel_dim}
    text = "x*sigmoid(v*x)/group_std(x)*gamma + instance_mean(x)"
    given = {
        name: torch.rand(4, dtype=torch.float64, requires_grad=True) for name in ("v", "gamma")
    }
    found = normc.compile(text, backend=backend)(x, **how, **given)
    want = normc.reference(text)(x, **how, **given)
    torch.testing.assert_close(found, want)
    cotangent = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(found, (x, *given.values()), cotangent),
        torch.autograd.grad(want, (x, *given.values()), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["c", "torch", "tape"])
@pytest.mark.parametrize("names", [("y", "out"), ("d_y", "y0"), ("y", "result")])
def test_tensors_may_be_called_like_results(names, backend):
    first, second = names
    text = f"input {first}; x*{first} + {second}, x*instance_mean({first})"
    given = {first: torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)}
    given[second] = torch.rand(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    found = normc.compile(text, backend=backend)(x, **given)
    want = normc.reference(text)(x, **given)
    torch.testing.assert_close(found, want)
    every = [x, *given.values()]
    grads = [
        torch.autograd.grad(sum(o.square().sum() for o in out), every) for out in (found, want)
    ]
    torch.testing.assert_close(*grads)


def test_a_tensor_called_like_a_gradient_is_named():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(normc.NormcError, match="`d_x` is what the gradient of `x` is called"):
        normc.compile("x*d_x", backend="torch")(x, d_x=torch.ones(3))
