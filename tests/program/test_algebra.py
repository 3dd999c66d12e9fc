"""The algebra: sympy's door, derivatives, guarded rewrites, canonical text, sharing, LaTeX."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from normc.errors import NormcError
from normc.language.axes import FULL, Axis
from normc.language.definition import Definition
from normc.language.expr import Call, Const, Expr, Var, call, const, postorder, rewrite, var
from normc.language.parse import parse
from normc.language.primitives import PRIMITIVES
from normc.language.show import show
from normc.language.zoo import ZOO
from normc.program import algebra
from normc.program.algebra import (
    HEADS,
    NAMES,
    canonical,
    derivative,
    from_sympy,
    guard,
    latex,
    latex_definition,
    share,
    simplify,
    to_sympy,
)
from normc.program.interpret import evaluate, evaluate_all, probes
from normc.program.simplify import RULES, trusted
from tests.properties.formulas import formulas

pytestmark = pytest.mark.plain

x, y, a, b, c, d, v, mu = map(var, ("x", "y", "a", "b", "c", "d", "v", "mu"))
exp, sqrt, log, tanh, sigmoid, sin, cos, absolute = (
    lambda *args, fn=fn: call(fn, *args)
    for fn in ("exp", "sqrt", "log", "tanh", "sigmoid", "sin", "cos", "abs")
)
LONG = 10.0  # seconds: where the text matters, a slow machine may take its time


def text(formula: str, budget: float = LONG) -> str:
    return show(canonical(parse(formula), budget))


# --- the door -----------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, 0.1, -3.25, 1e-30, 1e30, 1 / 3])
LEAVES = st.one_of(NUMBERS.map(const), st.sampled_from([x, y, v, var("E"), var("gamma", FULL)]))


def _calls(below: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def of(name: str) -> st.SearchStrategy[Expr]:
        row = PRIMITIVES[name]
        return st.tuples(*[below] * len(row.args)).map(lambda args: call(name, *args))

    arithmetic = st.sampled_from(["add", "sub", "mul", "div", "neg", "pow"])
    return st.one_of(arithmetic.flatmap(of), st.sampled_from(sorted(PRIMITIVES)).flatmap(of))


EXPRESSIONS = st.recursive(LEAVES, _calls, max_leaves=12)


@given(EXPRESSIONS)
def test_an_expression_survives_the_journey(expr: Expr):
    there_and_back = from_sympy(to_sympy(expr))
    points = probes(("x", "y", "v", "E", "gamma"))
    before, after = evaluate_all([expr, there_and_back], points)
    np.testing.assert_allclose(after, before, rtol=1e-13, atol=0)


@given(formulas())
def test_formulas_survive_with_their_statistics(formula: str):
    for result in parse(formula).results:
        again = from_sympy(to_sympy(result))
        assert from_sympy(to_sympy(again)) is again


def test_the_table_is_a_bijection():
    assert {NAMES[head] for head in HEADS.values()} == set(HEADS)
    assert set(HEADS) | set(algebra.COMPOSED) == set(PRIMITIVES)


@pytest.mark.parametrize(
    "name", ["E", "I", "pi", "beta", "gamma", "lambda", "oo", "x@1", "S", "|KS|"]
)
def test_a_name_is_just_a_name(name: str):
    symbol = to_sympy(var(name))
    assert isinstance(symbol, sympy.Symbol)
    assert from_sympy(symbol) is var(name)
    assert from_sympy(to_sympy(var(name, Axis.K) - var(name))) is var(name, Axis.K) - var(name)


def test_text_in_a_name_is_not_read():
    hostile = var("__import__('os').abort()")
    assert from_sympy(to_sympy(hostile * 2)) is hostile * 2


@pytest.mark.parametrize(
    "stranger",
    [
        sympy.gamma(to_sympy(x)),
        sympy.Max(to_sympy(x), 1),
        sympy.I,
        sympy.Symbol("x"),
        sympy.Derivative(sympy.Function("f")(to_sympy(x)), to_sympy(x)),
        sympy.true,
        sympy.zoo,
    ],
    ids=str,
)
def test_an_unknown_head_fails_loudly(stranger: object):
    with pytest.raises(NormcError, match="no function of the language"):
        from_sympy(stranger)


def test_an_unknown_function_fails_loudly():
    with pytest.raises(NormcError, match="nonesuch"):
        to_sympy(call("nonesuch", x))


def test_depth_is_bounded_by_memory_alone():
    expr: Expr = x
    for _ in range(3000):
        expr = tanh(expr * y + 1)
    assert from_sympy(to_sympy(expr)) is expr


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 1 / 3, 1e-300, np.inf, -np.inf, np.nan])
def test_numbers_are_exact(value: float):
    number = evaluate(from_sympy(to_sympy(const(value))), {})
    assert np.array_equal(number, value, equal_nan=True)
    assert np.isnan(value) or np.signbit(number) == np.signbit(value)


# --- derivatives --------------------------------------------------------------------------------


def test_derivatives_reuse_the_call():
    for name in ("tanh", "sigmoid", "exp", "sqrt", "rsqrt", "div"):
        node = call(name, *PRIMITIVES[name].parameters())
        assert any(node in postorder([slope]) for slope in derivative(name)), name


def test_a_core_function_unknown_to_sympy_needs_its_own_derivative(monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    row = replace(PRIMITIVES["sign"], derivative=None)
    monkeypatch.setitem(PRIMITIVES, "sign", row)
    with pytest.raises(NormcError, match="needs a derivative"):
        derivative.__wrapped__("sign")


# --- the guard ----------------------------------------------------------------------------------

_e = exp(-(v * x))
DESTRUCTIVE = {
    # what sympy's simplify, ratsimp, cancel, expand, powsimp, ... or its constructors do
    "simplify(sigmoid)": (1 / (1 + _e), exp(v * x) / (exp(v * x) + 1)),
    "simplify(swish)": (x / (1 + _e), x * exp(v * x) / (exp(v * x) + 1)),
    "simplify(sigmoid')": (_e / ((1 + _e) * (1 + _e)), 1 / (2 + exp(v * x) + _e)),
    "cancel(sigmoid')": (sigmoid(x) * (1 - sigmoid(x)), exp(x) / (exp(x) + 1) ** 2),
    "simplify(softplus)": (log(1 + exp(-absolute(x))), log(exp(absolute(x)) + 1) - absolute(x)),
    "simplify(tanh)": (tanh(x), (exp(2 * x) - 1) / (exp(2 * x) + 1)),
    "tanh' to sech": (1 - tanh(x) ** 2, 4 / (exp(x) + exp(-x)) ** 2),
    "expand((x - mu)**2)": ((x - mu) ** 2, x**2 - 2 * x * mu + mu**2),
    "ratsimp((x - mu)**2)": ((x - mu) * (x - mu), x * x + mu * (mu - 2 * x)),
    "factor(x**2 - mu**2)": (x**2 - mu**2, (x - mu) * (x + mu)),
    "expand(v*(x - mu))": (v * (x - mu), v * x - v * mu),
    "collect(v*x - v*mu)": (v * x - v * mu, v * (x - mu)),
    "together(x/v - mu/v)": (x / v - mu / v, (x - mu) / v),
    "apart((x - mu)/v)": ((x - mu) / v, x / v - mu / v),
    "reassociated sum": (x + (y - mu), (x + y) - mu),
    "reassociated product": (x * (y * mu), (x * y) * mu),
    "sqrt(x**2)": (sqrt(x**2), x),
    "sqrt(x**2) of a real": (sqrt(x * x), absolute(x)),
    "sqrt(x)**2": (sqrt(x) * sqrt(x), x),
    "sqrt(x)*sqrt(y)": (sqrt(x) * sqrt(y), sqrt(x * y)),
    "x**0.5": (x**0.5, sqrt(x)),
    "x/x": (x / x, const(1)),
    "0*x": (0 * x, const(0)),
    "x - x": (x - x, const(0)),
    "0/x": (0 / x, const(0)),
    "x*y/y": (x * y / y, x),
    "1/(1/x)": (1 / (1 / x), x),
    "x*(1/y)": (x * (1 / y), x / y),
    "log(exp(x))": (log(exp(x)), x),
    "exp(log(x))": (exp(log(x)), x),
    "exp(x)*exp(y)": (exp(x) * exp(y), exp(x + y)),
    "exp(x)*exp(-x)": (exp(x) * exp(-x), const(1)),
    "log(x) + log(y)": (log(x) + log(y), log(x * y)),
    "log(x**2)": (log(x**2), 2 * log(x)),
    "sin**2 + cos**2": (sin(x) ** 2 + cos(x) ** 2, const(1)),
    "1 - cos**2": (1 - cos(x) ** 2, sin(x) ** 2),
    "log(1 + x) to log1p": (log(1 + x), call("log1p", x)),
    "expm1 to exp - 1": (call("expm1", x), exp(x) - 1),
    "max(x, x + 0*y)": (call("max", x, x + 0 * y), x),
    "min of max": (call("max", call("min", x, 1), -1), call("max", x, -1)),
    "where to a product": (call("where", call("gt", x, 0), y, 0), call("gt", x, 0) * y),
    "not <= for >": (
        call("where", call("gt", x, 0), x, 1),
        call("where", call("le", x, 0), 1, x),
    ),
}


@pytest.mark.parametrize("before, after", DESTRUCTIVE.values(), ids=DESTRUCTIVE)
def test_the_guard_rejects_what_destroys_floats(before: Expr, after: Expr):
    assert not guard(before, after)


@pytest.mark.parametrize("before, after", DESTRUCTIVE.values(), ids=DESTRUCTIVE)
def test_simplify_does_not_do_it(before: Expr, after: Expr):
    assert simplify(before, LONG) is not after


HARMLESS = {
    "x + x": (x + x, 2 * x),
    "commuted": (x * y + a, a + y * x),
    "named": (1 / (1 + exp(-x)), sigmoid(x)),
    "x/4": (x / 4, 0.25 * x),
    "odd": (tanh(-x), -tanh(x)),
    "x + 0": (x + 0, x),
    "abs to sign": (absolute(x), x * call("sign", x)),
}


@pytest.mark.parametrize("before, after", HARMLESS.values(), ids=HARMLESS)
def test_the_guard_lets_the_harmless_pass(before: Expr, after: Expr):
    assert guard(before, after)


def test_the_guard_can_insist_on_the_signs_of_zeros():
    assert not guard(x + 0, x, signed_zeros=True)
    assert not guard(-(x - y), y - x, signed_zeros=True)
    assert guard(x - 0, x, signed_zeros=True)


def test_every_rule_passes_the_guard():
    kept = sum(len(rules) for rules in trusted().values())
    assert kept == len(RULES)


@given(formulas())
def test_simplify_changes_no_value(formula: str):
    for result in parse(formula).results:
        free = _without_statistics(result)
        points = probes((n.name for n in postorder([free]) if isinstance(n, Var)), wide=False)
        before, after = evaluate_all([free, simplify(free, LONG)], points)
        np.testing.assert_allclose(after, before, rtol=1e-9, atol=0)


def _without_statistics(expr: Expr) -> Expr:
    names: dict[Expr, Expr] = {}

    def rule(node: Expr) -> Expr:
        if not isinstance(node, Call | Const | Var):
            return names.setdefault(node, var(f"s{len(names)}"))
        return node

    return rewrite([expr], rule)[0]


# --- canonical text -----------------------------------------------------------------------------

EQUAL = {
    "x*sigmoid(v*x)/group_std(x)*gamma + beta": [
        "beta + gamma*(x*sigmoid(x*v))/group_std(x)",
        "gamma*x*sigmoid(v*x)*group_std(x)**-1 + beta",
        "x/(1 + exp(-v*x))/sqrt(group_var(x) + eps)*gamma + beta",
        "beta - -x*sigmoid(v*x)*gamma/group_std(x)",
    ],
    "a*b*c*x": ["x*c*b*a", "(a*b)*(c*x)", "a*(b*(c*x))", "a*1*b*c*(x/1)"],
    "x - instance_mean(x)": [
        "-(instance_mean(x) - x)",
        "-instance_mean(x) + x",
        "x + -instance_mean(x)",
    ],
    "(x - v)*(v - gamma)": ["-(v - x)*(v - gamma)", "(v - x)*(gamma - v)"],
    "x/a/b": ["x/(a*b)", "x*a**-1*b**-1", "x/b/a"],
    "x**3": ["x*x*x", "x**2*x", "square(x)*x"],
    "x/3": ["2*x/6", "x*(1/3)"],
    "0.5*x": ["x/2", "x*2/4", "x*0.5"],
    "silu(x)": ["x*sigmoid(x)", "x/(1 + exp(-x))"],
    "max(x, max(v, 1))": ["max(1, max(v, x))", "max(max(x, v), max(1, x))"],
    "relu(x)": ["max(x, 0)", "max(0, x)"],
    "where(x > v, x, v)": ["where(v < x, x, v)"],
    "x/instance_rms(x)": ["x/sqrt(mean[s](x**2) + eps)", "x/sqrt(eps + instance_ms(x))"],
    "tanh(-x) + 1": ["1 - tanh(x)"],
    "param a = 2; param b = 3; a*x + b": ["param b = 3; param a = 2; b + x*a"],
    "1 + x + 2": ["x + 3", "3 + x"],
    "x, v*x": ["x, x*v"],
}

DIFFERENT = [
    ("x", "x + 1"),
    ("a*x", "b*x"),
    ("x/x", "1 + 0*x"),
    ("0*x", "x - x"),
    ("sqrt(x)**2*v", "x*v"),
    ("sqrt(x**2)", "abs(x)"),
    ("x**0.5", "sqrt(x)"),
    ("exp(x)*exp(v)", "exp(x + v)"),
    ("x/3", "0.3333*x"),
    ("x, v*x", "v*x, x"),
    ("param a = 1; a*x", "param a = 2; a*x"),
    ("param a; a*x", "param a[c] = 1; a*x"),
    ("group_std(x)*x", "instance_std(x)*x"),
    ("x - batch_mean(x)", "batch_mean(x) - x"),
    ("where(x > 0, x, 1)", "where(x >= 0, x, 1)"),
    ("(a - b)*x", "(a + b)*x"),
    ("x/v", "v/x"),
    ("x**v", "v**x"),
]


@pytest.mark.parametrize("formula", EQUAL)
def test_equal_layers_have_equal_text(formula: str):
    assert {text(other) for other in EQUAL[formula]} == {text(formula)}


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_layers_have_different_text(one: str, other: str):
    assert text(one) != text(other)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_has_canonical_text(name: str):
    once = text(ZOO[name].text)
    assert text(once) == once


@given(formulas(), st.integers(0, 2**32))
def test_canonical_is_idempotent_and_blind_to_order(formula: str, seed: int):
    definition = parse(formula)
    once = canonical(definition, LONG)
    assert text(show(once)) == show(once)
    assert show(canonical(_shuffled(definition, random.Random(seed)), LONG)) == show(once)


def _shuffled(definition: Definition, random: random.Random) -> Definition:
    """The same layer written differently."""

    def rule(node: Expr) -> Expr:
        match node:
            case Call("add" | "mul" | "max" | "min" as fn, (p, q)) if random.random() < 0.5:
                return call(fn, q, p)
            case Call("add" | "mul" as fn, (p, Call(inner, (q, r)))) if fn == inner:
                return call(fn, call(fn, p, q), r)
            case Call("sub", (p, q)) if random.random() < 0.5:
                return -q + p
            case Call("div", (p, q)) if random.random() < 0.5:
                return p * q**-1
            case _:
                return call("neg", -node) if random.random() < 0.1 else node

    return Definition(
        tuple(rewrite(definition.results, rule)), definition.params, definition.inputs
    )


def test_the_text_is_the_same_in_another_process():
    formula = "b*x + a*sigmoid(x*a*b)/group_std(b*x) + exp(a*b)"
    program = (
        "from normc.language.parse import parse; from normc.language.show import show; "
        "from normc.program.canonical import canonical; "
        f"print(show(canonical(parse({formula!r}), {LONG})))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
    assert done.stdout.decode().strip() == text(formula)


def _large() -> str:
    terms = [f"a{i % 7}*x**{1 + i % 3}/(1 + exp(-x*{i}))" for i in range(1, 24)]
    return " + ".join(terms)


@pytest.mark.parametrize("formula", [_large(), "-" * 40 + "x", "+".join(["x"] * 90)])
def test_canonical_keeps_its_budget(formula: str):
    definition = parse(formula)
    canonical(definition)
    start = time.thread_time()
    canonical(definition)
    assert time.thread_time() - start < 0.1


def test_text_that_could_not_be_read_is_not_written():
    terms = [f"a{i}*a{j}" for i in range(15) for j in range(i)] + ["x"]
    while len(terms) > 1:  # as a chain, these 106 terms would be too deep
        terms = ["(" + "+".join(terms[i : i + 2]) + ")" for i in range(0, len(terms), 2)]
    definition = parse(terms[0])
    assert canonical(definition, LONG) is definition


def test_out_of_time_a_formula_stays_as_it_is():
    definition = parse("beta + x*gamma")
    assert canonical(definition, budget=0) is definition
    expr = call("neg", -x) * 1
    assert simplify(expr, budget=0) is expr


# --- sharing ------------------------------------------------------------------------------------


def test_share_finds_what_products_have_in_common():
    before = [a * b * c, a * c * d]
    after = share(before)
    assert len(postorder(after)) < len(postorder(before))
    assert all(guard(p, q, probes("abcd", wide=False)) for p, q in zip(before, after, strict=True))


def test_share_does_not_reassociate_sums():
    before = [a + b + c, a + c + d]
    assert share(before) == before


def test_share_looks_into_functions_and_leaves_statistics_alone():
    mean = parse("instance_mean(x*a*group_std(x*b))").results[0]
    before = [exp(a * b * c) * mean, tanh(a * c * d) * mean]
    after = share(before)
    assert a * c in postorder(after) and mean in postorder(after)


def test_share_has_a_budget():
    before = [a * b * c, a * c * d]
    assert share(before, budget=0) == before
    many = [call("mul", var(f"p{i}"), var(f"q{i}")) for i in range(algebra.SHARE_NODES)]
    assert share(many) == many


# --- LaTeX --------------------------------------------------------------------------------------

LATEX = {
    "x*sigmoid(v*x)/group_std(x) + beta": (
        r"y = \frac{x \sigma\left(v x\right)}"
        r"{\operatorname{std}_{w,h,c/g}\left(x\right)} + \beta"
    ),
    "v0*sqrt(batch_var(x) + eps) - (x - beta)": (
        r"y = v_{0} \sqrt{\operatorname{var}_{b,w,h}\left(x\right) + \epsilon}"
        r" - \left(x - \beta\right)"
    ),
    "where(x > 0, x, 0.01*x)": (
        r"y = \begin{cases} x & \text{if } x > 0 \\ 0.01 x & \text{otherwise} \end{cases}"
    ),
    "-(x - 1)**2*3": r"y = -\left(x - 1\right)^{2} \cdot 3",
    "relu(x)*abs(x)*exp(x)**2/1e-5": (
        r"y = \frac{\operatorname{ReLU}\left(x\right) \left|x\right|"
        r" \left(e^{x}\right)^{2}}{10^{-5}}"
    ),
    "max(x, channel_max(x)), -x": (
        r"\begin{aligned} y_{0} &= \max\left(x, \max_{c}\left(x\right)\right)"
        r" \\ y_{1} &= -x \end{aligned}"
    ),
    "input style_std[n,c]; style_std*x": r"y = \mathrm{style\_std} x",
}


@pytest.mark.parametrize("formula", LATEX)
def test_latex(formula: str):
    assert latex_definition(parse(formula)) == LATEX[formula]


@given(formulas())
def test_latex_is_balanced(formula: str):
    source = latex_definition(parse(formula))
    depth = 0
    for before, character in zip(" " + source, source, strict=False):
        depth += (character == "{" and before != "\\") - (character == "}" and before != "\\")
        assert depth >= 0
    assert depth == 0
    assert source.count(r"\left") == source.count(r"\right")


def test_latex_of_a_shared_expression_stays_short():
    expr: Expr = x
    for _ in range(100):
        expr = expr * expr + expr
    assert len(latex(expr)) < 10_000


def test_latex_of_a_derivative_names_counts():
    assert latex(var("|KS|") * var("d_y")) == "n_{w,h,c/g} d_{y}"
