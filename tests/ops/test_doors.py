"""Doors: which way into a computation is taken, and that whoever watches sees the right thing.

Watched are shapes and strides without data, the graphs that tracers make, and what torch.compile
and torch.export do with a layer. Compiled is with aot_eager: whatever holds for its graphs holds
for inductor's, which takes ten times longer.
"""

import io
from collections import Counter

import pytest
import torch
from torch import func, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import normc
from normc.language.geometry import Geometry
from normc.ops import doors
from normc.ops.recipe import Recipe
from tests.layers import LEADERS

pytestmark = [
    pytest.mark.cpu,
    # torch's own rules for jvp are TorchScript, loaded when the first tangent is asked for
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # torch's own decompositions ask about trees in a way that torch deprecates
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

WIDE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # of float64
SHAPE = (2, 4, 3, 2)
FEW = ["evonorm_s0", "batch_norm", "add_rms_norm", "ada_layer_norm", "dyt"]
IN_C = [(name, "c") for name in FEW]
TRACKED = [n for n, entry in normc.zoo.items() if "batch_" in entry.text]
OPERATORS = "normc::forward", "normc::backward"


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def tensors(f, shape=SHAPE, channel_dim=1):
    """One tensor per name, x first; parameters lie around one."""
    geometry = Geometry.of(shape, 2, channel_dim)
    given = {"x": randn(*shape)}
    for i, row in enumerate((*f.inputs, *f.params), start=1):
        given[row.name] = randn(*geometry.shape_of(row.axes), seed=i)
    return given | {p.name: 1 + 0.3 * given[p.name] for p in f.params}


def by_position(call, f, **how):
    """A call as a function of all its tensors in order."""
    names = list(tensors(f))
    return lambda *args: call(**dict(zip(names, args, strict=True)), **{"groups": 2, **how})


def both(name, backend="torch", **how):
    """The op, the oracle, and tensors for them."""
    f = normc.zoo[name] if name in normc.zoo else normc.parse(name)
    calls = normc.compile(f, backend=backend), normc.reference(f)
    return *(by_position(call, f, **how) for call in calls), tuple(tensors(f).values())


def results(found):
    return found if isinstance(found, tuple) else (found,)


def loss(found):
    return sum((y * (i + 1.5)).sin().sum() for i, y in enumerate(results(found)))


def step(call, args):
    """The results, and the gradients of all tensors."""
    args = [t.detach().requires_grad_() for t in args]
    found = results(call(*args))
    return *found, *torch.autograd.grad(loss(found), args)


# --- what normc asks of torch's private parts -----------------------------------------------------


def test_transforms_tell_that_they_are_active():
    seen = []

    def look(x):
        seen.append((torch._C._are_functorch_transforms_active(), doors.transformed()))
        return x

    look(torch.ones(1))
    for transform in (func.vmap(look), func.vmap(func.vmap(look)), func.jacfwd(look)):
        transform(torch.ones(1, 1))
    func.grad(lambda x: look(x).sum())(torch.ones(1))
    assert seen == [(False, False)] + [(True, True)] * 4 and not doors.transformed()


def test_forward_mode_has_a_level():
    assert forward_ad._current_level == -1 and not doors.transformed()
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0 and doors.transformed()
    assert forward_ad._current_level == -1 and not doors.transformed()


def test_modes_lie_on_a_stack():
    assert torch._C._len_torch_dispatch_stack() == 0 and not doors.watched()
    with FakeTensorMode(), Log():
        assert torch._C._len_torch_dispatch_stack() == 2 and doors.watched()
    assert not doors.watched()


def test_what_marks_a_constant_function():
    """traced.py sets the attribute itself, for the import behind the function takes a second."""
    marked = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(marked) == {"_dynamo_marked_constant": True}


# --- which door -----------------------------------------------------------------------------------


class Log(TorchDispatchMode):
    """Keeps the names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))

    @property
    def ours(self):
        return [name for name in self.seen if name.startswith("normc.")]


def profiled(call):
    """What torch's profiler has seen of ours: Functions and operators."""
    with torch.autograd.profiler.profile() as profile:
        call()
    known = {"Autograd", "AutogradBackward", "Functional", *OPERATORS}
    return {e.name for e in profile.function_events} & known


def watched_by_a_mode(op, args):
    with Log():
        op(*args)


def with_a_tangent(op, args):
    with forward_ad.dual_level():
        op(forward_ad.make_dual(args[0], args[0]), *args[1:])


def of_a_subclass(op, args):
    op(args[0].as_subclass(Named), *args[1:])


def wanting(args):
    return [t.clone().requires_grad_() for t in args]


DOORS = {
    "nobody": (lambda op, a: op(*a), set()),
    "no_grad": (lambda op, a: torch.no_grad()(op)(*wanting(a)), set()),
    "inference": (lambda op, a: torch.inference_mode()(op)(*wanting(a)), set()),
    "autograd": (lambda op, a: op(*wanting(a)), {"Autograd"}),
    "backward": (lambda op, a: step(op, a), {"Autograd", "AutogradBackward"}),
    "torch.func": (lambda op, a: func.grad(lambda *b: op(*b).sum())(*a), {"Functional"}),
    "forward mode": (with_a_tangent, {"Functional"}),
    "a mode": (watched_by_a_mode, {"normc::forward"}),
    "a subclass": (of_a_subclass, {"normc::forward"}),
    "meta": (lambda op, a: op(*[t.to("meta") for t in a]), set()),
}


@pytest.mark.parametrize("watcher", DOORS)
def test_each_watcher_has_its_door(watcher):
    op, _, args = both("evonorm_s0")
    call, want = DOORS[watcher]
    call(op, args)
    assert profiled(lambda: call(op, args)) == want


def test_compiled_code_calls_the_operators_and_nothing_else():
    op, _, args = both("evonorm_s0")
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    step(compiled, args)
    assert profiled(lambda: step(compiled, args)) == set(OPERATORS)


def test_a_door_is_chosen_anew_at_each_call():
    op, _, args = both("evonorm_s0")
    for watcher in ("nobody", "a mode", "torch.func", "nobody", "forward mode", "a mode", "nobody"):
        call, want = DOORS[watcher]
        assert profiled(lambda call=call: call(op, args)) == want, watcher


# --- tensors without data -------------------------------------------------------------------------

LAST = torch.channels_last
LAYOUTS = {
    "dense": lambda: randn(*SHAPE),
    "channels-last": lambda: randn(*SHAPE).contiguous(memory_format=LAST),
    "permuted": lambda: randn(2, 4, 2, 3).permute(0, 1, 3, 2),
    "batch innermost": lambda: randn(4, 3, 2, 2).movedim(-1, 0),
    "sliced": lambda: randn(2, 4, 3, 4)[..., ::2],
    "channels sliced": lambda: randn(2, 8, 3, 2)[:, ::2],
    "expanded": lambda: randn(1, 4, 1, 2).expand(SHAPE),
}


def described(found):
    """All that a tensor tells without its data; the devices of fakes are those they stand for."""
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in results(found)]


