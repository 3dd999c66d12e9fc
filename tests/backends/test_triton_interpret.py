"""Triton kernels run by Triton's interpreter, on tiny shapes: values and gradients against the
oracle, every function they bring along, tiles smaller than the tensors."""

from math import prod

import pytest
import torch

import normc
from normc.analysis.agreement import LAYOUTS, Case, compare, distance, draw, gradients, magnitude
from normc.backends import triton
from normc.backends.launches import main_launch
from normc.backends.tile_choice import choose
from normc.backends.tiles import printed
from normc.backends.tiling import SCHEDULES
from normc.language.geometry import Geometry
from normc.language.primitives import PRIMITIVES
from normc.ops.explain import all_jobs
from normc.pipeline import Target, programs
from normc.reference import reference
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST
from tests.backends.schedules import small
from tests.layers import LEADERS

pytestmark = [
    pytest.mark.interpret,
    # numpy runs the kernels, and tells of what happens in lanes that are masked
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6
]

THOROUGH = pytest.mark.thorough
SHAPES = {2: (5, 12), 3: (2, 3, 6), 4: (2, 6, 3, 2), 5: (1, 6, 2, 1, 3)}
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def case_on(layout, dtype="float32", shape=None):
    shape = shape or SHAPES[layout.rank]
    if layout.rank == 3 and layout.channel_dim == 1:
        shape = (2, 6, 3)
    return Case(layout, shape, 3 if shape[layout.channel_dim] % 3 == 0 else 1, dtype, 7)


def on_layouts():
    """Every layer on all layouts; in `make test` one of a kind on three, the next on the others."""
    for i, name in enumerate(LEADERS):
        yield pytest.param(name, LAYOUTS[i % 2 :: 2], id=name)
    for name in normc.zoo:
        yield pytest.param(name, LAYOUTS, id=f"{name}-all", marks=pytest.mark.thorough)


@pytest.mark.parametrize(("name", "layouts"), list(on_layouts()))
def test_the_zoo_agrees_with_the_oracle(name, layouts):
    for layout in layouts:
        for error in compare(normc.zoo[name], case_on(layout), "triton"):
            assert error.ok, (layout.name, error)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "layer_norm_tokens", "add_rms_norm"])
def test_storage_of_every_width(name, dtype):
    for layout in ("channels-first", "channels-last", "tokens"):
        for error in compare(normc.zoo[name], case_on(BY_NAME[layout], dtype), "triton"):
            assert error.ok, (layout, error)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 7, 1), (3, 1, 1, 7), (7, 7, 1, 3)], ids=str)
@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "rms_norm", "grn"])
def test_odd_sizes(name, shape):
    for layout in ("channels-first", "channels-last"):
        for error in compare(normc.zoo[name], case_on(BY_NAME[layout], "float64", shape), "triton"):
            assert error.ok, (layout, error)


SETS = ("batch", "instance", "group", "layer", "channel", "batch_group", "all")
STATS = ("var", "max", "min", "std", "mean", "l1", "sum")


@pytest.mark.parametrize("axes, stat", list(zip(SETS, STATS, strict=True)))
def test_every_axis_set(axes, stat):
    text = f"x*{axes}_{stat}(v*x) + {axes}_var(x)"
    for layout in ("channels-first", "channels-last"):
        for error in compare(text, case_on(BY_NAME[layout]), "triton"):
            assert error.ok, (layout, error)


# --- every schedule, with tiles smaller than the tensors ------------------------------------------


def run(text, case, choose):
    """Results and gradients of a formula, from kernels under schedules of our choice."""
    f, geometry = normc.parse(text), case.geometry
    given, cotangents = draw(f.definition, case)
    order = CHANNELS_LAST if "last" in case.layout.name else CHANNELS_FIRST
    backend = triton.TritonBackend(choose)
    forward, backward = all_jobs(f, Target("triton", case.dtype, order, False))
    (first,) = backend.load([forward], [backend.render(forward)])
    done = first(geometry, given, 1e-5)
    results = [o.name for o in forward.plan.program.outputs]
    known = given | done | {f"d_{y}": d for y, d in zip(results, cotangents, strict=True)}
    known = {i.name: known[i.name] for i in backward.plan.program.inputs}
    (then,) = backend.load([backward], [backend.render(backward)])
    done |= then(geometry, known, 1e-5)
    wrt = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
    gradients = programs(f.definition, wrt).gradients  # equal ones are computed once
    return done | {name: done[output] for name, output in gradients.items()}


