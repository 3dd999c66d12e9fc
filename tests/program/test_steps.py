"""Steps: derived programs, evaluated as the programs they are, against torch.func on the oracle.

No backend takes part: `evaluate` goes through a program statistic by statistic. So what fails here
is a derivation, and what fails in tests/ops/test_transforms.py only is how it is run.
"""

from itertools import combinations
from math import prod

import pytest
import torch
from torch import func
from torch.testing import assert_close

import normc
from normc.language.axes import Axis, show
from normc.language.expr import reduce, variables
from normc.language.geometry import Geometry
from normc.language.reductions import counted
from normc.ops import recipe
from normc.ops.recipe import Recipe
from normc.pipeline import staged
from normc.program import interpret
from normc.program.program import verify
from normc.program.running import levels
from normc.program.steps import Step, cotangent, crosses, take, tangent
from normc.program.tidy import tidy

# torch's own rules for jvp are TorchScript, loaded when the first tangent is asked for
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)

WIDE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # of float64
GEOMETRY = Geometry.of((3, 4, 2, 3), 2)
ONE = Geometry.of((1, 4, 2, 3), 2)
EPS = 1e-5
ROWS = list(normc.zoo)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def formula(name):
    return normc.zoo[name] if name in normc.zoo else normc.parse(name)


def axes_of(f):
    """The axes of each tensor of a formula, x first."""
    return Recipe(f, ("x", *(row.name for row in (*f.inputs, *f.params)))).axes


def tensors(f, geometry=GEOMETRY, lead=()):
    """One tensor per name; parameters lie around one, so that no cancellation hides a mistake."""
    learned = {p.name for p in f.params}
    made = {
        name: randn(*lead, *geometry.shape_of(axes), seed=i)
        for i, (name, axes) in enumerate(axes_of(f).items())
    }
    return {name: 1 + 0.3 * t if name in learned else t for name, t in made.items()}


def directions(given, along):
    return {name: randn(*given[name].shape, seed=40 + i) for i, name in enumerate(along)}


# --- programs as they are -------------------------------------------------------------------------


def evaluate(program, given, geometry=GEOMETRY):
    """The outputs of a program, in the user's shapes."""
    verify(program)
    axes = {i.name: i.axes for i in program.inputs}
    known = {name: unfolded(given[name], axes[name], geometry) for name in axes}
    known |= {v.name: geometry.count(counted(v)) for v in variables(program.exprs)
              if v.name.startswith("|")}  # fmt: skip
    known["eps"] = EPS
    for s in program.stats:
        whole = reduce(s.op, s.over, s.arg)
        known[s.name] = interpret.evaluate(whole, known, sizes=geometry.sizes())
    found = interpret.evaluate_all([o.expr for o in program.outputs], known)
    pairs = zip(program.outputs, found, strict=True)
    return {o.name: folded(torch.as_tensor(value), o.axes, geometry) for o, value in pairs}


def unfolded(tensor, axes, geometry):
    """A tensor over (N, G, K, S), with 1 for the axes it lacks; channels are dimension 1."""
    return tensor.reshape(geometry.sizes(axes)).numpy()


def folded(value, axes, geometry):
    return value.broadcast_to(geometry.sizes(axes)).reshape(geometry.shape_of(axes))


def derived(f, *steps, mode="batch"):
    """What a formula computes after steps, and what that should be in words."""
    return staged(f.definition, mode, tuple(Step(kind, tuple(names)) for kind, names in steps))[0]


def oracle(f):
    """The reference as a function of all tensors by name."""
    call = normc.reference(f)
    return lambda given: results(call(**given, groups=2, eps=EPS))


def results(found):
    return found if isinstance(found, tuple) else (found,)


def pushed(call, given, along):
    """The tangents of the results along directions of some tensors."""
    rest = {name: t for name, t in given.items() if name not in along}
    some = {name: given[name] for name in along}
    return func.jvp(lambda t: call({**rest, **t}), (some,), (along,))[1]


