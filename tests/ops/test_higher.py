"""Derivatives of derivatives, through compiled kernels: backward is a program like any other."""

import pytest
import torch

import normc
from normc.language.geometry import Geometry
from tests.layers import every_layer

pytestmark = pytest.mark.cpu

OWN = ("x*group_max(x) + gamma*x", "x**3*tanh(v*x)/layer_rms(x)", "sin(x), x*instance_mean(x)")


def prepared(text, shape=(3, 4, 3, 2), groups=2, seed=0):
    """A formula and its tensors in float64, all wanting gradients."""
    f = normc.zoo[text] if text in normc.zoo else normc.parse(text)
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry.of(shape, groups)

    def draw(axes_shape):
        return torch.randn(axes_shape, dtype=torch.float64, generator=generator)

    given = {"x": draw(shape)}
    given |= {i.name: draw(geometry.shape_of(i.axes)) for i in f.inputs if i.name != "x"}
    given |= {p.name: 1 + 0.3 * draw((shape[1],) if p.axes else ()) for p in f.params}
    return f, {name: t.requires_grad_() for name, t in given.items()}


def function(call, given, groups=2):
    names = list(given)
    return lambda *args: call(**dict(zip(names, args, strict=True)), groups=groups)


IN_C = {"evonorm_s0", "evonorm_b0", "layer_norm", "add_rms_norm", "grn", OWN[0]}


EVERY = [
    *[pytest.param(*row.values, "torch", marks=row.marks) for row in every_layer()],
    *[(name, "torch") for name in OWN],
    *[
        pytest.param(name, "c", marks=() if name in IN_C else pytest.mark.thorough)
        for name in (*normc.zoo, *OWN)
    ],
]


@pytest.mark.parametrize("name, backend", EVERY)
def test_second_derivatives_are_those_of_finite_differences(name, backend):
    f, given = prepared(name, (2, 4, 2, 2))
    call = function(normc.compile(f, backend=backend), given)
    assert torch.autograd.gradgradcheck(call, tuple(given.values()), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", ["evonorm_s0", "layer_norm", "add_rms_norm"])
def test_third_derivatives_equal_the_oracles(name):
    f, given = prepared(name, (2, 4, 2, 2))
    found, want = (
        thrice(function(call, given), given)
        for call in (normc.compile(f, backend="torch"), normc.reference(f))
    )
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-8)


def thrice(call, given):
    """Each derivative along a direction that differs from the others."""
    every = tuple(given.values())
    out = call(*every)
    value = sum(o.sin().sum() for o in (out if isinstance(out, tuple) else (out,)))
    for turn in range(3):
        grads = torch.autograd.grad(value, every, create_graph=True, materialize_grads=True)
        value = sum(((turn + 1.5) * g).sin().sum() for g in grads)
    return value


def test_a_gradient_penalty_equals_that_of_eager():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 3, dtype=torch.float64)
    f, x = normc.zoo["evonorm_s0"], torch.randn(2, 3, 6, 6, dtype=torch.float64)
    params = {"v": torch.rand(8), "gamma": torch.rand(8), "beta": torch.rand(8)}
    params = {name: t.double().requires_grad_() for name, t in params.items()}

    def step(call):
        image = x.clone().requires_grad_()
        score = call(conv(image), groups=4, **params).square().mean()
        (grad,) = torch.autograd.grad(score, image, create_graph=True)
        penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(score + 10 * penalty, [*conv.parameters(), *params.values()])

    torch.testing.assert_close(step(normc.compile(f)), step(normc.reference(f)))


def test_frozen_statistics_and_layers():
    layer = normc.Layer(
        normc.zoo["batch_norm_relu" if "batch_norm_relu" in normc.zoo else "bn_relu"], 4
    ).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    layer(x)
    layer.eval()
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_half_precision_and_cotangents_of_any_strides():
    f, given = prepared("group_norm")
    op, names = normc.compile(f), list(given)
    every = [t.detach().bfloat16().requires_grad_() for t in given.values()]
    y = op(**dict(zip(names, every, strict=True)), groups=2)
    cotangent = torch.randn(3, 3, 2, 4).movedim(-1, 1).bfloat16().requires_grad_()
    first = torch.autograd.grad(y, every, cotangent, create_graph=True)
    value, wanted = sum(g.float().square().sum() for g in first), [*every, cotangent]
    second = torch.autograd.grad(value, wanted, materialize_grads=True)
    assert all(g.isfinite().all() for g in second)
    assert [g.dtype for g in first] == [torch.bfloat16] * len(every)


def test_what_wants_no_gradient_gets_none():
    f, given = prepared("layer_norm")
    op = normc.compile(f, backend="c")
    x = given["x"]
    fixed = {name: t.detach() for name, t in given.items() if name != "x"}
    (grad,) = torch.autograd.grad(op(x, **fixed).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    x2 = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(
        normc.reference(f)(x2, **fixed).square().sum(), x2, create_graph=True
    )
    (want,) = torch.autograd.grad(grad.square().sum(), x2)
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize("backend", ["c", "tape", "torch"])
def test_cotangents_of_parameter_gradients_may_change_their_strides(backend):
    """Kernels are bound once per kind of call, and autograd hands on whatever strides it has."""
    f, given = prepared("layer_norm")
    every, names = list(given.values()), list(given)
    cotangents = [
        torch.rand(4, dtype=torch.float64),
        torch.tensor([3.0], dtype=torch.float64).expand(4),
        torch.rand(4, 4, dtype=torch.float64)[:, 1],
    ]
    op, oracle = normc.compile(f, backend=backend), normc.reference(f)
    for cotangent in cotangents:
        found, want = (second(call, names, every, cotangent) for call in (op, oracle))
        torch.testing.assert_close(found, want)


def second(call, names, every, cotangent):
    """The derivatives of the gradient of gamma, along a cotangent of its own."""
    y = call(**dict(zip(names, every, strict=True)), groups=2)
    gamma = every[names.index("gamma")]
    (grad,) = torch.autograd.grad(y.square().sum(), gamma, create_graph=True)
    return torch.autograd.grad(grad, every, cotangent, materialize_grads=True)


@pytest.mark.parametrize("backend", ["torch", "c", "tape"])
@pytest.mark.parametrize(
    "text", ["gamma*instance_mean(x) + beta", "gamma*batch_mean(x) - group_rms(x)"]
)
def test_backward_may_read_statistics_alone_and_is_differentiated_again(text, backend):
    """x is read by no gradient of these formulas, but by the gradients of those."""
    op = normc.compile(text, backend=backend)
    chance = torch.Generator().manual_seed(0)
    names = [p.name for p in op.formula.params]
    x = torch.randn(2, 4, 3, 3, generator=chance, dtype=torch.float64, requires_grad=True)
    given = {
        n: torch.randn(4, generator=chance, dtype=torch.float64, requires_grad=True) for n in names
    }

    def penalty(call):
        leaves = [x, *given.values()]
        loss = call(x, groups=2, **given).square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)

    for found, want in zip(penalty(op), penalty(normc.reference(text)), strict=True):
        torch.testing.assert_close(found, want)