def exact(text, case):
    f = normc.parse(text)
    given, cotangents = draw(f.definition, case)
    how = {"groups": case.groups, "channel_dim": case.layout.channel_dim}
    wide = {name: t.double() for name, t in given.items()}
    oracle = reference(f)
    return gradients(lambda **t: oracle(**t, **how), wide, [d.double() for d in cotangents])


def agrees(text, case, choose, tolerance):
    found = run(text, case, choose)
    for tensor, want in exact(text, case).items():
        error = distance(found[tensor], want, max(magnitude(want), 1e-6))
        assert error < tolerance, (tensor, error)


OWN = (
    *("x*group_max(x) + gamma*channel_min(v*x)", "x*all_var(x) + batch_group_std(gamma*x)"),
    *("h = x*instance_rms(x); h - layer_mean(h*batch_std(h))", "group_min(instance_mean(x)**2)"),
)


def in_turns():
    """Every layer, order in memory and schedule; in `make test` each layer whose plan no other has
    under one schedule per order, another for the next; the rest under one."""
    for i, name in enumerate([*normc.zoo, *OWN]):
        for j, layout in enumerate(["channels-first", "channels-last"]):
            for k, schedule in enumerate(SCHEDULES):
                now = (i + 2 * j + k) % len(SCHEDULES) == 0 and (
                    name in (*LEADERS, *OWN) or (i + j) % 2 == 0
                )
                marks = () if now else (pytest.mark.thorough,)
                yield pytest.param(name, layout, schedule, marks=marks)


@pytest.mark.parametrize(("name", "layout", "schedule"), list(in_turns()))
def test_every_schedule_of_every_layer(name, layout, schedule):
    text = normc.zoo[name].text if name in normc.zoo else name
    agrees(text, Case(BY_NAME[layout], (2, 4, 3, 1), 2, "float32", 3), small(schedule), 1e-4)


