"""Random formulas: text in normc's language, up to five levels deep, nested statistics included.

Division is by something bounded away from zero and growth is damped, so that most formulas are
benign; what is ill-conditioned all the same is found by perturbing the oracle's input.
"""

from __future__ import annotations

import re

from hypothesis import strategies as st

from normc.language.axes import AXIS_SETS
from normc.language.reductions import REDUCTIONS

UNARY = (
    *("sigmoid", "tanh", "relu", "silu", "gelu", "gelu_tanh", "softplus", "mish", "elu", "abs"),
    *("square", "erf", "sin", "cos", "atan", "leaky_relu", "relu6", "hardtanh", "hardsigmoid"),
    *("hardswish", "selu", "logsigmoid", "sign"),
)
AXES = ("n", "s", "c", "k", "g", "n,c", "n,g", "c,s", "k,s", "g,s", "n,k", "n,c,s")
LEAVES = (
    *("x", "x", "x", "x", "v", "gamma", "alpha", "scale", "residual", "eps", "0.5", "2", "1.25"),
)
TEMPLATES = (
    *(
        "({a} + {b})",
        "({a} - {b})",
        "{a}*{b}",
        "{a}*{T}",
        "({a} - {T})",
        "{a}/sqrt(1 + square({T}))",
    ),
    *("max({a}, {b})", "min({a}, {b})", "{a}/(1 + abs({b}))", "exp(-abs({a}))", "-{a}"),
    *("({a})**2", "({a})**3", "clamp({a}, -1, 1.5)", "where({a} > {b}, {c}, -{c})"),
    *("signed_sqrt({a} + 0.3)", "signed_log({a} - 0.3)"),  # their slope is infinite at 0
)
DECLARATIONS = {
    "alpha": "param alpha = 0.5",
    "scale": "input scale[n,c]",
    "residual": "input residual",
}


def _statistic(draw: st.DrawFn, depth: int) -> str:
    stat = draw(st.sampled_from(sorted(REDUCTIONS)))
    inner = _expression(draw, depth)
    if draw(st.integers(0, 2)):
        return f"{draw(st.sampled_from(sorted(AXIS_SETS)))}_{stat}({inner})"
    return f"{stat}[{draw(st.sampled_from(AXES))}]({inner})"


def _template(draw: st.DrawFn) -> str:
    """A form with slots: lower-case letters are expressions, T a statistic."""
    return draw(st.sampled_from(TEMPLATES))


def _expression(draw: st.DrawFn, depth: int) -> str:
    if depth <= 0 or not draw(st.integers(0, 4)):
        return draw(st.sampled_from(LEAVES))
    kind = draw(st.integers(0, 9))
    if kind < 3:
        return f"{draw(st.sampled_from(UNARY))}({_expression(draw, depth - 1)})"
    if kind < 6:
        return _statistic(draw, depth - 1)
    form = _template(draw)
    slots = {slot: _expression(draw, depth - 1) for slot in "abc" if "{" + slot + "}" in form}
    if "{T}" in form:
        slots["T"] = _statistic(draw, depth - 1)
    return form.format(**slots)


@st.composite
def formulas(draw: st.DrawFn, depth: int = 5) -> str:
    """A whole formula: declarations for the names it uses, one or two results; one reads x."""
    count = draw(st.sampled_from([1, 1, 1, 2]))
    text = ", ".join(_expression(draw, depth) for _ in range(count))
    if not re.search(r"\bx\b", text):
        text = f"x + {text}"
    used = [line for name, line in DECLARATIONS.items() if name in text]
    return "; ".join([*used, text])
