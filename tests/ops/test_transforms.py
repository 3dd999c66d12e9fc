"""torch.func and forward-mode autograd: every transform, alone and nested, against the oracle's.

The oracle is plain torch, so a transform of it is torch's own; an op's is made of derived programs.
"""

from math import prod

import pytest
import torch
from torch import func, nn
from torch.autograd import forward_ad, gradcheck
from torch.testing import assert_close

import normc
from normc.language.geometry import Geometry
from normc.ops.call import Call
from tests.layers import every_layer

pytestmark = [
    pytest.mark.cpu,
    # torch's own rules for jvp are TorchScript, loaded when the first tangent is asked for
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # torch's linearize puts constants into its graph as it warns not to
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

WIDE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # of float64
SHAPE = (2, 4, 2, 2)
BACKENDS = ["c", "torch"]
IN_C = ["evonorm_s0", "evonorm_b0", "batch_norm", "layer_norm", "add_rms_norm", "grn"]
SLOW = [name for name in normc.zoo if name not in IN_C]
EVERY = [
    *[pytest.param(*row.values, "torch", marks=row.marks) for row in every_layer()],
    *[(name, "c") for name in IN_C],
    *[pytest.param(name, "c", marks=pytest.mark.thorough) for name in SLOW],
]

on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_names = pytest.mark.parametrize("name", IN_C)
on_every_row = pytest.mark.parametrize("name, backend", EVERY)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def wave(shape, phase=0.0):
    """Numbers with no symmetry; vmap allows none that are drawn."""
    return (1.7 * torch.arange(prod(shape), dtype=WIDE) + phase).sin().reshape(shape)


def formula(name):
    return normc.zoo[name] if name in normc.zoo else normc.parse(name)


def shapes(f, shape=SHAPE, channel_dim=1):
    """The shape of each tensor a formula takes."""
    geometry = Geometry.of(shape, 2, channel_dim)
    rows = {i.name: i.axes for i in f.inputs} | {p.name: p.axes for p in f.params}
    return {"x": tuple(shape), **{n: geometry.shape_of(axes) for n, axes in rows.items()}}


def tensors(f, shape=SHAPE, channel_dim=1, lead=()):
    """One tensor per shape; parameters lie around one, so that no cancellation hides a mistake."""
    made = shapes(f, shape, channel_dim)
    learned = {p.name for p in f.params}
    return tuple(
        1 + 0.3 * randn(*lead, *size, seed=i) if n in learned else randn(*lead, *size, seed=i)
        for i, (n, size) in enumerate(made.items())
    )


def by_position(call, f, **how):
    """A call as a function of all its tensors in order, which is what transforms take."""
    names, how = list(shapes(f)), {"groups": 2, **how}
    return lambda *args: call(**dict(zip(names, args, strict=True)), **how)


def both(name, backend, **how):
    """The formula, the op and the oracle."""
    f = formula(name)
    calls = normc.compile(f, backend=backend), normc.reference(f)
    return f, *(by_position(call, f, **how) for call in calls)


def results(found):
    return found if isinstance(found, tuple) else (found,)


def scalar(call):
    """A loss on which every element has its own say; a normalized x hardly moves a plain sum."""

    def loss(*args):
        found = enumerate(results(call(*args)), start=50)
        return sum((y * wave(y.shape, i)).sin().sum() for i, y in found)

    return loss


def directions(args, phase=70):
    return tuple(wave(t.shape, phase + i) for i, t in enumerate(args))


def every(args):
    return tuple(range(len(args)))


# --- by finite differences ----------------------------------------------------------------------


@on_every_row
def test_both_modes_are_those_of_finite_differences(name, backend):
    f, op, _ = both(name, backend)
    args = tuple(t.requires_grad_() for t in tensors(f, (2, 4, 2)))
    assert gradcheck(op, args, check_forward_ad=True, fast_mode=backend == "c")


@on_every_row
def test_batched_cotangents_and_tangents_are_those_one_by_one(name, backend):
    """``is_grads_batched`` and ``jacobian(vectorize=True)`` stand on torch's older vmap."""
    f, op, _ = both(name, backend)
    args = tuple(t.requires_grad_() for t in tensors(f))
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(op, args, check_forward_ad=True, fast_mode=True, **batched)


# --- derivatives --------------------------------------------------------------------------------


def along(call, args, phase=70):
    """The tangents of the results along one direction of all tensors."""
    return func.jvp(call, args, directions(args, phase))[1]


def slope(call, phase=70):
    """The derivative along a direction as a function again."""
    return lambda *args: along(call, args, phase)


def gradient(call, args):
    return func.grad(scalar(call), every(args))


DERIVATIVES = {
    "grad": lambda f, a: gradient(f, a)(*a),
    "jvp": lambda f, a: func.jvp(f, a, directions(a)),
    "linearize": lambda f, a: func.linearize(f, *a)[1](*directions(a)),
    "jacrev": lambda f, a: func.jacrev(f, every(a))(*a),
    "jacrev in chunks": lambda f, a: func.jacrev(f, every(a), chunk_size=3)(*a),
    "jacfwd": lambda f, a: func.jacfwd(f, every(a))(*a),
    "vjp of x alone": lambda f, a: func.grad(scalar(f))(*a),
    "jvp of x alone": lambda f, a: func.jvp(lambda x: f(x, *a[1:]), a[:1], directions(a[:1])),
    "hessian": lambda f, a: func.hessian(scalar(f), every(a))(*a),
    "grad of grad": lambda f, a: gradient(lambda *b: gradient(f, b)(*b), a)(*a),
    "jvp of grad": lambda f, a: along(gradient(f, a), a),
    "grad of jvp": lambda f, a: gradient(slope(f), a)(*a),
    "jvp of jvp": lambda f, a: along(slope(f), a, phase=90),
    "autograd of grad": lambda f, a: autograd_of(gradient(f, a), a),
    "jacrev of jacfwd": lambda f, a: func.jacrev(func.jacfwd(scalar(f)))(*a),
}


def autograd_of(call, args):
    """The gradients that autograd finds outside of a transform."""
    args = [t.clone().requires_grad_() for t in args]
    return torch.autograd.grad(scalar(call)(*args), args, materialize_grads=True)


THIRD = {
    "grad of grad of grad": lambda f, a: func.grad(grad_sum(grad_sum(scalar(f))))(*a),
    "jvp of jvp of grad": lambda f, a: along(slope(func.grad(scalar(f))), a, phase=90),
    "grad of jvp of jvp": lambda f, a: func.grad(scalar(slope(slope(f), phase=90)))(*a),
    "jvp of hessian": lambda f, a: along(func.hessian(scalar(f)), a),
}


def grad_sum(loss):
    """A loss of the gradient of a loss."""
    return scalar(func.grad(loss))


# A derived program of second order takes C's compiler about a second: some names stand for all.
FEW = ["evonorm_s0", "add_rms_norm"]
ORDERS = [
    *[(n, b, "torch") for n in IN_C for b in DERIVATIVES],
    *[(n, b, "c") for n in FEW for b in DERIVATIVES],
    *[(n, b, "torch") for n in ("evonorm_s0", "batch_norm", "add_rms_norm") for b in THIRD],
    *[(n, b, "c") for n in ("layer_norm",) for b in THIRD],
]


@pytest.mark.parametrize("name, how, backend", ORDERS)
def test_derivatives_equal_the_oracles(name, how, backend):
    f, op, oracle = both(name, backend)
    args, transform = tensors(f), (DERIVATIVES | THIRD)[how]
    assert_close(transform(op, args), transform(oracle, args), **EXACT)


# --- vmap ---------------------------------------------------------------------------------------

TOKENS = {"channel_dim": -1}
FIRST = {"channel_dim": 0}
LAST = torch.channels_last
SIZES = {  # shape of x, and how it is called
    "2-D": ((3, 4), {}),
    "3-D": ((2, 4, 3), {}),
    "4-D": (SHAPE, {}),
    "5-D": ((2, 4, 2, 1, 2), {}),
    "tokens": ((2, 3, 4), TOKENS),
    "2-D tokens": ((3, 4), TOKENS),
    "channels first": ((4, 2, 3), FIRST),
    "channels between": ((2, 3, 4, 2), {"channel_dim": 2}),
    "one sample": ((1, 4, 2, 2), {}),
    "no positions": ((2, 4, 0), {}),
}
GIVEN = ["evonorm_s0", "batch_norm", "add_rms_norm", "ada_layer_norm", "grn", "dyt"]


@on_backends
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GIVEN)
def test_vmap_over_all_tensors_of_any_shape(name, size, backend):
    shape, how = SIZES[size]
    f, op, oracle = both(name, backend, **how)
    args = tensors(f, shape, **how, lead=(3,))
    assert_close(func.vmap(op)(*args), func.vmap(oracle)(*args), **EXACT)


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "ada_layer_norm", "add_rms_norm"])
def test_vmap_over_any_of_the_tensors(name, backend):
    f, op, oracle = both(name, backend)
    for which in range(1, 2 ** len(shapes(f))):
        dims = tuple(0 if which >> i & 1 else None for i in range(len(shapes(f))))
        whole = tensors(f, lead=(3,))
        args = [t if d == 0 else t[0] for t, d in zip(whole, dims, strict=True)]
        assert_close(func.vmap(op, dims)(*args), func.vmap(oracle, dims)(*args), **EXACT)


