"""Parsing: what formulas mean, in which order names are learned, and every limit at its edge."""

import ast
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark import Lark

from normc.errors import FormulaError
from normc.language.axes import AXIS_SETS, CHANNEL, FULL, NONE, Axis
from normc.language.definition import Input, Param, X
from normc.language.expr import Call, Const, Reduce, Var, call, const, reduce, var
from normc.language.names import GREEK
from normc.language.parse import grammar, parse
from normc.language.primitives import COMPARISONS, OPERATORS, PRIMITIVES
from normc.language.reductions import EPS, REDUCTIONS

V, B = var("v", CHANNEL), var("b", CHANNEL)
GROUP = Axis.K | Axis.S


def only(text):
    (result,) = parse(text).results
    return result


def refused(text):
    with pytest.raises(FormulaError) as caught:
        parse(text)
    error = caught.value
    assert error.text == text
    assert error.position is not None and 0 <= error.position <= len(text)
    assert str(error).startswith(error.message) and str(error).endswith("^")
    return error


def test_grammar_has_no_conflicts():
    Lark(grammar(), parser="lalr", lexer="basic", strict=True)


def test_grammar_and_names_agree_on_greek():
    (terminal,) = re.findall(r"^NAME: /(.*)/", grammar(), re.MULTILINE)
    assert set(re.findall("[^ -~]", terminal)) == set(GREEK)


MEANINGS = {
    "x + v - b": X + V - B,
    "x - (v - b)": X - (V - B),
    "x*v/b": X * V / B,
    "x/(v*b)": X / (V * B),
    "-x**2": -(X**2),
    "(-x)**2": (-X) ** 2,
    "x**-2": X**-2,
    "x**-v": X ** (-V),
    "-2*x": const(-2) * X,
    "-2**x": -(const(2) ** X),
    "x - 2": X - 2,
    "x--2": X - const(-2),
    "--x": call("neg", -X),
    "+x": X,
    "2 - -+-2": const(2) - const(2),
    "x*-v": X * (-V),
    "1.5e-3*x": const(0.0015) * X,
    ".5*x + 2.": const(0.5) * X + const(2),
    "eps*x": EPS * X,
    "max(x, v)": call("max", X, V),
    "clamp(x, -1, 1)": call("clamp", X, const(-1), const(1)),
    "where(x > 0, x, v*x)": call("where", call("gt", X, const(0)), X, V * X),
    "where(((x + 1) <= v), x, v)": call("where", call("le", X + 1, V), X, V),
    "group_std(x)": reduce("std", GROUP, X),
    "std[k,s](x)": reduce("std", GROUP, X),
    "max[k, s](x)": reduce("max", GROUP, X),
    "batch_group_l2(x)": reduce("l2", GROUP | Axis.N, X),
    "mean[c](x)": reduce("mean", CHANNEL, X),
    "all_absmax(x)": reduce("absmax", FULL, X),
    "x - instance_mean(x*group_std(x))": X - reduce("mean", Axis.S, X * reduce("std", GROUP, X)),
    "h = x + v; h*h": (X + V) * (X + V),
    "exp(\n  x\n  + v  # why\n)": call("exp", X + V),
    "# first\n\nx ;\n": X,
}


@pytest.mark.parametrize("text", MEANINGS)
def test_meaning(text):
    assert only(text) is MEANINGS[text]


