"""The oracle against formulas written directly in torch, and its words for calls that do not fit.

Longer than most files, for it is all that stands behind the judge of every kernel.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from normc import errors
from normc.errors import NormcError, ShapeError
from normc.language.axes import AXIS_SETS, CHANNEL, FULL, NONE, Axis, members
from normc.language.definition import Definition, Input, Param, X
from normc.language.expr import call, var
from normc.language.reductions import REDUCTIONS
from normc.reference import reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


S0 = "x*sigmoid(v*x)/group_std(x)*gamma + beta"


def s0(x, groups, v, gamma, beta, eps=1e-5):
    """EvoNorm-S0 of an (N, C, H, W) tensor, by hand."""
    n, c, h, w = x.shape
    v, gamma, beta = (p.view(1, c, 1, 1) for p in (v, gamma, beta))
    split = x.view(n, groups, c // groups, h, w)
    std = torch.sqrt(split.var((2, 3, 4), correction=0, keepdim=True) + eps)
    std = std.expand(split.shape).reshape(x.shape)
    return x * torch.sigmoid(v * x) / std * gamma + beta


# --- layouts ----------------------------------------------------------------------------------

LAYOUTS = [
    # from NCHW to what the user holds, channel_dim
    (lambda x: x, 1),
    (lambda x: x, -3),
    (lambda x: x.to(memory_format=torch.channels_last), 1),
    (lambda x: x.movedim(1, -1), -1),
    (lambda x: x.movedim(1, -1).contiguous(), 3),
    (lambda x: x.movedim(1, 2), 2),
    (lambda x: x.movedim(1, 0), 0),
    (lambda x: x.movedim(1, -1).flatten(1, 2), -1),  # (B, L, C) tokens
    (lambda x: x.unflatten(3, (1, -1)), 1),  # rank 5
    (lambda x: x.flatten(2), 1),  # rank 3
]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize(("layout", "channel_dim"), LAYOUTS)
def test_a_layout_is_only_another_order_of_dimensions(layout, channel_dim, groups):
    x = randn(3, 6, 4, 5)
    params = {name: randn(6, seed=i) for i, name in enumerate(("v", "gamma", "beta"), 1)}
    y = reference(S0)(layout(x), groups=groups, channel_dim=channel_dim, **params)
    assert_close(y, layout(s0(x, groups, **params)), **EXACT)


def test_a_matrix_has_one_position_per_channel():
    x, gamma = randn(5, 12), randn(12, seed=1)
    rms = reference("x / channel_rms(x) * gamma")
    assert_close(rms(x, gamma=gamma), F.rms_norm(x, (12,), gamma, eps=1e-5), **EXACT)
    assert_close(rms(x, gamma=gamma, channel_dim=-1), rms(x, gamma=gamma), **EXACT)
    assert torch.equal(reference("instance_mean(x)")(x), x)
    y = reference("(x - batch_mean(x)) / batch_std(x)")(x)
    assert_close(y, F.batch_norm(x, None, None, training=True), **EXACT)


def test_an_input_in_any_memory_is_read_the_same():
    base = randn(4, 8, 6, 6)
    expanded = base[:1, :, :, :1].expand(4, 8, 6, 6)
    for x in (base.transpose(2, 3), base[:, ::2, 1:, ::2], expanded):
        y = reference("(x - group_mean(x)) / group_std(x)")(x, groups=2)
        assert_close(y, F.group_norm(x, 2), **EXACT)


# --- statistics ---------------------------------------------------------------------------------

STATISTICS = {
    "sum": lambda x, d: x.sum(d, keepdim=True),
    "mean": lambda x, d: x.mean(d, keepdim=True),
    "var": lambda x, d: (x - x.mean(d, keepdim=True)).square().mean(d, keepdim=True),
    "max": lambda x, d: x.amax(d, keepdim=True),
    "min": lambda x, d: x.amin(d, keepdim=True),
    "std": lambda x, d: (x.var(d, correction=0, keepdim=True) + 0.1).sqrt(),
    "ms": lambda x, d: (x * x).mean(d, keepdim=True),
    "rms": lambda x, d: ((x * x).mean(d, keepdim=True) + 0.1).sqrt(),
    "absmax": lambda x, d: torch.linalg.vector_norm(x, torch.inf, d, keepdim=True),
    "l1": lambda x, d: torch.linalg.vector_norm(x, 1, d, keepdim=True),
    "l2": lambda x, d: torch.linalg.vector_norm(x, 2, d, keepdim=True),
}

DIMS = {
    # over which dimensions of (N, G, K, H, W)
    "batch": (0, 3, 4),
    "instance": (3, 4),
    "group": (2, 3, 4),
    "layer": (1, 2, 3, 4),
    "channel": (1, 2),
    "batch_group": (0, 2, 3, 4),
    "all": (0, 1, 2, 3, 4),
}


def by_row(stat, head):
    """What a row that is new to this file says of itself: its axes, its own torch definition."""
    places = {Axis.N: (0,), Axis.G: (1,), Axis.K: (2,), Axis.S: (3, 4)}
    dims = DIMS.get(head) or sum((places[a] for a in members(AXIS_SETS[head].axes)), ())
    own = STATISTICS.get(stat) or (lambda x, d: REDUCTIONS[stat].reference(torch, x, d, 0.1))
    return own, dims


@pytest.mark.parametrize("stat", REDUCTIONS)
@pytest.mark.parametrize("head", AXIS_SETS)
def test_every_statistic_over_every_set_of_axes(head, stat):
    x = randn(2, 6, 3, 4)
    split = x.view(2, 3, 2, 3, 4)
    y = reference(f"{head}_{stat}(x)")(x, groups=3, eps=0.1)
    statistic, dims = by_row(stat, head)
    assert_close(y, statistic(split, dims).expand(split.shape).reshape(x.shape), **EXACT)


def test_axes_may_be_written_out():
    x = randn(2, 6, 3, 4)
    for text, name in (
        ("mean[n,s](x)", "batch"),
        ("mean[k,s](x)", "group"),
        ("mean[c](x)", "channel"),
    ):
        assert torch.equal(reference(text)(x, groups=2), reference(f"{name}_mean(x)")(x, groups=2))


def test_statistics_nest():
    x = randn(2, 6, 3, 4)
    split = x.view(2, 2, 3, 3, 4)
    std = torch.sqrt(split.var((2, 3, 4), correction=0, keepdim=True) + 1e-5)
    scaled = (split * std).view(x.shape)
    y = reference("x - instance_mean(x*group_std(x))")(x, groups=2)
    assert_close(y, x - scaled.mean((2, 3), keepdim=True), **EXACT)


def test_a_statistic_reduces_as_if_broadcast_to_x():
    x, v = randn(2, 6, 3, 4), randn(6, seed=1)
    full = x.new_ones(x.shape)
    assert_close(reference("layer_sum(2)")(x), full * 2 * 6 * 3 * 4, **EXACT)
    assert_close(reference("all_sum(v)")(x, v=v), full * v.sum() * 2 * 3 * 4, **EXACT)
    assert_close(reference("batch_l2(v)")(x, v=v)[0, :, 0, 0], v.abs() * 24**0.5, **EXACT)
    assert_close(reference("channel_var(v)")(x, v=v), full * v.var(correction=0), **EXACT)
    assert_close(reference("batch_var(v)")(x, v=v), full * 0, **EXACT)


def test_the_mean_over_channels_of_grn():
    x = randn(2, 6, 3, 4)
    length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    y = reference("channel_mean(instance_l2(x))")(x)
    assert_close(y, length.mean(1, keepdim=True).expand(x.shape), **EXACT)


# --- parameters, inputs, results --------------------------------------------------------------

AXES = [
    # the declaration of an input, its axes, its shape for an NCHW and for a channels-last x
    ("", "nchw", "nhwc"),
    ("[n]", "n", "n"),
    ("[c]", "c", "c"),
    ("[s]", "hw", "hw"),
    ("[n,c]", "nc", "nc"),
    ("[n,s]", "nhw", "nhw"),
    ("[c,s]", "chw", "hwc"),
    ("[n,c,s]", "nchw", "nhwc"),
]
SIZES = {"n": 2, "c": 6, "h": 3, "w": 4}


@pytest.mark.parametrize(("axes", "first", "last"), AXES)
def test_an_input_is_x_without_the_missing_dimensions(axes, first, last):
    x = randn(2, 6, 3, 4)
    t = randn(*(SIZES[d] for d in first), seed=1)
    f = reference(f"input t{axes}; x * t + group_mean(t)")
    whole = torch.einsum(f"{first},nchw->nchw", t, torch.ones_like(x))
    wanted = x * whole + whole.view(2, 2, -1).mean(2).repeat_interleave(3, 1)[:, :, None, None]
    assert_close(f(x, t=t, groups=2), wanted, **EXACT)
    y = f(x.movedim(1, -1), t=torch.einsum(f"{first}->{last}", t), groups=2, channel_dim=-1)
    assert_close(y.movedim(-1, 1), wanted, **EXACT)


def test_parameters_not_given_start_at_their_initial_values():
    x = randn(2, 4, 3)
    f = reference("param a = 0.5; param b[c] = 3; param w[c]; a*x*b*w*gamma*v + beta + v0")
    assert_close(f(x), 1.5 * x, **EXACT)
    assert_close(f(x, a=randn(), beta=x.new_ones(4)), 3 * randn() * x + 1, **EXACT)


def test_groups_are_the_largest_divisor_not_above_32_unless_given():
    x = randn(2, 48, 3)
    f = reference("(x - group_mean(x)) / group_std(x)")
    assert torch.equal(f(x), f(x, groups=24))
    assert torch.equal(f(x, groups="auto"), f(x, groups=24))


def test_eps_may_be_named():
    x = randn(2, 4, 3)
    y = reference("x / sqrt(instance_ms(x) + eps)")(x, eps=0.5)
    assert torch.equal(y, reference("x / instance_rms(x)")(x, eps=0.5))
    assert torch.equal(reference("eps")(x, eps=0.25), torch.full_like(x, 0.25))


@pytest.mark.parametrize("text", ["2", "gamma", "all_mean(x)", "eps*alpha", "instance_max(x)"])
def test_a_result_has_the_shape_of_x(text):
    x = randn(2, 3, 4, 6)
    assert reference(text)(x, channel_dim=-1).shape == x.shape


def test_several_results_are_a_tuple():
    x, r = randn(2, 6, 3), randn(2, 6, 3, seed=1)
    y, h = reference("input r; h = x + r; h / channel_rms(h), h")(x, r=r)
    assert torch.equal(h, x + r)
    assert_close(y, h / torch.sqrt(h.square().mean(1, keepdim=True) + 1e-5), **EXACT)


def test_where():
    x = randn(2, 6, 3)
    y = reference("where(x > instance_mean(x), x, 2*x)")(x)
    assert torch.equal(y, torch.where(x > x.mean(2, keepdim=True), x, 2 * x))


# --- what may be given as a formula -----------------------------------------------------------


@dataclass
class Formula:
    definition: Definition


def test_a_formula_may_be_text_a_definition_or_an_object_that_has_one():
    gamma = Param("gamma")
    by_hand = Definition((X * gamma.var,), (gamma,))
    x, given = randn(2, 4), randn(4, seed=1)
    for formula in ("x * gamma", by_hand, Formula(by_hand)):
        assert torch.equal(reference(formula)(x, gamma=given), x * given)


def test_a_definition_that_does_not_declare_its_variable_is_refused():
    with pytest.raises(NormcError, match="`h` is neither"):
        reference(Definition((var("h", FULL) + 1,)))(randn(2, 4))


# --- gradients --------------------------------------------------------------------------------

DIFFERENTIABLE = [
    S0,
    "x - instance_mean(x*group_std(x))",
    "x / max(batch_std(x), v*x + instance_std(x)) * gamma + beta",
    "channel_mean(instance_l2(x)) * x**2 + batch_max(x*v)",
    "param a = 0.5; tanh(a*x) * layer_var(x*v)",
    "input t[n,c]; x*t / channel_rms(x + t)",
]


@pytest.mark.parametrize("text", DIFFERENTIABLE)
def test_derivatives_of_first_and_second_order(text):
    f = reference(text)
    shapes = {"x": (2, 4, 3), "t": (2, 4), "a": ()}
    names = ["x", *(row.name for row in f.definition.params + f.definition.inputs)]
    given = [randn(*shapes.get(name, (4,)), seed=i) for i, name in enumerate(names)]

    def run(*tensors):
        return f(**dict(zip(names, tensors, strict=True)), groups=2)

    given = [tensor.requires_grad_() for tensor in given]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def gradient(text, x, **options):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(reference(text)(x, **options).sum(), x)
    return grad


def test_kinks_follow_autograd():
    zero = torch.zeros(1, 4, dtype=torch.float64)
    assert torch.equal(gradient("relu(x)", zero), zero)
    assert torch.equal(gradient("abs(x)", zero), zero)
    assert torch.equal(gradient("max(x, 0)", zero), zero + 0.5)
    assert torch.equal(gradient("min(x, 2*x)", zero), zero + 1.5)


def test_ties_of_a_maximum_share_the_gradient():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0]], dtype=torch.float64)
    share = torch.tensor([[0.0, 2.0, 2.0, 0.0]], dtype=torch.float64)  # four elements' worth
    assert torch.equal(gradient("channel_max(x)", x), share)
    assert torch.equal(gradient("channel_min(-x)", x), -share)
    assert torch.equal(gradient("channel_absmax(x)", x), share)


# torch itself still scripts a few rules when forward mode is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_it_composes_with_functional_transforms():
    x, gamma = randn(3, 4, 5), randn(4, seed=1)
    f = reference("(x - channel_mean(x)) / channel_std(x) * gamma")

    def loss(x, gamma):
        return (f(x, gamma=gamma) * x).sum()

    grads = torch.func.grad(loss, (0, 1))(x, gamma)
    leaves = [t.clone().requires_grad_() for t in (x, gamma)]
    assert_close(grads, torch.autograd.grad(loss(*leaves), leaves), **EXACT)
    many = torch.func.vmap(lambda t: f(t, gamma=gamma))(torch.stack([x, 2 * x]))
    assert_close(many[1], f(2 * x, gamma=gamma), **EXACT)
    _, tangent = torch.func.jvp(lambda t: loss(t, gamma), (x,), (x,))
    assert_close(tangent, (grads[0] * x).sum(), **EXACT)


# --- dtypes, special values, size -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_is_computed_in_the_dtype_of_x(dtype):
    x, v = randn(2, 4, 5, dtype=dtype), randn(4, seed=1)
    f = reference("param a = 0.3; (x + 0.1) * v * a / (batch_std(x) + eps)")
    y = f(x, v=v)
    assert y.dtype == dtype
    assert_close(y, f(x, v=v.to(dtype)))
    assert_close(y.double(), f(x.double(), v=v), rtol=0.05, atol=0.05)


def test_nan_and_infinity_stay_where_they_belong():
    x = randn(2, 4, 5)
    x[0, 1, 2] = torch.nan
    y = reference("max(x, instance_max(x)*0) + relu(x)")(x)
    assert y[0, 1].isnan().all()
    assert not y[1].isnan().any()
    assert not y[0, 0].isnan().any()
    assert reference("exp(x)")(randn(2, 4) + 1e4).isposinf().all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4), (2, 0, 3)])
def test_an_empty_x_has_empty_results_and_no_gradient(shape):
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    v = randn(shape[1], seed=1).requires_grad_()
    y, top = reference("x / batch_std(x) * v, all_max(x)")(x, v=v)
    assert y.shape == top.shape == x.shape
    (y.sum() + top.sum()).backward()
    assert torch.equal(v.grad, torch.zeros_like(v))
    assert x.grad.shape == x.shape


def test_one_value_per_statistic():
    x = randn(1, 4)
    assert_close(reference("(x - batch_mean(x)) / batch_std(x)")(x), x * 0, **EXACT)


def test_depth_and_sharing_cost_nothing():
    deep = X
    for _ in range(5_000):  # deeper than Python recurses
        deep = deep + 1
    x = randn(2, 4)
    assert_close(reference(Definition((deep,)))(x), x + 5_000, **EXACT)
    wide = X
    for _ in range(60):  # 2**60 nodes as a tree
        wide = call("add", wide, wide)
    assert_close(reference(Definition((wide,)))(x), x * 2.0**60, **EXACT)


# --- what does not fit ------------------------------------------------------------------------

FILM = "input scale[n,c]; param a; input h; a*x*scale + beta + h"


def film(**changes):
    """A call of FILM that fits, but for the changes; None leaves a tensor out."""
    x = randn(2, 6, 3, 4)
    call = {"x": x, "scale": x.new_ones(2, 6), "h": x.new_ones(x.shape)} | changes
    return {name: value for name, value in call.items() if value is not None}


MISFITS = [
    (film(x=randn(6)), ["x must have 2 to 5 dimensions, not 1", "(6,)"]),
    (film(x=randn(1, 1, 1, 1, 1, 1)), ["2 to 5 dimensions, not 6"]),
    (film(x=torch.ones(2, 6, 3, 4, dtype=torch.int64)), ["`x`", "floating point", "torch.int64"]),
    (film(x=randn(2, 6).to(torch.complex128)), ["`x`", "floating point"]),
    (film(x=[[1.0]]), ["`x` must be a tensor, not list"]),
    (film(channel_dim=4), ["channel_dim=4", "use -4 to 3"]),
    (film(groups=4), ["groups=4", "6 channels", "groups=3"]),
    (film(groups=-1), ["groups must be a positive whole number"]),
    (film(groups="many"), ["groups must be", "'many'"]),
    (film(scale=None), ["`scale[n,c]` is missing", "pass scale="]),
    (film(h=None), ["`h` is missing", "pass h="]),
    (film(scale=randn(6)), ["`scale[n,c]`", "(2, 6)", "(2, 6, 3, 4)", "not (6,)"]),
    (film(scale=randn(2, 6, 1, 1)), ["`scale[n,c]`", "not (2, 6, 1, 1)"]),
    (film(h=randn(2, 6, 3)), ["`h`", "must have shape (2, 6, 3, 4)"]),
    (film(beta=randn(1, 6, 1, 1)), ["`beta[c]`", "must have shape (6,)"]),
    (film(beta=randn(7)), ["`beta[c]`", "(6,)", "not (7,)"]),
    (film(a=randn(6)), ["`a` must have shape ()", "not (6,)"]),
    (film(a=0.5), ["`a` must be a tensor, not float"]),
    (film(beta=torch.ones(6, dtype=torch.int32)), ["`beta`", "floating point"]),
    (film(gamma=randn(6)), ["no tensor `gamma`", "it takes a, beta, scale, h"]),
    (film(bta=randn(6)), ["no tensor `bta`", "did you mean `beta`?"]),
    (film(beta=torch.ones(6, device="meta")), ["`beta` is on meta", "x on cpu", ".to(x.device)"]),
]


@pytest.mark.parametrize(("call", "says"), MISFITS)
def test_what_does_not_fit_is_named_with_the_way_out(call, says):
    assert reference(FILM)(**film()).shape == (2, 6, 3, 4)
    with pytest.raises(ShapeError) as error:
        reference(FILM)(**call)
    for words in says:
        assert words in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_formula_without_tensors_says_so():
    with pytest.raises(ShapeError, match="no tensor `v`: it takes none"):
        reference("relu(x)")(randn(2, 4), v=randn(4))


def test_the_oracle_shares_no_code_with_the_compiler():
    package = Path(errors.__file__).parent
    tree = ast.parse((package / "reference.py").read_text("utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {module for module in modules if module.startswith("normc")}
    assert ours
    assert all(m == "normc.errors" or m.startswith("normc.language.") for m in ours)


def test_inputs_declared_by_hand():
    row = Input("t", Axis.N | CHANNEL)
    x, t = randn(2, 4, 3), randn(2, 4, seed=1)
    y = reference(Definition((X + row.var,), inputs=(row,)))(x, t=t)
    assert torch.equal(y, x + t[:, :, None])
    assert Param("a", NONE).var.axes == NONE