@on_backends
def test_what_has_samples_and_channels_lies_as_x_does(backend):
    """A parameter over which a batch varies becomes such a tensor."""
    f, op, oracle = both("input scale[n,c]; x*scale", backend, **FIRST)
    args = tuple(t.requires_grad_() for t in tensors(f, (4, 2, 3), **FIRST))
    found, want = (torch.autograd.grad(scalar(call)(*args), args) for call in (op, oracle))
    assert_close(op(*args), oracle(*args), **EXACT)
    assert_close(found, want, **EXACT)


@on_backends
@pytest.mark.parametrize("dim", [0, 1, 2, 4, -1, -2])
@pytest.mark.parametrize("out", [0, 1, -1])
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_vmap_over_any_dimension(name, dim, out, backend):
    f, op, oracle = both(name, backend)
    x, *rest = tensors(f, lead=(3,))
    args = x.movedim(0, dim), *(t.movedim(0, -1) for t in rest)
    dims = (dim, *(-1 for _ in rest))
    found, want = (func.vmap(call, dims, out)(*args) for call in (op, oracle))
    assert_close(found, want, **EXACT)


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_vmap_over_memory_of_any_order(name, backend):
    f, op, oracle = both(name, backend)
    whole, *rest = tensors(f, lead=(3,))
    layouts = {
        "samples channels-last": whole.flatten(0, 1).contiguous(memory_format=LAST).view_as(whole),
        "batch innermost": whole.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": randn(3, 2, 4, 2, 4)[..., ::2],
        "expanded": whole[:1].expand_as(whole),
    }
    for x in layouts.values():
        found, want = (func.vmap(call)(x, *rest) for call in (op, oracle))
        assert_close(found, want, **EXACT)


