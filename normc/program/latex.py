r"""LaTeX: formulas as the papers write them, ``\frac{x \sigma(v x)}{...}``.

Texts are made bottom-up, once for every distinct node, as in `normc.language.show`: nothing
recurses, and what would repeat too much text gets a name and a line of its own. This is not sympy's
printer, of which nothing would be left: symbols, products, powers, numbers, functions are all ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from normc.language.axes import CHANNEL, Axis
from normc.language.definition import Definition
from normc.language.expr import Call, Const, Expr, Reduce, Var, children, postorder

_CASES, _SUM, _SIGN, _PRODUCT, _POWER, _ATOM = range(6)

_Text = tuple[str, int]  # a text and how tightly it binds

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi"),
    "omega",
)
_NAMES = {"eps": r"\epsilon"}
_AXES = ((Axis.N, "b"), (Axis.S, "w,h"), (CHANNEL, "c"), (Axis.G, "g"), (Axis.K, "c/g"))
"""Axes as EvoNorm writes them: the channels within a group are c/g."""

_FUNCTIONS = {
    "abs": r"\left|{}\right|",
    "sqrt": r"\sqrt{{{}}}",
    "sigmoid": r"\sigma\left({}\right)",
    "atan": r"\arctan\left({}\right)",
} | {
    name: rf"\{name}\left({{}}\right)"
    for name in ("log", "sin", "cos", "tan", "tanh", "sinh", "cosh")
}
"""Functions with a notation of their own; all others are operator names."""

_ACRONYMS = {
    "relu": "ReLU", "leaky_relu": "LeakyReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU",
    "elu": "ELU", "selu": "SELU", "mish": "Mish",
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
    lines += [(name, named.get(expr) or _print(expr, named)) for name, expr in rows]
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
    return {node: next(fresh) for node in order if node in chosen}


def _print(root: Expr, named: Mapping[Expr, str]) -> str:
    texts: dict[Expr, _Text] = {}
    for node in postorder([root]):
        if node in named and node is not root:
            texts[node] = named[node], _ATOM
        else:
            texts[node] = _text(node, [texts[child] for child in children(node)])
    return texts[root][0]


def _text(node: Expr, parts: Sequence[_Text]) -> _Text:
    match node:
        case Const(value):
            return _number(value)
        case Var(name):
            return _name(name), _ATOM
        case Reduce(op, over):
            return rf"{_operator(op)}_{{{_axes(over)}}}\left({parts[0][0]}\right)", _ATOM
        case Call(fn) if fn in _NOTATIONS:
            return _NOTATIONS[fn](*parts)
        case Call(fn) if fn in _COMPARISONS:
            left, right = (_bracket(part, _SUM) for part in parts)
            return f"{left} {_COMPARISONS[fn]} {right}", _CASES
        case Call(fn):
            inside = ", ".join(text for text, _ in parts)
            if fn in _FUNCTIONS:
                return _FUNCTIONS[fn].format(inside), _ATOM
            return rf"{_operator(fn)}\left({inside}\right)", _ATOM


def _bracket(text: _Text, least: int) -> str:
    return text[0] if text[1] >= least else rf"\left({text[0]}\right)"


# --- notations -----------------------------------------------------------------------------------


def _add(x: _Text, y: _Text) -> _Text:
    # A second operand that begins with a minus needs brackets, any other sum does not.
    return f"{x[0]} + {_bracket(y, _PRODUCT if y[0].startswith('-') else _SUM)}", _SUM


def _square(x: _Text) -> _Text:
    return f"{_bracket(x, _ATOM)}^{{2}}", _POWER


def _mul(x: _Text, y: _Text) -> _Text:
    if x == y:
        return _square(x)
    left, right = _bracket(x, _SIGN), _bracket(y, _PRODUCT)
    times = r" \cdot " if right[0].isdigit() else " "
    return left + times + right, _SIGN if x[1] == _SIGN else _PRODUCT


def _where(c: _Text, x: _Text, y: _Text) -> _Text:
    rows = rf"{x[0]} & \text{{if }} {c[0]} \\ {y[0]} & \text{{otherwise}}"
    return rf"\begin{{cases}} {rows} \end{{cases}}", _CASES


def _divide(x: str, y: str) -> _Text:
    return rf"\frac{{{x}}}{{{y}}}", _PRODUCT


_NOTATIONS: dict[str, Callable[..., _Text]] = {
    "add": _add,
    "sub": lambda x, y: (f"{_bracket(x, _SUM)} - {_bracket(y, _PRODUCT)}", _SUM),
    "mul": _mul,
    "div": lambda x, y: _divide(x[0], y[0]),
    "neg": lambda x: (f"-{_bracket(x, _PRODUCT)}", _SIGN),
    "pow": lambda x, y: (f"{_bracket(x, _ATOM)}^{{{y[0]}}}", _POWER),
    "square": _square,
    "exp": lambda x: (f"e^{{{x[0]}}}", _POWER),
    "reciprocal": lambda x: _divide("1", x[0]),
    "rsqrt": lambda x: _divide("1", rf"\sqrt{{{x[0]}}}"),
    "where": _where,
}
"""Functions whose text depends on how tightly their operands bind."""


# --- words ---------------------------------------------------------------------------------------


def _number(value: float) -> _Text:
    digits, _, exponent = repr(value).removesuffix(".0").partition("e")
    if exponent:
        power = f"10^{{{int(exponent)}}}"
        digits = power if digits == "1" else rf"{digits} \cdot {power}"
    return digits, _SIGN if digits.startswith("-") else _PRODUCT if exponent else _ATOM


def _name(name: str) -> str:
    """Greek letters, subscripts and upright words; a count such as ``|KS|`` is n over its axes."""
    if name.startswith("|"):
        over = Axis(0)
        for letter in name.strip("|"):
            over |= Axis[letter]
        return f"n_{{{_axes(over)}}}"
    parts = re.fullmatch(r"([A-Za-z]+)_?([0-9]+)|([A-Za-z])_([A-Za-z0-9]+)", name)
    stem, index = [part for part in parts.groups() if part] if parts else (name, "")
    if stem in _NAMES or stem in _GREEK:
        stem = _NAMES.get(stem, f"\\{stem}")
    elif len(stem) > 1:
        stem = rf"\mathrm{{{_escape(stem)}}}"
    return f"{stem}_{{{index}}}" if index else stem


def _operator(name: str) -> str:
    if name in ("max", "min", "sum"):
        return f"\\{name}"
    return rf"\operatorname{{{_escape(_ACRONYMS.get(name, name))}}}"


def _escape(word: str) -> str:
    return "".join(rf"\{c}" if c == "_" else c for c in word if c.isalnum() or c == "_")


def _axes(over: Axis) -> str:
    names: list[str] = []
    for axes, name in _AXES:
        if over & axes == axes:
            names.append(name)
            over &= ~axes
    return ",".join(names)