def faked(call, args, calls=step):
    """What a call gives for tensors of which there are only shapes."""
    with FakeTensorMode() as mode:
        return described(calls(call, [mode.from_tensor(t) for t in args]))


def on_meta(call, args):
    found = step(call, [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
                        for t in args])  # fmt: skip
    return [(*most, "cpu") for *most, _ in described(found)]


def assert_foretold(op, args):
    want = described(step(op, args))
    assert faked(op, args) == want
    return want


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, backend", [*[(name, "torch") for name in LEADERS], *IN_C])
def test_fakes_foretell_results_and_gradients(name, backend, layout):
    op, _, (_, *rest) = both(name, backend)
    x = LAYOUTS[layout]()
    more = [LAYOUTS[layout]() if t.shape == x.shape else t for t in rest]
    want = assert_foretold(op, (x, *more))
    if backend == "torch":
        assert on_meta(op, (x, *more)) == want


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(
    "shape, dim",
    [((3, 4), 1), ((3, 4), -1), ((2, 3, 4), -1), ((4, 2, 3), 0), ((2, 3, 4, 2), 2), ((0, 4, 3), 1)],
)
def test_fakes_foretell_any_shape(shape, dim, backend):
    f = normc.zoo["ada_layer_norm"]
    op = by_position(normc.compile(f, backend=backend), f, channel_dim=dim)
    assert_foretold(op, tuple(tensors(f, shape, dim).values()))


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(
    "full, small",
    [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float64")],
)
@pytest.mark.parametrize("name", ["evonorm_s0", "add_rms_norm"])
def test_fakes_foretell_dtypes(name, full, small, backend):
    op, _, args = both(name, backend)
    x = args[0]
    assert_foretold(op, [t.to(getattr(torch, full if t.shape == x.shape else small)) for t in args])


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "batch innermost"])
@pytest.mark.parametrize("name", FEW)
def test_fakes_foretell_derived_programs(name, layout):
    op, _, (_, *rest) = both(name)
    args = (LAYOUTS[layout](), *rest)
    dims = (0, *(None,) * len(rest))
    derived = {
        "jvp": (lambda *a: func.jvp(op, a, a)[1], args),
        "grad": (lambda *a: func.grad(lambda *b: loss(op(*b)))(*a), args),
        "vmap": (func.vmap(op, dims), (torch.stack([args[0]] * 3), *rest)),
    }
    for call, given in derived.values():
        assert faked(call, given, lambda c, a: c(*a)) == described(call(*given))