@on_backends
@on_names
def test_vmap_of_nothing_and_of_one(name, backend):
    f, op, oracle = both(name, backend)
    args = tensors(f, lead=(1,))
    assert_close(func.vmap(op)(*args), func.vmap(oracle)(*args), **EXACT)
    found = func.vmap(op)(*(t[:0] for t in args))
    assert [(y.shape, y.dtype) for y in results(found)] == [((0, *SHAPE), WIDE)] * len(
        results(found)
    )


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "add_rms_norm"])
def test_vmap_of_vmap(name, backend):
    f, op, oracle = both(name, backend)
    n = len(shapes(f))
    whole = tensors(f, lead=(2, 3))
    for inner, outer in [(0, 0), (-1, 0), (0, -1)]:
        args = [t.movedim(1, inner if inner else 1).movedim(0, outer) for t in whole]
        dims = (inner,) * n, (outer,) * n
        found, want = (func.vmap(func.vmap(c, dims[0]), dims[1])(*args) for c in (op, oracle))
        assert_close(found, want, **EXACT)
    x, *rest = whole
    args = x, *(t[0] for t in rest)  # the outer batch over x, the inner one over all
    found, want = (
        func.vmap(func.vmap(call), (0, *(None,) * len(rest)))(*args) for call in (op, oracle)
    )
    assert_close(found, want, **EXACT)