SPELLINGS = {
    "x·v": "x*v",
    "x ⋅ v × b": "x*v*b",
    "x − v": "x - v",
    "−x²": "-x**2",
    "√x": "sqrt(x)",
    "√(x + v)*b": "sqrt(x + v)*b",
    "√x²": "sqrt(x)**2",
    "√√x": "sqrt(sqrt(x))",
    "(x + v)³": "(x + v)**3",
    "σ(x)": "sigmoid(x)",
    "σ*x": "sigma*x",
    "x/group_σ(x)": "x/group_std(x)",
    "x - μ[n,s](x)": "x - mean[n,s](x)",
    "x/σ[n,s](x)": "x/std[n,s](x)",
    "x - group_μ(x)·μ": "x - group_mean(x)*mu",
    "x - group_µ(x)": "x - group_mean(x)",
    "x*γ + β": "x*gamma + beta",
    "γ_1*x + α*x + ν + τ2 + δ": "gamma_1*x + alpha*x + nu + tau2 + delta",
    "x/√(group_var(x) + ε)": "x/sqrt(group_var(x) + eps)",
    "param γ[c] = −2; x*γ": "param gamma[c] = -2; x*gamma",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_paper_spelling(text):
    assert parse(text) == parse(SPELLINGS[text])


@pytest.mark.parametrize("name", [name for name, row in PRIMITIVES.items() if row.callable])
def test_every_primitive_can_be_called(name):
    if name != "where":
        args = PRIMITIVES[name].args
        wanted = call(name, *(X if arg == "x" else var(arg, CHANNEL) for arg in args))
        assert only(f"{name}({', '.join(args)})") is wanted


@pytest.mark.parametrize("head", AXIS_SETS)
@pytest.mark.parametrize("stat", REDUCTIONS)
def test_every_statistic_can_be_called(head, stat):
    assert only(f"{head}_{stat}(x)") is reduce(stat, AXIS_SETS[head].axes, X)


def test_declarations_and_free_names():
    definition = parse(
        "param alpha = 0.5; param w; param beta; param v[c] = -3e-2\n"
        "input r; input s[n,c]; input p[s]\n"
        "(x + r)*s*gamma + p + v0 + alpha + w + beta + v"
    )
    assert definition.params == (
        Param("alpha", NONE, 0.5),
        Param("w", NONE, 1.0),
        Param("beta", NONE, 0.0),
        Param("v", CHANNEL, -0.03),
        Param("gamma", CHANNEL, 1.0),
        Param("v0", CHANNEL, 0.0),
    )
    assert definition.inputs == (
        Input("r", FULL),
        Input("s", Axis.N | CHANNEL),
        Input("p", Axis.S),
    )


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("x*q**w + where(e < r, t, y)", "qwerty"),
        ("h = b*x; a*h + c", "bac"),
        ("a*x + a*c + b", "acb"),
        ("param c; a*x + c + b", "cab"),
        ("max(z, group_mean(y)) - w, x*v", "zywv"),
    ],
)
def test_parameters_stand_in_order_of_first_use(text, order):
    assert "".join(row.name for row in parse(text).params) == order


def test_several_results():
    assert parse("h = x + v\nh, x\n").results == (X + V, X)


@pytest.mark.parametrize(
    "name", ["E", "I", "N", "S", "O", "Q", "C", "pi", "oo", "zoo", "nan", "beta", "lambda_", "re"]
)
def test_names_of_sympy_are_ordinary_parameters(name):
    definition = parse(f"{name}*x + {name}")
    init = 0.0 if name == "beta" else 1.0
    assert definition.params == (Param(name, CHANNEL, init),)
    assert definition.results[0] is var(name, CHANNEL) * X + var(name, CHANNEL)


def test_parsing_in_threads_keeps_scopes_apart():
    texts = [f"{name}*x + group_mean(x*{name}2)" for name in "abcdefgh"] * 8
    with ThreadPoolExecutor(8) as pool:
        for text, definition in zip(texts, pool.map(parse, texts), strict=True):
            assert [row.name for row in definition.params] == [text[0], text[0] + "2"]


# --- precedence is Python's ---------------------------------------------------------------------

operators = st.sampled_from(["+", "-", "*", "/", "**"])
operands = st.recursive(
    st.sampled_from(["x", "v", "b", "2", "3", "0.5"]),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("-+"), inner).map("".join),
        st.lists(inner, min_size=2, max_size=4).flatmap(
            lambda parts: st.lists(operators, min_size=len(parts) - 1, max_size=len(parts) - 1).map(
                lambda ops: "".join(map("".join, zip(parts, [*ops, ""], strict=True)))
            )
        ),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=12,
)


def from_python(node):
    """The same expression, as Python's own parser reads it."""
    match node:
        case ast.Constant(value):
            return const(value)
        case ast.Name(name):
            return X if name == "x" else var(name, CHANNEL)
        case ast.UnaryOp(ast.UAdd(), operand):
            return from_python(operand)
        case ast.UnaryOp(ast.USub(), operand):
            inner = from_python(operand)
            return const(-inner.value) if isinstance(inner, Const) else -inner
        case ast.BinOp(left, operator, right):
            names = {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "div", "Pow": "pow"}
            return call(names[type(operator).__name__], from_python(left), from_python(right))
    raise AssertionError(ast.dump(node))


def has_tower(tree):
    powers = [node for node in ast.walk(tree) if isinstance(getattr(node, "op", 0), ast.Pow)]
    return any(
        isinstance(getattr(below, "op", 0), ast.Pow)
        for power in powers
        for below in ast.walk(power.right)
    )


@settings(max_examples=500, deadline=None)
@given(operands)
def test_precedence_is_pythons(text):
    tree = ast.parse(text, mode="eval").body
    if has_tower(tree):
        assert "another power" in refused(text).message
    else:
        assert only(text) is from_python(tree)