def layer(name, backend="torch", **how):
    """A layer whose parameters and running statistics have left their start."""
    made = normc.Layer(normc.zoo[name], 4, groups=2, dtype=WIDE, backend=backend, **how)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(1 + 0.3 * randn(*p.shape, seed=i))
        for i, r in enumerate(made.running):
            buffer = made.get_buffer(r.name)
            buffer.copy_(1 + 0.3 * randn(*buffer.shape, seed=i + 9).abs())
    return made


def inputs_of(module, shape=SHAPE, seed=0):
    """x, and the inputs beside it by name."""
    geometry = Geometry.of(shape, 2)
    rows = enumerate(module.formula.inputs, start=seed + 1)
    more = {row.name: randn(*geometry.shape_of(row.axes), seed=i) for i, row in rows}
    return randn(*shape, seed=seed), more


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRACKED)
def test_fakes_foretell_what_layers_do_to_their_buffers(name, training):
    module = layer(name).train(training)
    x, more = inputs_of(module)
    x = x.contiguous(memory_format=LAST)
    state = {n: t.detach() for n, t in module.state_dict().items()}

    def run(x, more, state):
        y = func.functional_call(module, state, (x,), more)
        return described((y, *state.values()))

    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(t) for k, t in more.items()}
        found = run(mode.from_tensor(x), fake, {k: mode.from_tensor(t) for k, t in state.items()})
    assert found == run(x, more, {k: t.clone() for k, t in state.items()})


# --- tracers and modes ----------------------------------------------------------------------------


def nodes(graph):
    """The nodes of a graph that are ours."""
    return [str(n.target) for n in graph.graph.nodes if str(n.target).startswith("normc.")]


def forward_and_backward(op):
    return lambda *args: step(op, args)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name, backend", [*[(name, "torch") for name in FEW], *IN_C])
def test_a_traced_step_holds_one_forward_and_one_backward(name, backend, mode):
    op, _, args = both(name, backend)
    run = forward_and_backward(op)
    graph = make_fx(run, tracing_mode=mode)(*args)
    assert nodes(graph) == ["normc.forward.default", "normc.backward.default"]
    others = [t.flip(0) + 0.1 for t in args]
    assert_close(graph(*others), run(*others), **EXACT)


def test_a_graph_of_symbolic_sizes_serves_other_sizes():
    op, oracle, args = both("evonorm_s0")
    graph = make_fx(forward_and_backward(op), tracing_mode="symbolic")(*args)
    args = [randn(5, 4, 2, 7), *args[1:]]
    assert_close(graph(*args), step(oracle, args), **EXACT)