BATCHED = {
    "vmap of grad": lambda f, a: func.vmap(gradient(f, a))(*a),
    "vmap of jvp": lambda f, a: func.vmap(slope_of_each(f))(*a, *directions(a)),
    "vmap of tangents": lambda f, a: func.vmap(pushed(f, a))(*directions(a)),
    "grad of vmap": lambda f, a: gradient(func.vmap(f), a)(*a),
    "jvp of vmap": lambda f, a: along(func.vmap(f), a),
    "vmap of hessian": lambda f, a: func.vmap(func.hessian(scalar(f)))(*a),
    "grad of vmap of grad": lambda f, a: gradient(func.vmap(gradient(f, a)), a)(*a),
    "jvp of vmap of grad": lambda f, a: along(func.vmap(gradient(f, a)), a),
    "grad of vmap of jvp": lambda f, a: gradient(func.vmap(slope(f)), a)(*a),
}


def slope_of_each(call):
    """A derivative along a direction that comes with each of the batch."""

    def at(*both):
        half = len(both) // 2
        return func.jvp(call, both[:half], both[half:])

    return at


def pushed(call, args):
    """The same at one place for all of the batch."""
    place = tuple(t[0] for t in args)
    return lambda *tangents: func.jvp(call, place, tangents)


@on_backends
@pytest.mark.parametrize("how", BATCHED)
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_vmap_mixes_with_derivatives(name, how, backend):
    f, op, oracle = both(name, backend)
    args = tensors(f, (2, 4, 2), lead=(3,))
    assert_close(BATCHED[how](op, args), BATCHED[how](oracle, args), **EXACT)


@on_backends
@on_names
@pytest.mark.parametrize("samples", [1, 2])
def test_gradients_of_single_samples(name, samples, backend):
    f, op, oracle = both(name, backend)
    x, *rest = tensors(f, (samples, 4, 2, 2), lead=(5,))
    args, dims = (x, *(t[0] for t in rest)), (0, *(None,) * len(rest))
    found, want = (func.vmap(gradient(call, args), dims)(*args) for call in (op, oracle))
    assert_close(found, want, **EXACT)


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_vmap_over_gradients_of_a_graph_made_before(name, backend):
    """The graph knows no transform: only its backward runs inside of one."""
    f, op, oracle = both(name, backend)
    args = tuple(t.requires_grad_() for t in tensors(f))
    cotangents = randn(3, *SHAPE, seed=9)
    found, want = (func.vmap(pulled(call(*args), args))(cotangents) for call in (op, oracle))
    assert_close(found, want, **EXACT)


def pulled(y, args):
    return lambda cotangent: torch.autograd.grad(y, args, cotangent, retain_graph=True)


@on_backends
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_vectorized_jacobians_of_autograd(name, strategy, backend):
    f, op, oracle = both(name, backend)
    args, how = tensors(f), dict(vectorize=True, strategy=strategy)
    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(op, args, **how), jacobian(oracle, args, **how), **EXACT)