def pulled(call, given, wrt, cotangents):
    """The gradients of some tensors."""
    rest = {name: t for name, t in given.items() if name not in wrt}
    found = func.vjp(lambda t: call({**rest, **t}), {name: given[name] for name in wrt})
    return found[1](tuple(cotangents))[0]


def read(f, names):
    """Those of the names on which the formula depends."""
    return [n for n in names if n in {i.name for i in derived(f).source.inputs}]


# --- vjp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_the_oracles(name):
    """As a step, from inputs and cotangents alone: without what forward could have saved."""
    f = formula(name)
    given, wrt = tensors(f), read(f, axes_of(f))
    stage = derived(f, ("vjp", wrt))
    cotangents = [randn(*GEOMETRY.shape_of(), seed=60 + i) for i in range(count(f))]
    want = pulled(oracle(f), given, wrt, cotangents)
    known = given | arriving(f, cotangents) | past(f, given)
    assert_close(evaluate(stage.source, known), {f"grad1_{n}": t for n, t in want.items()}, **EXACT)
    assert stage.results == tuple(f"grad1_{n}" for n in wrt) and stage.level == 1


def count(f):
    return len(f.definition.results)


def arriving(f, cotangents):
    return dict(zip(map(cotangent, derived(f).results), cotangents, strict=True))


def past(f, given):
    """The results, as a gradient may ask for them."""
    names = derived(f).results
    return {f"past0_{n}": t for n, t in zip(names, oracle(f)(given), strict=True)}


def test_a_gradient_reads_a_result_in_place_of_the_tensors_it_was_made_of():
    stage = derived(formula("add_rms_norm"), ("vjp", ["x", "residual", "gamma"]))
    assert {i.name for i in stage.source.inputs} == {"past0_y1", "gamma", "d_y0", "d_y1"}


# --- jvp ------------------------------------------------------------------------------------------


def subsets(f):
    """x alone, each other tensor alone, all but x, and all."""
    names = read(f, axes_of(f))
    return list(dict.fromkeys([*((n,) for n in names), tuple(names[1:]), tuple(names)]))


@pytest.mark.parametrize("name", ROWS)
def test_tangents_are_the_oracles(name):
    f = formula(name)
    given = tensors(f)
    for along in filter(None, subsets(f)):
        moves = directions(given, along)
        stage = derived(f, ("jvp", along))
        known = given | {tangent(0, n): t for n, t in moves.items()}
        want = pushed(oracle(f), given, moves)
        found = evaluate(stage.source, known)
        assert_close(tuple(found.values()), want, **EXACT)
        assert tuple(found) == stage.results == tuple(f"push1_{n}" for n in derived(f).results)


@pytest.mark.parametrize("name", ROWS)
def test_tangents_read_inputs_and_tangents_only(name):
    f = formula(name)
    names = read(f, axes_of(f))
    for along in filter(None, subsets(f)):
        inputs = {i.name for i in derived(f, ("jvp", along)).source.inputs}
        assert inputs <= {*names, *(tangent(0, n) for n in along)}
        assert {tangent(0, n) for n in along} <= inputs, "every one of them has a say"


@pytest.mark.parametrize("name", ROWS)
def test_tangents_are_linear_in_those_that_go_in(name):
    f = formula(name)
    given, names = tensors(f), read(f, axes_of(f))
    program = tidy(derived(f, ("jvp", names)).source)
    one, other = (
        {tangent(0, n): randn(*given[n].shape, seed=start + i) for i, n in enumerate(names)}
        for start in (40, 80)
    )
    first, second, both = (
        evaluate(program, given | moves)
        for moves in (one, other, {n: 2 * one[n] - other[n] for n in one})
    )
    for key, value in both.items():
        assert_close(value, 2 * first[key] - second[key], **EXACT)