TRANSFORMS = {
    "vmap": (func.vmap, ["normc.forward.default"]),
    "grad": (lambda op: func.grad(lambda *a: loss(op(*a))), ["normc.forward.default"] * 2),
    "jvp": (lambda op: lambda *a: func.jvp(op, a, a), ["normc.forward.default"] * 2),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_traced_transform_holds_its_derived_program(transform):
    op, oracle, args = both("evonorm_s0")
    make, want = TRANSFORMS[transform]
    args = [torch.stack([t, t + 0.1]) for t in args] if transform == "vmap" else args
    graph = make_fx(make(op))(*args)
    assert nodes(graph) == want
    others = [t.flip(0) + 0.1 for t in args]
    assert_close(graph(*others), make(oracle)(*others), **EXACT)


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", FEW)
def test_a_mode_sees_one_forward_and_one_backward(name, backend):
    op, _, args = both(name, backend)
    with Log() as log:
        found = step(op, args)
    assert log.ours == ["normc.forward.default", "normc.backward.default"]
    assert_close(found, step(op, args), **EXACT)


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_a_mode_sees_a_backward_whose_forward_it_has_not_seen(backend):
    """Kernels write where no tracer looks: it would keep memory that nothing has filled."""
    op, _, args = both("evonorm_s0", backend)
    args = wanting(args)
    y = op(*args)
    with Log() as log:
        torch.autograd.grad(loss(y), args)
    assert len(log.ours) == 1


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_a_traced_backward_computes_what_backward_does(backend):
    op, _, args = both("evonorm_s0", backend)
    args = wanting(args)
    y = op(*args)

    def pull(cotangent):
        return torch.autograd.grad(y, args, cotangent, retain_graph=True)

    graph = make_fx(pull)(randn(*SHAPE, seed=3))
    other = randn(*SHAPE, seed=4)
    assert_close(graph(other), pull(other), **EXACT)


@pytest.mark.parametrize("name", LEADERS)
def test_flops_are_counted(name):
    op, _, args = both(name)
    with FlopCounterMode(display=False) as counter:
        found = step(op, args)
    assert_close(found, step(op, args), **EXACT)
    assert counter.get_total_flops() > 0


class Named(torch.Tensor):
    """A subclass that does what the default does, and counts."""

    calls = Counter()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls[getattr(function, "__name__", str(function))] += 1
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_subclass_goes_in_and_comes_out(which, backend):
    op, oracle, args = both("evonorm_s0", backend)
    given = [t.as_subclass(Named) if i == which else t for i, t in enumerate(args)]
    Named.calls.clear()
    found = op(*given)
    assert type(found) is Named and Named.calls
    assert_close(found.as_subclass(torch.Tensor), oracle(*args), **EXACT)
    grads = [t.as_subclass(torch.Tensor) for t in step(op, given)]
    assert_close(grads, [*step(oracle, args)], **EXACT)


def test_a_layer_takes_a_subclass():
    module = layer("batch_norm")
    x = randn(*SHAPE)
    twin = layer("batch_norm")
    found = module(x.as_subclass(Named))
    assert_close(found.as_subclass(torch.Tensor), twin(x), **EXACT)
    assert_close(dict(module.state_dict()), dict(twin.state_dict()), **EXACT)


CHECKED = [
    ("batch_norm", "track"),
    ("batch_norm", "frozen"),
    ("add_rms_norm", "batch"),
    ("x", "batch"),  # no result may share memory with x, nor with another
    ("x*2, x*2", "batch"),
    ("beta + 0*x", "batch"),
]


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("text, mode", CHECKED)
def test_the_operator_is_what_torch_demands_of_operators(text, mode, backend):
    """Its schema is true, its fake foretells, and its gradients pass through AOTAutograd."""
    f = normc.zoo[text] if text in normc.zoo else normc.parse(text)
    given = tensors(f)
    running = Recipe(f, tuple(given), mode).programs().running if mode == "frozen" else ()
    given |= {r.stat: 1 + randn(4, seed=i).abs() for i, r in enumerate(running)}
    recipe = Recipe(f, tuple(given), mode, backend)
    wrt = " ".join(name for name in given if name not in {r.stat for r in running})
    args = [t.requires_grad_(name in wrt.split()) for name, t in given.items()]
    found = torch.library.opcheck(OPERATOR, (args, recipe.text, wrt, 2, 1, 1e-5))
    assert set(found.values()) == {"SUCCESS"}


OPERATOR = torch.ops.normc.forward.default


# --- torch.export ---------------------------------------------------------------------------------


def reloaded(program):
    """An exported program as it comes back from a file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name, backend", [("batch_norm", "torch"), ("evonorm_b0", "c")])
def test_an_exported_layer_is_saved_and_loaded(name, backend, strict):
    net = nn.Sequential(nn.Conv2d(3, 4, 2, dtype=WIDE), layer(name, backend), nn.Flatten()).eval()
    x = randn(5, 3, 4, 3)
    sizes = ({0: Dim("batch", min=1, max=64)},)
    program = torch.export.export(net, (x,), dynamic_shapes=sizes, strict=strict)
    assert nodes(program.graph_module) == ["normc.forward.default"]
    loaded = reloaded(program)
    for batch in (5, 2, 1, 17):
        x = randn(batch, 3, 4, 3, seed=batch)
        assert_close(loaded.module()(x), net(x), **EXACT)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_has_inputs_and_several_results(strict):
    module = layer("add_rms_norm").eval()
    x, more = inputs_of(module)
    program = torch.export.export(module, (x,), more, strict=strict)
    assert_close(reloaded(program).module()(x, **more), module(x, **more), **EXACT)


def test_a_decomposed_program_still_holds_the_operator():
    module = layer("batch_norm").eval()
    program = torch.export.export(module, (randn(*SHAPE),)).run_decompositions()
    assert nodes(program.graph_module) == ["normc.forward.default"]
    x = randn(*SHAPE, seed=5)
    assert_close(program.module()(x), module(x), **EXACT)


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh():
    """No test takes over what another has compiled."""
    yield
    torch._dynamo.reset()


def compiled(call, **how):
    return torch.compile(call, backend="aot_eager", fullgraph=True, **how)


def train(module, call, steps=3):
    """Results and gradients of some steps of training."""
    found = []
    for i in range(steps):
        x, more = inputs_of(module, seed=i)
        every = [x.requires_grad_(), *more.values(), *module.parameters()]
        more = {n: t.requires_grad_() for n, t in more.items()}
        y = results(call(x, **more))
        found.append([*y, *torch.autograd.grad(loss(y), every)])
    return found


TRAINED = [
    ("batch_norm", "c", 0.1),
    ("batch_norm", "torch", None),
    ("spade", "torch", 0.1),
    ("switchable_norm", "torch", None),
]


@pytest.mark.parametrize("name, backend, momentum", TRAINED)
def test_a_compiled_layer_trains_as_eager_does(name, backend, momentum):
    one, other = (layer(name, backend, momentum=momentum) for _ in range(2))
    assert_close(train(one, compiled(one)), train(other, other), **EXACT)
    assert_close(dict(one.state_dict()), dict(other.state_dict()), **EXACT)
    assert one.num_batches_tracked == 3
    x, more = inputs_of(one, seed=9)
    assert_close(compiled(one.eval())(x, **more), other.eval()(x, **more), **EXACT)


@pytest.mark.parametrize("name, backend", [("evonorm_s0", "c"), ("add_rms_norm", "torch")])
def test_a_compiled_layer_without_buffers_trains_as_eager_does(name, backend):
    one, other = (layer(name, backend) for _ in range(2))
    assert_close(train(one, compiled(one)), train(other, other), **EXACT)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["c", "torch"])
def test_compiled_without_gradients(backend, mode):
    one, other = layer("batch_norm", backend), layer("batch_norm", backend)
    x, call = randn(*SHAPE), compiled(one)
    with mode():
        found = call(x)
    assert_close(found, other(x).detach(), **EXACT)
    assert found.is_inference() == (mode is torch.inference_mode) and not found.requires_grad
    assert_close(dict(one.state_dict()), dict(other.state_dict()), **EXACT)
    assert call(x).requires_grad, "a call outside is compiled anew"


def test_a_graph_holds_one_node():
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    op, oracle, args = both("evonorm_s0")
    found = torch.compile(op, backend=keep, fullgraph=True)(*args)
    (graph,) = graphs
    assert nodes(graph) == ["normc.forward"]
    used = [n for n in graph.graph.nodes if n.op == "call_function" and n.users]
    assert len(used) == 2, "the operator, and the first of what it returns"
    assert_close(found, oracle(*args), **EXACT)


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_sizes_may_change_and_groups_follow_the_channels(backend):
    f = normc.parse("x*sigmoid(v*x)/group_std(x)")
    op, oracle = normc.compile(f, backend=backend), normc.reference(f)
    call = compiled(lambda x, v: op(x, v=v), dynamic=True)
    for shape in [(2, 48, 3), (3, 48, 5), (4, 37, 5)]:
        args = randn(*shape), randn(shape[1], seed=1)
        found, want = (step(c, args) for c in (call, lambda x, v: oracle(x, v=v)))
        assert_close(found, want, **EXACT)


@pytest.mark.parametrize("key, values", [("eps", (1e-5, 1e-3)), ("groups", (2, 4)),
                                         ("channel_dim", (0, 1, -1))])  # fmt: skip
def test_options_may_be_arguments_of_compiled_code(key, values):
    op, oracle = normc.compile("x/group_rms(x)"), normc.reference("x/group_rms(x)")
    call, x = compiled(lambda x, value: op(x, **{key: value}), dynamic=True), randn(2, 4, 3)
    for value in values:
        assert_close(call(x, value), oracle(x, **{key: value}), **EXACT)


def test_a_batch_of_any_size_is_compiled_once():
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    op, oracle, args = both("evonorm_s0")
    call = torch.compile(op, backend=keep, fullgraph=True, dynamic=True)
    for batch in (6, 5, 8):  # no other size is 6: equal ones are taken to stay equal
        x = randn(batch, 4, 3, 2)
        assert_close(call(x, *args[1:]), oracle(x, *args[1:]), **EXACT)
    assert len(graphs) == 1


WRONG = {
    "shape": (dict(v=torch.ones(3)), r"`v\[c\]` must have shape"),
    "missing": (dict(v=None), "`v` is missing"),
    "unknown": (dict(vv=torch.ones(4)), "no tensor `vv`"),
    "dtype": (dict(v=torch.ones(4, dtype=torch.int64)), "`v` must be floating point"),
    "rank": (dict(x=torch.ones(4)), "2 to 5 dimensions"),
    "groups": (dict(groups=3), "groups=3 does not divide"),
    "channel_dim": (dict(channel_dim=5), "channel_dim=5 is not a dimension"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_under_compile(case):
    change, message = WRONG[case]
    given = {"x": torch.ones(2, 4, 3), "v": torch.ones(4), **change}
    given = {name: t for name, t in given.items() if t is not None}
    op = normc.compile("x*sigmoid(v*x)/group_std(x)", backend="torch")
    with pytest.raises(normc.ShapeError, match=message):
        op(**given)
    with pytest.raises(Exception, match=message):
        compiled(lambda: op(**given))()


def test_a_wrong_number_of_channels_is_named_under_compile():
    with pytest.raises(Exception, match="the layer was made for 4"):
        compiled(layer("batch_norm"))(randn(2, 5, 3, 3))


COMPOSED = {  # torch.func inside of torch.compile
    "grad": lambda op: func.grad(lambda *a: loss(op(*a))),
    "grad and value": lambda op: func.grad_and_value(lambda *a: loss(op(*a))),
    "vmap": lambda op: (
        lambda x, *a: func.vmap(op, (0, *(None,) * len(a)))(torch.stack([x, 2 * x]), *a)
    ),
    "jvp": lambda op: lambda *a: func.jvp(op, a, a),
    "vmap of grad": lambda op: (
        lambda x, *a: func.vmap(lambda x: func.grad(lambda x: loss(op(x, *a)))(x))(
            torch.stack([x, 2 * x])
        )
    ),
    "jacrev": lambda op: func.jacrev(op),
    "jacfwd": lambda op: func.jacfwd(op),
}


@pytest.mark.parametrize(
    "name, transform",
    [*[("evonorm_s0", how) for how in COMPOSED], ("batch_norm", "vmap"), ("batch_norm", "jvp")],
)
def test_a_compiled_transform_equals_the_oracles(name, transform):
    op, oracle, args = both(name)
    make = COMPOSED[transform]
    assert_close(compiled(make(op))(*args), make(oracle)(*args), **EXACT)


@pytest.mark.parametrize("name", ["add_rms_norm", "ada_layer_norm", "grn", "evonorm_b0"])
def test_a_compiled_gradient_has_inputs_and_several_results(name):
    op, oracle, args = both(name)
    make = COMPOSED["grad"]
    assert_close(compiled(make(op))(*args), make(oracle)(*args), **EXACT)


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_a_compiled_gradient_of_channels_anywhere(dim):
    shape = [2, 3, 5]
    shape[dim] = 4
    f = normc.zoo["ada_layer_norm"]
    args = tuple(tensors(f, shape, dim).values())
    op, oracle = (by_position(c(f), f, channel_dim=dim) for c in (normc.compile, normc.reference))
    make = COMPOSED["grad"]
    assert_close(compiled(make(op))(*args), make(oracle)(*args), **EXACT)


def test_compiled_under_autocast():
    op = normc.compile("input r; h = x + r; h/channel_rms(h)*gamma, h", backend="torch")
    x, r, gamma = torch.randn(2, 4, 3), torch.randn(2, 4, 3).bfloat16(), torch.ones(4)

    def call():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op(x, r=r, gamma=gamma)

    assert_close(compiled(call)(), call())