# --- how many kernels a batch takes -------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """The shapes of x, one per run of forward kernels."""
    seen, forward = [], Call.forward

    def counted(self, given, eps):
        seen.append(tuple(self.shape))
        return forward(self, given, eps)

    monkeypatch.setattr(Call, "forward", counted)
    return seen


def is_crossing(name):
    return "batch_" in formula(name).text


@on_every_row
def test_a_batch_is_one_run_unless_statistics_cross_samples(name, backend, runs):
    f, op, _ = both(name, backend)
    func.vmap(op)(*tensors(f, lead=(3,)))
    assert runs == ([SHAPE] * 3 if is_crossing(name) else [(6, *SHAPE[1:])])
    runs.clear()
    func.vmap(op)(*tensors(f, (1, 4, 2, 2), lead=(3,)))
    assert runs == [(3, 4, 2, 2)], "one sample has nothing to cross"


@pytest.mark.parametrize(
    "name, samples, count",
    [
        ("evonorm_s0", 1, 2),
        ("batch_norm", 1, 2),
        ("evonorm_s0", 2, 1 + 3),
        ("batch_norm", 2, 3 + 3),
    ],
)
def test_gradients_of_single_samples_are_two_runs(name, samples, count, runs):
    """A parameter's gradient sums over samples, so that with several each is for itself."""
    f, op, _ = both(name, "torch")
    x, *rest = tensors(f, (samples, 4, 2), lead=(3,))
    args, dims = (x, *(t[0] for t in rest)), (0, *(None,) * len(rest))
    func.vmap(gradient(op, args), dims)(*args)
    assert len(runs) == count


def test_a_jacobian_is_one_run_for_all_of_its_rows(runs):
    f, op, _ = both("evonorm_s0", "torch")
    args = tensors(f, (1, 4, 2))
    func.jacrev(op)(*args)
    assert len(runs) == 2 and runs[1][0] == prod((1, 4, 2))
    runs.clear()
    func.jacfwd(op)(*args)
    assert runs[-1][0] == prod((1, 4, 2)) and len(runs) <= 2


# --- forward-mode autograd ----------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "add_rms_norm", "ada_layer_norm"])
def test_dual_numbers_of_any_of_the_tensors(name, backend):
    f, op, oracle = both(name, backend)
    args, tangents = tensors(f), directions(tensors(f))
    for which in range(2 ** len(args)):
        found, want = (dual(call, args, tangents, which) for call in (op, oracle))
        assert_close(found, want, **EXACT)


def dual(call, args, tangents, which):
    """The results and their tangents, of which there are some only where an argument has one."""
    with forward_ad.dual_level():
        given = [
            forward_ad.make_dual(t, d) if which >> i & 1 else t
            for i, (t, d) in enumerate(zip(args, tangents, strict=True))
        ]
        pairs = [forward_ad.unpack_dual(y) for y in results(call(*given))]
        return [(y, torch.zeros_like(y) if dy is None else dy) for y, dy in pairs]


@on_backends
def test_no_tangent_goes_in_and_none_comes_out(backend):
    f, op, _ = both("evonorm_s0", backend)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(op(*tensors(f))).tangent is None


@on_backends
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm"])
def test_tangents_have_gradients(name, backend):
    """Forward over reverse and reverse over forward, without torch.func."""
    f, op, oracle = both(name, backend)
    args = tuple(t.requires_grad_() for t in tensors(f))
    found, want = (dual_then_grad(call, args) for call in (op, oracle))
    assert_close(found, want, **EXACT)
    found, want = (grad_then_dual(call, args) for call in (op, oracle))
    assert_close(found, want, **EXACT)


def dual_then_grad(call, args):
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(*pair) for pair in zip(args, directions(args), strict=True)]
        pushed = forward_ad.unpack_dual(call(*given)).tangent
        return torch.autograd.grad(scalar(lambda: pushed)(), args, materialize_grads=True)