# Forward's own, its mean where only the variance was asked for, and one per derivative of each.
STATISTICS = {
    "dyt": 0,
    "rms_norm": 1 + 1,
    "pixel_norm": 1 + 1,
    "scale_norm": 1 + 1,
    "frn_tlu": 1 + 1,
    "evonorm_s0": 1 + 1 + 1,
    "batch_norm": 2 + 2,
    "layer_norm": 2 + 2,
    "group_norm": 2 + 2,
    "adain": 2 + 2,
    "evonorm_b0": 2 + 2 + 2,
    "grn": 2 + 2,
    "add_rms_norm": 1 + 1,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_tangent_takes_as_many_statistics_as_by_hand(name):
    program = tidy(derived(formula(name), ("jvp", ["x"])).source)
    assert len(program.stats) == STATISTICS[name]


@pytest.mark.parametrize("name", ["evonorm_s0", "batch_norm", "layer_norm"])
def test_golden_tangents(name, golden):
    f = formula(name)
    texts = [tidy(derived(f, ("jvp", along)).source).show() for along in (["x"], [*axes_of(f)])]
    golden(name, "\n\n".join(texts) + "\n")


# --- one after another ----------------------------------------------------------------------------

TWICE = ["evonorm_s0", "evonorm_b0", "batch_norm", "add_rms_norm", "grn"]


def second(f, first, names):
    """Those of the names on which the program after a first step depends."""
    reads = {i.name for i in derived(f, first).source.inputs}
    return [n for n in names if n in reads]


@pytest.mark.parametrize("name", TWICE)
def test_a_tangent_of_a_tangent(name):
    f = formula(name)
    given, names = tensors(f), read(f, axes_of(f))
    first = "jvp", names
    moves, again = directions(given, names), second(f, first, names)
    turns = {n: randn(*given[n].shape, seed=90 + i) for i, n in enumerate(again)}
    stage = derived(f, first, ("jvp", again))
    known = given | {tangent(0, n): t for n, t in moves.items()}
    known |= {tangent(1, n): t for n, t in turns.items()}
    want = pushed(lambda now: pushed(oracle(f), now, moves), given, turns)
    assert_close(tuple(evaluate(stage.source, known).values()), want, **EXACT)
    assert stage.results == tuple(f"push2_push1_{n}" for n in derived(f).results)


@pytest.mark.parametrize("name", TWICE)
def test_a_gradient_of_a_tangent(name):
    f = formula(name)
    given, names = tensors(f), read(f, axes_of(f))
    first = "jvp", names
    moves, wrt = directions(given, names), second(f, first, names)
    cotangents = [randn(*GEOMETRY.shape_of(), seed=60 + i) for i in range(count(f))]
    stage, results = derived(f, first, ("vjp", wrt)), derived(f, first).results
    known = given | {tangent(0, n): t for n, t in moves.items()}
    known |= dict(zip(map(cotangent, results), cotangents, strict=True))
    ahead = zip(results, pushed(oracle(f), given, moves), strict=True)
    known |= {f"past1_{n}": t for n, t in ahead}
    want = pulled(lambda now: pushed(oracle(f), now, moves), given, wrt, cotangents)
    assert_close(evaluate(stage.source, known), {f"grad2_{n}": want[n] for n in wrt}, **EXACT)


@pytest.mark.parametrize("name", [n for n in TWICE if n != "add_rms_norm"])
def test_a_tangent_of_a_gradient(name):
    """The cotangents stand still. (Where a gradient reads a result, this moves too.)"""
    f = formula(name)
    given, names = tensors(f), read(f, axes_of(f))
    first = "vjp", names
    along = second(f, first, names)
    moves = directions(given, along)
    cotangents = [randn(*GEOMETRY.shape_of(), seed=60 + i) for i in range(count(f))]
    stage = derived(f, first, ("jvp", along))
    known = given | arriving(f, cotangents) | {tangent(1, n): t for n, t in moves.items()}
    want = pushed(lambda now: pulled(oracle(f), now, names, cotangents), given, moves)
    want = {f"push2_grad1_{n}": want[n] for n in names}
    assert_close(evaluate(stage.source, known), want, **EXACT)


# --- vmap -----------------------------------------------------------------------------------------

CROSSING = {
    "x": False,
    "x/layer_rms(x)": False,
    "x*sigmoid(v*x)/group_std(x)": False,
    "x - instance_mean(x)": False,
    "input w[n,c]; x*w/instance_max(x)": False,
    "mean[c,s](x)*x": False,
    "x - batch_mean(x)": True,
    "x - mean[n](x)": True,
    "x/all_max(abs(x))": True,
    "sum[n](instance_mean(x))": True,
    "x/batch_group_std(x)": True,
    "x*batch_sum(1)": True,  # how many samples there are
    "x*instance_sum(1)": False,
    "input w[n,c]; x - w + batch_mean(w)": True,
    "gamma*batch_mean(gamma)*x": False,  # of what has no samples: gamma itself
}


@pytest.mark.parametrize("text", CROSSING)
def test_what_crosses_samples(text):
    assert crosses(derived(normc.parse(text)).source) == CROSSING[text]


@pytest.mark.parametrize("name", ROWS)
def test_a_formula_crosses_if_it_has_running_statistics(name):
    stage, rows = staged(formula(name).definition, "batch", ())
    assert crosses(stage.source) == bool(rows)
    frozen = staged(formula(name).definition, "frozen", ())[0]
    assert not crosses(frozen.source), "frozen statistics are tensors like others"


def test_gradients_of_parameters_cross_and_that_of_x_does_not():
    f = formula("evonorm_s0")
    assert not crosses(derived(f, ("vjp", ["x"])).source)
    assert crosses(derived(f, ("vjp", ["gamma"])).source)
    assert not crosses(derived(f, ("jvp", ["x", "gamma"])).source)


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_of_single_samples_crosses_nothing(name):
    """Every statistic loses N, every tensor of the batch gains it, and so do the results."""
    f = formula(name)
    gain = read(f, axes_of(f))
    stage = derived(f, ("vmap", gain))
    assert all(i.axes & Axis.N for i in stage.source.inputs)
    assert not any(s.over & Axis.N for s in stage.source.stats) and not crosses(stage.source)
    batch = 3
    whole = tensors(f, ONE, lead=(batch,))
    found = evaluate(stage.source, joined(f, whole, batch), GEOMETRY)
    want = func.vmap(oracle(f))(whole)
    assert_close(tuple(t[:, None] for t in found.values()), want, **EXACT)
    assert stage.results == derived(f).results and stage.level == 0


def joined(f, whole, samples):
    """Tensors whose first dimension counts a batch of one sample each."""
    shape = Geometry.of((samples, *ONE.shape_of()[1:]), 2)
    return {n: whole[n].reshape(shape.shape_of(axes | Axis.N)) for n, axes in axes_of(f).items()}


@pytest.mark.parametrize("name", [n for n in ROWS if "batch_" not in normc.zoo[n].text])
def test_a_batch_of_samples_joins_them(name):
    f = formula(name)
    names = read(f, axes_of(f))
    for gain in filter(None, [("x",), tuple(names[1:]), tuple(names)]):
        stage = derived(f, ("vmap", gain))
        axes = {i.name: i.axes for i in stage.source.inputs}
        assert axes == {n: axes_of(f)[n] | (Axis.N if n in gain else Axis(0)) for n in names}
        samples = Geometry.of((6, 4, 2, 3), 2)
        whole = tensors(f, GEOMETRY, lead=(2,))
        given = {n: t if n in gain else t[0] for n, t in whole.items()}
        dims = ({n: 0 if n in gain else None for n in whole},)
        want = func.vmap(oracle(f), dims)(given)
        found = evaluate(stage.source, {n: spread(given[n], axes_of(f)[n], n in gain, samples)
                                        for n in names}, samples)  # fmt: skip
        assert_close(tuple(t.unflatten(0, (2, 3)) for t in found.values()), want, **EXACT)


def spread(tensor, axes, batched, samples):
    """A tensor over two times three samples."""
    if not batched:
        return tensor if not axes & Axis.N else tensor.repeat(2, *[1] * (tensor.dim() - 1))
    if axes & Axis.N:
        return tensor.flatten(0, 1)
    return tensor.repeat_interleave(3, 0).reshape(samples.shape_of(axes | Axis.N))


def test_one_sample_counts_as_one():
    program = derived(normc.parse("x*batch_sum(1) + all_sum(1)"), ("vmap", ["x"])).source
    counts = {v.name for v in variables(program.exprs) if v.name.startswith("|")}
    assert counts == {"|S|", "|GKS|"}


def test_a_variance_of_one_element_is_zero():
    """With one sample, what is left of a statistic over samples alone is its value for one."""
    for text in ("x*var[n](x)", "x + max[n](x)", "x + mean[n](x)"):
        f = normc.parse(text)
        program = derived(f, ("vmap", ["x"])).source
        assert not program.stats
        x = randn(*GEOMETRY.shape_of())
        want = {"x*var[n](x)": x * 0}.get(text, 2 * x)
        assert_close(evaluate(program, {"x": x})["y"], want, **EXACT)


# --- names ----------------------------------------------------------------------------------------

NEEDED = [
    ("tangent0_x", [("jvp", ["x"])]),
    ("past0_y", [("vjp", ["x"])]),
    ("tangent1_x", [("jvp", ["x"]), ("jvp", ["x"])]),
    ("past1_grad1_x", [("vjp", ["x"]), ("vjp", ["x"])]),
    ("d_d_x", [("jvp", ["x"])]),
    ("d_grad1_x", [("vjp", ["x"]), ("vjp", ["x"])]),
]


@pytest.mark.parametrize("taken, steps", NEEDED)
def test_a_tensor_called_like_what_a_step_needs_is_named(taken, steps):
    f = normc.parse(f"x*sigmoid({taken}*x)")
    with pytest.raises(normc.NormcError, match=f"`{taken}`.*rename"):
        derived(f, *steps)


def test_a_cotangent_that_is_taken_is_named():
    """A formula's own results are never called so that it is; those of a stage may be."""
    stage = derived(normc.parse("x*sigmoid(d_y*x)"))
    assert stage.results == ("out",)
    (out,) = stage.source.outputs
    source = type(stage.source)(stage.source.inputs, (), (type(out)("y", out.axes, out.expr),))
    with pytest.raises(normc.NormcError, match="`d_y`.*rename"):
        take(type(stage)(source, ("y",)), Step("vjp", ("x",)))


MADE = [
    ("grad1_x", "batch", [("vjp", ["x"])]),
    ("push1_y", "batch", [("jvp", ["x"])]),
    ("s0_now", "track", []),  # the batch's own value of a running statistic
]


@pytest.mark.parametrize("taken, mode, steps", MADE)
def test_a_tensor_called_like_an_output_is_named_or_the_output_called_otherwise(taken, mode, steps):
    """Else whoever looks up one by its name finds the other."""
    f = normc.parse(f"x*sigmoid({taken}*(x - batch_mean(x)))")
    try:
        source = derived(f, *steps, mode=mode).source
    except normc.NormcError as error:
        assert f"`{taken}`" in str(error)
    else:
        assert {i.name for i in source.inputs}.isdisjoint(o.name for o in source.outputs)


# --- recipes as text ------------------------------------------------------------------------------


def modes(f):
    rows = Recipe(f, ("x",)).programs().running
    source = derived(f).source
    local = [f"local{i}" for i in range(len(levels(source, rows)))]
    return ["batch", *(["track", "frozen", *local] if rows else [])]


def plans(names):
    """Steps, alone and one after another."""
    kinds = ("vjp", "jvp", "vmap")
    some = [(), *[(k,) for k in kinds], *[(a, b) for a in kinds for b in kinds]]
    return [tuple(Step(kind, names) for kind in kinds) for kinds in some]


def can_be_taken(f, mode, steps):
    """Whether what each step derives by is still read where it is taken."""
    for i, step in enumerate(steps):
        read = {v.name for v in staged(f.definition, mode, steps[:i])[0].source.inputs}
        if step.kind != "vmap" and not read.issuperset(step.names):
            return False
    return True


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_read_from_its_text(name):
    f = formula(name)
    names = tuple(axes_of(f))
    for mode in modes(f):
        for wrt in combinations(names, 1):
            for steps in plans(wrt):
                if not can_be_taken(f, mode, steps):
                    continue
                one = Recipe(f, names, mode, "c", steps)
                assert recipe.read(one.text) == one and recipe.read(one.text).text == one.text
    assert recipe.read(Recipe(f, names).text).formula.name == name


@pytest.mark.parametrize(
    "text", ["x", "h = x*v\n(h +\n 2)\n", "param v[c] = 0.5; h = x*v; h, x", "x*d_y"]
)
def test_a_recipe_of_any_formula_is_read_from_its_text(text):
    f = normc.parse(text)
    one = Recipe(f, tuple(axes_of(f))).then("vjp", ("x",), ("x", "d_y"))
    assert recipe.read(one.text) == one


WRONG = {
    "nothing": ("", "no recipe"),
    "a formula alone": ("x*2", "no recipe"),
    "too few fields": ("edition|batch|auto||x\nx", "no recipe"),
    "too many fields": ("edition|batch|auto||x||\nx", "no recipe"),
    "no formula": ("edition|batch|auto||x|", "formula is empty"),
    "a formula that ends": ("edition|batch|auto||x|\nx*", "ends in the middle"),
    "no mode": ("edition||auto||x|\nx", "no mode"),
    "an unknown mode": ("edition|bath|auto||x|\nx", "no mode 'bath'"),
    "a mode that ends in code": ("edition|local0;x|auto||x|\nx", "no mode"),
    "an unknown step": ("edition|batch|auto||x|vjq x\nx", "no step is called 'vjq'"),
    "an empty step": ("edition|batch|auto||x| \nx", "step"),
    "Python": ("edition|batch|auto||x|\n__import__('os').abort()", "name starts with a letter"),
    "a call": ("edition|batch|auto||x|\nabort()", "abort"),
    "a step in Python": ("edition|batch|auto||x|__import__('os').abort() x\nx", "no step"),
    "no level": ("edition|local7|auto||x|\nx - batch_mean(x)", "local7"),
    "no levels": ("edition|local0|auto||x|\nx", "local0"),
    "a step along nothing": ("edition|batch|auto||x|vjp\nx", "vjp"),
    "a step along what is not there": ("edition|batch|auto||x|vjp zz\nx", "zz"),
    "a tangent of what is not there": ("edition|batch|auto||x|jvp zz\nx", "zz"),
    "a second step from nowhere": ("edition|batch|auto||x d_y|vjp x;vjp q\nx", "q"),
    "a tensor twice": ("edition|batch|auto||x x|\nx", "x"),
    "no x": ("edition|batch|auto||gamma|\nx*gamma", "x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_recipe_is_told(case):
    """Texts come out of files: whatever they hold is an error of ours, and nothing is executed."""
    text, message = WRONG[case]
    with pytest.raises(normc.NormcError, match=message):
        asked = recipe.read(text)
        assert asked.stage and asked.axes and asked.full is not None


def test_axes_of_every_step_are_known():
    """What a derived recipe takes has the axes of what it belongs to, read or not."""
    f = formula("evonorm_s0")
    names = ("x", "v", "gamma", "beta")
    given = (*names, *(tangent(0, n) for n in names))
    found = Recipe(f, names).then("jvp", names, given).axes
    assert {n: show(a) for n, a in found.items()} == {
        "x": "N G K S", "tangent0_x": "N G K S",
        **{n: "G K" for p in names[1:] for n in (p, f"tangent0_{p}")},
    }  # fmt: skip
    given = ("x", "v", "gamma", "beta", "d_y", "past0_y")
    found = Recipe(f, names).then("vjp", ("x", "beta"), given).axes
    assert found["d_y"] == found["past0_y"] == found["x"] and found["beta"] == found["gamma"]
    found = Recipe(f, names).then("vmap", ("gamma",), names).axes
    assert show(found["gamma"]) == "N G K" and show(found["beta"]) == "G K"
    assert prod(GEOMETRY.sizes(found["gamma"])) == 3 * 4