SIZES = {  # of a tensor that an instance's tiles have to cover: less, as much, and one more
    "ones": (1, 1, 1, 1),
    "odd": (3, 7, 1, 7),
    "edge": (4, 4, 4, 1),
    "below": (3, 2, 3, 1),
    "above": (5, 2, 5, 1),
    "long": (1, 2, 127, 1),
    "longer": (1, 3, 129, 1),
    "wide": (1, 127, 1, 1),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["evonorm_b0", "layer_norm_tokens", pytest.param("evonorm_s0", marks=THOROUGH)]
)
def test_sizes_around_the_edges_of_tiles(name, size, schedule):
    shape = SIZES[size]
    extent = 4 if max(shape) < 100 else 64  # tiles, shares and boxes of 4 or 64
    case = Case(BY_NAME["channels-last"], shape, 2 if shape[1] == 4 else 1, "float64", 3)
    agrees(normc.zoo[name].text, case, small(schedule, extent), 1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_large_mean_is_taken_off_before_squaring(schedule):
    x = torch.randn(2, 3, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x + 1e4).float()
    forward, _ = all_jobs(normc.zoo["instance_norm"], Target("triton", "float32"))
    backend = triton.TritonBackend(small(schedule, 8))
    geometry = Case(BY_NAME["rank 3"], tuple(x.shape), 1, "float32", 0).geometry
    ones, zeros = torch.ones(3), torch.zeros(3)
    given = {"x": x, "gamma": ones, "beta": zeros}
    (run,) = backend.load([forward], [backend.render(forward)])
    found = run(geometry, given, 1e-5)["y"]
    want = torch.nn.functional.instance_norm(x.double())
    assert (found - want).abs().max() < 3e-3  # the mean itself is rounded by up to 5e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["evonorm_b0", pytest.param("layer_norm_tokens", marks=THOROUGH)])
def test_results_are_the_same_to_the_last_bit(name, schedule):
    case = Case(BY_NAME["channels-last"], (3, 6, 5, 1), 1, "float32", 3)
    first, second = (run(normc.zoo[name].text, case, small(schedule)) for _ in range(2))
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_infinities_and_nan_go_the_same_way_under_every_schedule(schedule):
    x = torch.tensor([[1.0, float("inf"), 2.0, 3.0], [float("nan"), 1.0, 2.0, -float("inf")]])
    for text in ("x + instance_max(x)", "x - instance_mean(x)", "x*instance_var(x)"):
        forward, _ = all_jobs(normc.parse(text), Target("triton", "float32"))
        backend = triton.TritonBackend(small(schedule))
        (run,) = backend.load([forward], [backend.render(forward)])
        found = run(Geometry.of((2, 1, 4)), {"x": x[:, None]}, 1e-5)["y"]
        torch.testing.assert_close(found, reference(text)(x[:, None]), equal_nan=True)


def test_a_schedule_can_be_forced():
    x, f = torch.randn(3, 4, 5), normc.zoo["instance_norm"]
    given = {"gamma": torch.ones(4), "beta": torch.zeros(4)}
    want = torch.nn.functional.instance_norm(x)
    for schedule in SCHEDULES:
        with triton.forced(schedule):  # also kernels that were made without are not taken again
            y = normc.compile(f, backend="triton")(x, **given)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(normc.BackendError, match="did you mean `cluster`"),
        triton.forced("clusters"),
    ):
        pass


# --- functions ------------------------------------------------------------------------------------

UNARY = [name for name, p in PRIMITIVES.items() if p.callable and len(p.args) == 1]
CANCELLING = {"gelu", "gelu_tanh"}  # for large negative arguments, in torch as here
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-30, 100.0, -100.0)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 2e-14)])
@pytest.mark.parametrize("name", UNARY)
def test_functions_are_accurate_everywhere(name, dtype, limit):
    row = PRIMITIVES[name]
    small, special = torch.logspace(-8, 0, 200), torch.tensor(SPECIAL)
    x = torch.cat([torch.linspace(*row.probe, 1000), small, -small, special]).to(dtype)[None]
    found = normc.compile(f"{name}(x)", backend="triton")(x)
    want = row.reference(torch, x.double())
    rounded = want.to(dtype)
    assert torch.equal(found.isnan(), rounded.isnan())
    ordinary = rounded.isfinite() & (want.abs() > 1e-36)
    rest = ~ordinary & ~rounded.isnan()
    torch.testing.assert_close(found[rest], rounded[rest], rtol=0, atol=1e-36)
    scale = 1.0 if name in CANCELLING else want.abs()
    assert ((found - want).abs() / scale)[ordinary].max() < limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "silu", "gelu_tanh"])
def test_quick_functions_are_as_good_as_half_precision(name, dtype):
    row = PRIMITIVES[name]
    near = torch.logspace(-4, 0, 300)
    x = torch.cat([torch.linspace(-12, 12, 999), near, -near, torch.tensor(SPECIAL)]).to(dtype)[
        None
    ]
    found = normc.compile(f"{name}(x)", backend="triton")(x)
    want = row.reference(torch, x.double())
    torch.testing.assert_close(
        found, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True
    )


NUMBERS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, -2.0, 3.0, -3.5, 30.0, float("inf"), float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", ["x**z", "max(x, z)", "min(x, z)"])
def test_functions_of_two_arguments(text, dtype):
    numbers = torch.tensor([*NUMBERS, -float("inf")], dtype=dtype)
    x, z = (t.reshape(1, -1).contiguous() for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    found = normc.compile(f"input z; {text}", backend="triton")(x, z=z)
    want = {"x**z": torch.pow, "max(x, z)": torch.maximum, "min(x, z)": torch.minimum}[text](x, z)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0, equal_nan=True)
    zero = (want == 0) & (text == "x**z")
    assert torch.equal(torch.signbit(found[zero]), torch.signbit(want[zero]))