# --- limits, each at its edge -------------------------------------------------------------------


def linear(n):
    """A sum of 3*n nodes: x, n numbers, n products and n - 1 sums, in rows to stay shallow."""
    terms = [f"{i + 2}*x" for i in range(n)]
    return "(" + "+".join(f"({'+'.join(terms[i : i + 16])})" for i in range(0, n, 16)) + ")"


LIMITS = {
    "characters": ("x" + " " * 4095, "x" + " " * 4096, "4,096 characters"),
    "nesting": ("(" * 64 + "x" + ")" * 64, "(" * 65 + "x" + ")" * 65, "64 deep"),
    "brackets": ("exp(" * 64 + "x" + ")" * 64, "exp(" * 64 + "mean[n](x)" + ")" * 64, "64 deep"),
    "names": ("a" * 64, "a" * 65, "64 characters"),
    "greek names": ("γ" * 12, "γ" * 13, "64 characters"),
    "digits": ("1." + "2" * 20, "1." + "2" * 21, "20 digits"),
    "exponent": ("x**16", "x**17", "at most 16"),
    "negative exponent": ("x**-16", "x**-17", "at most 16"),
    "fraction as exponent": ("x**16.5", "h = 17; x**h", "at most 16"),
    "tower": ("x**(v + 2)", "x**(v + 2**v)", "another power"),
    "hidden tower": ("(x**v)**v", "h = exp(x²); x**h", "another power"),
    "large constant": ("1e30*x", "1.1e30*x", "between 1e-30 and 1e+30"),
    "small constant": ("1e-30*x", "9e-31*x", "between 1e-30 and 1e+30"),
    "initial value": ("param v = -1e30; v", "param v = -2e30; v", "between 1e-30 and 1e+30"),
    "zero": ("0*x + 0.0", "0*x + 1e-40", "between 1e-30 and 1e+30"),
    "parameters": (
        "+".join(f"a{i}" for i in range(16)),
        "+".join(f"a{i}" for i in range(17)),
        "16 parameters",
    ),
    "declared parameters": (
        ";".join(f"param a{i}" for i in range(16)) + "; " + "+".join(f"a{i}" for i in range(16)),
        ";".join(f"param a{i}" for i in range(17)) + "; x",
        "16 parameters",
    ),
    "results": (",".join("x" * 16), ",".join("x" * 17), "at most 16 results"),
    "depth": ("-" * 99 + "x", "-" * 100 + "x", "100 operations deep"),
    "depth through names": (
        "\n".join(["a0 = exp(x)", *(f"a{i + 1} = exp(a{i})" for i in range(98)), "a98"]),
        "\n".join(["a0 = exp(x)", *(f"a{i + 1} = exp(a{i})" for i in range(99)), "a99"]),
        "100 operations deep",
    ),
    "nodes": ("-" + linear(85), "--" + linear(85), "256 distinct nodes"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limit(limit):
    legal, illegal, message = LIMITS[limit]
    parse(legal)
    assert message in refused(illegal).message


# --- rules about names --------------------------------------------------------------------------

RULES = {
    "gruop_std(x)": ("unknown function `gruop_std` (did you mean `group_std`?)", 0),
    "x*sigmoyd(x)": ("unknown function `sigmoyd` (did you mean `sigmoid`?)", 2),
    "qqqqqq(x)": ("unknown function `qqqqqq`", 0),
    "group_sdt(x)": ("unknown function `group_sdt` (did you mean `group_std`?)", 0),
    "mean(x)": ("`mean` needs its axes: `group_mean(x)` or `mean[k,s](x)`", 0),
    "exp[n](x)": ("`exp` is not a statistic, and takes no axes", 0),
    "maen[n](x)": ("`maen` is not a statistic, and takes no axes (did you mean `mean`?)", 0),
    "group_std[n](x)": ("`group_std` names its axes already: `group_std(x)`", 0),
    "exp(x, v)": ("`exp(x)` takes 1 argument, not 2", 0),
    "clamp(x)": ("`clamp(x, lo, hi)` takes 3 arguments, not 1", 0),
    "group_std(x, v)": ("`group_std(x)` takes 1 argument, not 2", 0),
    "max(x)": ("`max(x, y)` takes 2 arguments, not 1; the statistic is `group_max(x)`", 0),
    "x*sigmoid": ("`sigmoid` is a function and needs an argument: `sigmoid(x)`", 2),
    "x/group_std": ("`group_std` is a function and needs an argument: `group_std(x)`", 2),
    "x - mean": (
        "`mean` is a statistic and needs axes and an argument: `group_mean(x)`",
        4,
    ),
    "x(v)": ("`x` is not a function; to multiply, write `x*(...)`", 0),
    "v*x + v(x)": ("`v` is not a function; to multiply, write `v*(...)`", 6),
    "add(x, v)": ("unknown function `add`", 0),
    "lt(x, v)": ("unknown function `lt`", 0),
    "x = v; x": ("`x` has a fixed meaning and cannot be given another", 0),
    "eps = 1; x": ("`eps` has a fixed meaning and cannot be given another", 0),
    "param x; x": ("`x` has a fixed meaning and cannot be given another", 6),
    "input eps; x": ("`eps` has a fixed meaning and cannot be given another", 6),
    "ε = 2; x": ("`eps` has a fixed meaning and cannot be given another", 0),
    "x*groups": ("`groups` has a fixed meaning and cannot name a parameter", 2),
    "exp = x; x": ("`exp` is a function and cannot be given another meaning", 0),
    "param mean; x": ("`mean` is a function and cannot be given another meaning", 6),
    "input group_std; x": ("`group_std` is a function and cannot be given another meaning", 6),
    "h = x; h = x*2; h": ("`h` is defined twice", 7),
    "param v; input v; x*v": ("`v` is defined twice", 15),
    "param γ; gamma = x; x": ("`gamma` is defined twice", 9),
    "h = v*x; param v; h*v": ("`v` is used before it is defined", 15),
    "k = h; h = x; h*k": ("`h` is used before it is defined", 7),
    "h = x\nx": ("`h` is never used", 0),
    "param v\nx": ("`v` is never used", 6),
    "input r\nx": ("`r` is never used", 6),
    "mean[n,q](x)": ("`q` is not an axis here; expected one of n, g, k, c, s", 7),
    "mean[ns](x)": ("`ns` is not an axis here; expected one of n, g, k, c, s", 5),
    "mean[n,n](x)": ("the axis `n` is named twice", 7),
    "mean[c,k](x)": ("the axis `k` is named twice", 7),
    "param v[n]; v": ("`n` is not an axis here; expected one of c", 8),
    "input r[g]; r": ("`g` is not an axis here; expected one of n, c, s", 8),
}


@pytest.mark.parametrize("text", RULES)
def test_rule(text):
    error = refused(text)
    assert (error.message, error.position) == RULES[text]


FOREIGN = {
    "а": ("U+0430 (CYRILLIC SMALL LETTER A)", "; did you mean `a`?"),
    "ｘ": ("U+FF58 (FULLWIDTH LATIN SMALL LETTER X)", "; did you mean `x`?"),
    "Α": ("U+0391 (GREEK CAPITAL LETTER ALPHA)", "; did you mean `A`?"),
    "ж": ("U+0436 (CYRILLIC SMALL LETTER ZHE)", ""),
    "\u200b": ("U+200B (ZERO WIDTH SPACE)", ""),
    "\0": ("U+0000 (no name)", ""),
    "\ud800": ("U+D800 (no name)", ""),
}


@pytest.mark.parametrize("character", FOREIGN, ids=ascii)
def test_foreign_character(character):
    error = refused(f"x + {character}")
    name, hint = FOREIGN[character]
    assert error.message == f"{name} is not a character of formulas{hint}"
    assert error.position == 4


def test_error_shows_the_place():
    error = refused("h = x + v\nh/gruop_std(h)")
    assert str(error).splitlines()[1:] == ["    h/gruop_std(h)", "      ^"]


# --- any text at all ----------------------------------------------------------------------------

tokens = st.sampled_from(
    [*"xv;()[],=+-*/<2.^γ²√# \n", "**", ">=", ".5", "1e9", "n,s", "](", "eps", "h = ", "param "]
    + ["input ", "where(", "exp(", "max(", "group_std(", "mean["]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(tokens, max_size=14).map("".join), st.text(max_size=30)))
def test_any_text_is_parsed_or_refused_with_a_caret(text):
    try:
        definition = parse(text)
    except FormulaError:
        refused(text)
    else:
        assert all(isinstance(node, Const | Var | Call | Reduce) for node in definition.results)


def test_operator_tables_are_all_in_the_grammar():
    for symbol, name in OPERATORS.items():
        assert only(f"x {symbol} v") is call(name, X, V)
    for symbol, name in COMPARISONS.items():
        assert only(f"where(x {symbol} v, 1, 2)").args[0] is call(name, X, V)