def grad_then_dual(call, args):
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(*pair) for pair in zip(args, directions(args), strict=True)]
        grads = torch.autograd.grad(scalar(call)(*given), given)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


# --- dtypes -------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("dtypes", ["half", "mixed", "float32"])
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "add_rms_norm"])
def test_derivatives_have_the_dtypes_of_what_they_belong_to(name, dtypes, backend):
    f, op, oracle = both(name, backend)
    wide = tensors(f, (4, 4, 3, 3))
    full = torch.float32 if dtypes == "float32" else torch.bfloat16
    small = torch.bfloat16 if dtypes == "half" else torch.float32
    args = tuple(t.to(full if t.shape == wide[0].shape else small) for t in wide)
    tangents = tuple(d.to(t.dtype) for t, d in zip(args, directions(args), strict=True))
    wide, along = ([t.to(WIDE) for t in ts] for ts in (args, tangents))
    # of the dtype in which results are stored: those are rounded once, after float32
    near = dict(rtol=2e-2, atol=1e-1) if full == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    grads, want = (gradient(c, a)(*a) for c, a in ((op, args), (oracle, wide)))
    assert [g.dtype for g in grads] == [t.dtype for t in args]
    values, pushed = func.jvp(op, args, tangents)
    expected = func.jvp(oracle, tuple(wide), tuple(along))
    assert {y.dtype for y in (*results(values), *results(pushed))} == {full}
    assert_close([t.to(WIDE) for t in results(pushed)], [*results(expected[1])], **near)
    for g, w in zip(grads, want, strict=True):
        assert_close(g.to(WIDE), w, rtol=near["rtol"], atol=near["atol"] * max(1, w.abs().max()))


@on_backends
def test_vmap_keeps_dtypes(backend):
    f, op, oracle = both("evonorm_s0", backend)
    x, *rest = tensors(f, lead=(3,))
    args = x.bfloat16(), *(t.float() for t in rest)
    found = func.vmap(op)(*args)
    assert found.dtype == torch.bfloat16
    want = func.vmap(oracle)(*(t.to(WIDE) for t in args))
    assert_close(found.to(WIDE), want, rtol=1e-2, atol=1e-2)  # the result is rounded to bfloat16


# --- names --------------------------------------------------------------------------------------


TAKEN = ["y", "s0", "d_x", "d_y", "past0_y", "tangent0_x", "grad1_x", "push1_y"]
TAKEN += ["past1_grad1_x", "past1_push1_y", "d_grad1_x", "tangent1_x", "d_d_x"]


@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize(
    "how", ["grad of grad", "jvp of jvp", "grad of jvp", "jvp of grad", "hessian"]
)
def test_a_tensor_called_like_a_derivative_is_right_or_named(taken, how):
    """A later derivative makes these names: it must not take the user's tensor for its own."""
    f, op, oracle = both(f"input {taken}; x*x*sigmoid({taken}*x)/layer_rms(x)", "torch")
    args = tensors(f)
    want = DERIVATIVES[how](oracle, args)
    try:
        found = DERIVATIVES[how](op, args)
    except normc.NormcError as error:
        assert f"`{taken}`" in str(error)
    else:
        assert_close(found, want, **EXACT)


# --- layers -------------------------------------------------------------------------------------


def layer(name, backend="torch", seed=0):
    made = normc.Layer(normc.zoo[name], 4, groups=2, dtype=WIDE, backend=backend)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(1 + 0.3 * randn(*p.shape, seed=seed + i))
        for i, r in enumerate(made.running):
            made.get_buffer(r.name).copy_(1 + 0.3 * randn(4, seed=seed + 9 + i).abs())
    return made


def expanded(module, x):
    """The oracle's layer in evaluation, by the plain formula of torch's batch norm."""
    mean, std = module.running_mean, (module.running_var + module.eps).sqrt()
    by_channel = [t.view(4, 1, 1) for t in (mean, std, module.gamma, module.beta)]
    m, s, gamma, beta = by_channel
    return (x - m) / s * gamma + beta


