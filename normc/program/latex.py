"""LaTeX: formulas as the papers write them, ``\\\\frac{x \\\\sigma(v x)}{...}``.

Texts are made bottom-up, once for every distinct node, like `normc.language.show`: nothing recurses,
and what would repeat too much text gets a name and a line of its own. This is not sympy's printer, of
which nothing would be left: symbols, products, powers, numbers and functions are all ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count

from normc.language.axes import CHANNEL, Axis
from normc.language.definition import Definition
from normc.language.expr import Call, Const, Expr, Reduce, Var, children, postorder

_CASES, _SUM, _PRODUCT, _POWER, _ATOM = range(5)

_Text = tuple[str, int]  # a text and how tightly it binds

_GREEK = set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega".split()
)
_NAMES = {"eps": r"\epsilon"}
_AXES = ((Axis.N, "b"), (Axis.S, "w,h"), (CHANNEL, "c"), (Axis.G, "g"), (Axis.K, "c/g"))
"""Axes as EvoNorm writes them: the channels within a group are c/g."""

_FUNCTIONS = {
    "abs": r"\left|{}\right|",
    "sqrt": r"\sqrt{{{}}}",
    "rsqrt": r"\frac{{1}}{{\sqrt{{{}}}}}",
    "reciprocal": r"\frac{{1}}{{{}}}",
    "exp": r"\exp\left({}\right)",
    "sigmoid": r"\sigma\left({}\right)",
    "atan": r"\arctan\left({}\right)",
} | {
    name: rf"\{name}\left({{}}\right)"
    for name in ("log", "sin", "cos", "tan", "tanh", "sinh", "cosh")
}
"""Functions with a notation of their own; all others are operator names."""

_ACRONYMS = {
    "relu": "ReLU", "leaky_relu": "LeakyReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU",
    "gelu_tanh": "GELU_{tanh}", "elu": "ELU", "selu": "SELU", "mish": "Mish",
}  # fmt: skip

_COMPARISONS = {"lt": "<", "le": r"\le", "gt": ">", "ge": r"\ge", "eq": "=", "ne": r"\ne"}


def latex(expr: Expr) -> str:
    """The expression as LaTeX for math mode.

    >>> from normc.language.expr import var
    >>> print(latex(var("gamma") * var("x") / 2))
    \\frac{\\gamma x}{2}
    """
    return _lines([("", expr)])


def latex_definition(definition: Definition) -> str:
    """Every result of a formula, one line each; an intermediate that is used often has its own."""
    results = definition.results
    if len(results) == 1:
        return _lines([("y", results[0])])
    return _lines([(f"y_{{{i}}}", result) for i, result in enumerate(results)])


def _lines(rows: Sequence[tuple[str, Expr]]) -> str:
    named = _locals([expr for _, expr in rows])
    lines = [(name, _print(node, named)) for node, name in named.items()]
    lines += [(name, _print(expr, named)) for name, expr in rows]
    if len(lines) == 1:
        name, text = lines[0]
        return f"{name} = {text}" if name else text
    body = r" \\ ".join(f"{name} &= {text}" if name else f"& {text}" for name, text in lines)
    return rf"\begin{{aligned}} {body} \end{{aligned}}"


def _locals(roots: Sequence[Expr]) -> dict[Expr, str]:
    """Names for nodes whose repetition would lengthen the text by more than a line."""
    order = postorder(roots)
    size: dict[Expr, int] = {}
    for node in order:
        size[node] = 1 + sum(size[child] for child in children(node))
    uses = Counter(roots)
    chosen: set[Expr] = set()
    for node in reversed(order):
        if (uses[node] - 1) * size[node] > 12:
            chosen.add(node)
        for child in children(node):
            uses[child] += 1 if node in chosen else uses[node]
    taken = {node.name for node in order if isinstance(node, Var)}
    fresh = (f"h_{{{i}}}" for i in count() if f"h{i}" not in taken)
    return {node: next(fresh) for node in order if node in chosen and node not in roots}