def test_numbers_alone_and_comparisons():
    text = (
        "where(x < 0.1, log(2) + sqrt(eps), where(2 > 1, x, -x)) + tanh(0.25) + 2**x + gamma**0.5"
    )
    for error in compare(text, case_on(BY_NAME["tokens"], "float64"), "triton"):
        assert error.ok, error


# --- tensors of all kinds -------------------------------------------------------------------------


def test_parameters_of_another_dtype_and_expanded_tensors():
    x = torch.randn(1, 6, 1, 2).expand(3, 6, 4, 2).bfloat16().requires_grad_()
    v = torch.rand(1, requires_grad=True)
    given = {"v": v.expand(6), "gamma": torch.rand(12)[::2], "beta": torch.rand(6).double()}
    text = "x*sigmoid(v*x)/group_std(x)*gamma + beta"
    y = normc.compile(text, backend="triton")(x, groups=3, **given)
    wide = {name: t.detach().double() for name, t in given.items()}
    want = reference(text)(x.detach().double(), groups=3, **wide)
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().max() < 2e-2 * want.abs().max()
    y.float().sum().backward()
    assert v.grad is not None and v.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "layer_norm_tokens", "scale_norm"])
def test_an_empty_batch_has_zero_gradients(name):
    f = normc.zoo[name]
    x = torch.randn(0, 6, 3, 2, requires_grad=True)
    given = {p.name: torch.ones(6 if p.axes else (), requires_grad=True) for p in f.params}
    y = normc.compile(f, backend="triton")(x, groups=3, **given)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(t.grad is not None and not t.grad.any() for t in given.values())


def test_offsets_have_64_bits_where_a_tensor_needs_them():
    (job, _) = all_jobs(normc.zoo["evonorm_s0"], Target("triton", "bfloat16"))
    (kernel,) = job.plan.kernels
    for shape, index in (((64, 64, 512, 512), "int32"), ((128, 64, 512, 512), "int64")):
        case = Case(BY_NAME["channels-first"], shape, 32, "bfloat16", 0)
        n, c, s = prod(shape[1:]), prod(shape[2:]), 1
        steps = dict.fromkeys("xy", (n, c * case.geometry.k, c, s))
        (config,) = choose(job, kernel, case.geometry)
        found = main_launch(config, case.geometry, steps, 1e-5)
        assert found.constants["INDEX"] == index


def test_more_programs_than_a_gpu_can_number_are_refused():
    (job, _) = all_jobs(normc.zoo["dyt"], Target("triton", "float16"))
    case = Case(BY_NAME["rank 3"], (2**20, 2**13, 1), 1, "float16", 0)
    steps = dict.fromkeys("xy", (2**13, 2**13, 1, 1))
    (kernel,) = job.plan.kernels
    ((config,),) = small("streaming", 1)(job, kernel, case.geometry, None)
    with pytest.raises(normc.BackendError, match="programs"):
        main_launch(config, case.geometry, steps, 1e-5)


def test_the_source_is_a_file_that_a_person_can_open():
    (job, _) = all_jobs(normc.zoo["evonorm_s0"], Target("triton", "float32"))
    (kernel,) = job.plan.kernels
    schedule = choose(job, kernel, Geometry.of((4, 64, 14, 14), 8))
    with open(triton.module_of(job, schedule).__file__, encoding="utf-8") as file:
        assert file.read() == printed(job, [c.form for c in schedule])


def test_where_the_backend_runs():
    assert not triton.backend.why_not("float16", "cpu")
    assert "stores" in triton.backend.why_not("int32", "cpu")
    assert "not on meta" in triton.backend.why_not("float32", "meta")
    with pytest.raises(normc.BackendError, match="TRITON_INTERPRET"):
        triton.compile_ahead(all_jobs(normc.zoo["dyt"], Target("triton", "float32"))[0], "sm_90")
