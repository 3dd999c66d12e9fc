"""Printing: what is shown parses back to the same objects, in as few brackets as Python needs."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.definition import Definition, Input, Param, X
from normc.language.expr import (
    Const,
    call,
    const,
    reduce,
    var,
    variables,
)
from normc.language.parse import parse
from normc.language.reductions import EPS, count
from normc.language.show import show, show_expr

V = var("v", CHANNEL)
GROUP = Axis.K | Axis.S

EXPRESSIONS = {
    "x + v - (x - v)": X + V - (X - V),
    "x/v*x/(v*x)": X / V * X / (V * X),
    "(x + 1)*-v": (X + 1) * -V,
    "-x**2": -(X**2),
    "(-x)**2": (-X) ** 2,
    "x**-2": X**-2,
    "(-2)**x": const(-2) ** X,
    "(x**2)**v": (X**2) ** V,
    "x**v**2": X ** (V**2),
    "x**-v**2": X ** -(V**2),
    "-(x*v)": -(X * V),
    "--x": call("neg", -X),
    "x - -2": X - const(-2),
    "-2*x": const(-2) * X,
    "0.1*x + 1e-05": 0.1 * X + const(1e-5),
    "100000*x - 1e+16": const(1e5) * X - const(1e16),
    "-0": const(-0.0),
    "max(x, v + 1)": call("max", X, V + 1),
    "where(x + 1 > v, x, -v)": call("where", call("gt", X + 1, V), X, -V),
    "where((x > v) == 1, x, v)": call("where", call("eq", call("gt", X, V), const(1)), X, V),
    "group_std(x)": reduce("std", GROUP, X),
    "std[n,k](x - v)": reduce("std", Axis.N | Axis.K, X - V),
    "channel_mean(x)": reduce("mean", CHANNEL, X),
    "all_max(x)": reduce("max", FULL, X),
    "sum[g](x)": reduce("sum", Axis.G, X),
    "x*rsqrt(s0 + eps)/|KS|": X * call("rsqrt", var("s0") + EPS) / count(GROUP),
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_show_expr(text):
    assert show_expr(EXPRESSIONS[text]) == text


def test_show_expr_names_what_is_named():
    shared = X * V
    assert show_expr(shared / (shared + 1), {shared: "t"}) == "t/(t + 1)"
    assert show_expr(shared, {shared: "t"}) == "x*v"


def test_depth_is_no_problem():
    deep = X
    for _ in range(5_000):
        deep = -deep
    assert show_expr(deep) == "-" * 5_000 + "x"


DEFINITIONS = {
    "x*sigmoid(v*x)/group_std(x)*γ + β": "x*sigmoid(v*x)/group_std(x)*gamma + beta",
    "param v[c] = 1; x*v": "x*v",
    "param beta[c] = 0; x*beta": "x*beta",
    "param v[c] = 0.5; x*v": "param v[c] = 0.5\nx*v",
    "param v0[c] = 1; x*v0": "param v0[c] = 1\nx*v0",
    "param a = .5; x*b*a": "param a = 0.5\nx*b*a",
    "param a; param b[c]; x*b*a": "param a = 1\nx*b*a",
    "param a[c]; param b[c]; x*b*a": "param a[c] = 1\nx*b*a",
    "param c[c]; x*a*b*c": "param c[c] = 1\nx*a*b*c",
    "input r; input s[c, n]; x*r*s": "input r\ninput s[n,c]\nx*r*s",
    "input p[s]; param w; w*p*x": "param w = 1\ninput p[s]\nw*p*x",
    "h = v*x; h*sigmoid(h)": "v*x*sigmoid(v*x)",
    "h = x + r; h/layer_rms(h), h": "t0 = x + r\nt0/layer_rms(t0), t0",
    "exp(x)*t0/exp(x) + exp(x)*t1": "t2 = exp(x)\nt2*t0/t2 + t2*t1",
    "h = x + residual; where(h > 0, h, 2)": "t0 = x + residual\nwhere(t0 > 0, t0, 2)",
    "h = exp(x) + 2; where(h > 0, 1, where(h > 0, 3, h))": (
        "t0 = exp(x) + 2\nwhere(t0 > 0, 1, where(t0 > 0, 3, t0))"
    ),
}


@pytest.mark.parametrize("text", DEFINITIONS)
def test_show(text):
    assert show(parse(text)) == DEFINITIONS[text]


@pytest.mark.parametrize("text", DEFINITIONS)
def test_round_trip_of_table(text):
    assert parse(show(parse(text))) == parse(text)


def test_sharing_does_not_blow_up():
    lines = ["h0 = x + v", *(f"h{i + 1} = h{i}*h{i} + {i}" for i in range(40))]
    definition = parse("\n".join([*lines, "h40"]))
    assert len(show(definition)) < 1500
    assert parse(show(definition)) == definition


# --- round trips of random definitions ----------------------------------------------------------

PARAMS = (
    Param("gamma"),
    Param("v0", CHANNEL, 0.0),
    Param("beta", CHANNEL, 2.5),
    Param("alpha", NONE, 0.5),
    Param("t0"),
)
INPUTS = (Input("residual"), Input("scale", Axis.N | CHANNEL), Input("t1", Axis.S))

numbers = st.one_of(
    st.integers(-9, 9), st.floats(1e-30, 1e30), st.floats(-1e30, -1e-30), st.just(-0.0)
).map(const)
leaves = st.one_of(st.sampled_from([X, X, EPS, *(row.var for row in (*PARAMS, *INPUTS))]), numbers)
comparisons = st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])


def negate(expr):
    """Minus, folded into a number as the parser does."""
    return const(-expr.value) if isinstance(expr, Const) else -expr


def grow_arithmetic(inner):
    """Sums, products, signs and powers over ``inner``."""
    operators = st.sampled_from(["add", "sub", "mul", "div"])
    return st.one_of(
        inner.map(negate),
        st.tuples(operators, inner, inner).map(apply),
        st.tuples(st.just("pow"), inner, st.integers(-16, 16)).map(apply),
    )


def grow(inner):
    """Everything over ``inner``, some of it with shared parts."""
    stats = st.tuples(st.sampled_from(["mean", "std", "max"]), st.sampled_from(ANY_AXES), inner)
    condition = st.tuples(comparisons, inner, inner).map(apply)
    return st.one_of(
        grow_arithmetic(inner),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[0] + pair[1] * pair[0]),
        st.tuples(st.sampled_from(["sigmoid", "sqrt", "abs"]), inner).map(apply),
        st.tuples(st.just("max"), inner, inner).map(apply),
        st.tuples(st.just("where"), condition, inner, inner).map(apply),
        stats.map(lambda parts: reduce(*parts)),
    )


def apply(parts):
    return call(*parts)


ANY_AXES = [Axis(bits) for bits in range(1, 16)]
expressions = st.recursive(leaves, grow, max_leaves=12)


@st.composite
def definitions(draw):
    """A definition as the parser makes them: what is declared is used, in any order."""
    results = tuple(draw(st.lists(expressions, min_size=1, max_size=3)))
    used = variables(results)
    params = [row for row in PARAMS if row.var in used]
    inputs = [row for row in INPUTS if row.var in used]
    return Definition(
        results, tuple(draw(st.permutations(params))), tuple(draw(st.permutations(inputs)))
    )


@settings(max_examples=400, deadline=None)
@given(definitions())
def test_show_parses_back(definition):
    text = show(definition)
    assert parse(text) == definition
    assert show(parse(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.recursive(leaves, grow_arithmetic, max_leaves=8))
def test_brackets_are_minimal(expr):
    """Without any one pair of brackets the text would mean something else to Python."""
    text = show_expr(expr)
    meaning = ast.dump(ast.parse(text))
    for start, end in bracket_pairs(text):
        fewer = text[:start] + text[start + 1 : end] + text[end + 1 :]
        assert ast.dump(ast.parse(fewer)) != meaning


def bracket_pairs(text):
    opened = []
    for at, character in enumerate(text):
        if character == "(":
            opened.append(at)
        elif character == ")":
            yield opened.pop(), at