@on_backends
def test_an_ensemble_of_frozen_layers(backend, runs):
    """Every member has parameters and running statistics of its own; frozen ones cross nothing."""
    members = [layer("batch_norm", backend, seed).eval() for seed in (0, 20, 40)]
    state, x = func.stack_module_state(members), randn(*SHAPE)

    def call(params, buffers, x):
        return func.functional_call(members[0], (params, buffers), (x,))

    found = func.vmap(call, (0, 0, None))(*state, x)
    assert runs == [(6, 4, 2, 2)]
    assert_close(found, torch.stack([expanded(m, x) for m in members]), **EXACT)
    each = randn(3, *SHAPE, seed=3)
    found = func.vmap(call)(*state, each)
    assert_close(found, torch.stack([expanded(m, x) for m, x in zip(members, each, strict=True)]))


@on_backends
def test_an_ensemble_trains(backend):
    """Buffers that are batched too are updated, each by its own member's statistics."""
    members = [layer("batch_norm", backend, seed) for seed in (0, 20, 40)]
    params, buffers = func.stack_module_state(members)
    x = randn(3, *SHAPE)

    def loss(params, buffers, x):
        now = {name: t.clone() for name, t in buffers.items()}
        y = func.functional_call(members[0], (params, now), (x,))
        return scalar(lambda: y)(), now

    grads, now = func.vmap(func.grad(loss, has_aux=True))(params, buffers, x)
    for i, member in enumerate(members):
        scalar(member)(x[i]).backward()
        assert_close([g[i] for g in grads.values()], [p.grad for p in member.parameters()], **EXACT)
        assert_close({n: t[i] for n, t in now.items()}, dict(member.named_buffers()), **EXACT)


def twins(backend):
    """Our layer, and torch's with its weights."""
    ours, theirs = layer("batch_norm", backend), nn.BatchNorm2d(4).double()
    names = {"gamma": "weight", "beta": "bias"}
    theirs.load_state_dict({names.get(k, k): v for k, v in ours.state_dict().items()})
    return ours, theirs


@on_backends
def test_training_through_functional_call(backend):
    """Gradients and buffers of a step that is a function of both."""
    x, found = randn(*SHAPE), []
    for module in twins(backend):
        params, buffers = dict(module.named_parameters()), dict(module.named_buffers())

        def loss(params, x, module=module, buffers=buffers):
            now = {name: t.clone() for name, t in buffers.items()}
            y = func.functional_call(module, (params, now), (x,))
            return scalar(lambda: y)(), now

        grads, now = func.grad(loss, (0, 1), has_aux=True)(params, x)
        found.append(([*grads[0].values(), grads[1]], now))
        assert module.num_batches_tracked == 0, "the module's own buffers are left alone"
    assert_close(*found, **EXACT)


@on_backends
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_buffers_that_a_transform_cannot_see_are_refused_as_torch_refuses_them(transform, backend):
    x = randn(3, *SHAPE)
    for module in twins(backend):
        with pytest.raises(RuntimeError, match=r"in-place|inplace|in place"):
            if transform == "vmap":
                func.vmap(module)(x)
            else:
                func.grad(lambda x, module=module: module(x).sum())(x[0])


@on_backends
def test_per_sample_gradients_of_a_network(backend):
    torch.manual_seed(0)
    norm = layer("evonorm_s0", backend)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), norm, nn.Flatten(), nn.Linear(16, 2)).double()
    params, x = dict(net.named_parameters()), randn(5, 3, 3, 3)

    def loss(params, sample):
        return func.functional_call(net, params, (sample[None],)).square().sum()

    found = func.vmap(func.grad(loss), (None, 0))(params, x)
    for i, sample in enumerate(x):
        want = torch.autograd.grad(net(sample[None]).square().sum(), list(params.values()))
        assert_close([g[i] for g in found.values()], [*want], **EXACT)
