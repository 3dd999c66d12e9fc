"""Math: formulas as MathML, which browsers set on their own, without a script or a font of ours.

latex2mathml knows most of the LaTeX that `normc.program.latex` writes; the rest is put into words
that it knows. What it returns is not taken as text, in which it escapes nothing, but as a tree, of
which only the elements and attributes named here are written again.
"""

from __future__ import annotations

import html
import re
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from normc.formula import parse
from normc.search.report.svg import element

LONGEST = 4000
"""Letters of LaTeX beyond which a formula is easier to read as text."""

TAGS = frozenset(
    {"math", "mrow", "mi", "mo", "mn", "mtext", "msub", "msup", "msubsup", "mfrac", "msqrt"}
    | {"mtable", "mtr", "mtd", "mspace"}
)
ATTRIBUTES = frozenset({"mathvariant", "stretchy", "fence", "form", "displaystyle", "width"})

_WORD = re.compile(r"\\(?:mathrm|operatorname)\{((?:[^{}\\]|\\_)+)\}")
"""A word of several letters; latex2mathml takes one with an underscore for a product of letters."""


_NAMED = {"lspace": "0.17em", "rspace": "0", "form": "prefix", "stretchy": "false"}
"""How a word of several letters is set: upright, and a little apart from what is before it."""


@lru_cache(maxsize=4096)
def rendered(text: str) -> Markup | None:
    """A formula as MathML; None where there is no way to, so that its text has to do.

    That is for a text that is no formula, a very long one, and where latex2mathml is not installed.
    """
    try:
        from latex2mathml.converter import convert_to_element

        latex = parse(text).latex().removeprefix("y = ")
        if len(latex) > LONGEST:
            return None
        return _written(convert_to_element(_familiar(latex)))
    except Exception:  # of a foreign library, on any text: a page is made all the same
        return None


def _familiar(latex: str) -> str:
    """The same in words that latex2mathml knows."""
    latex = latex.replace("{aligned}", "{align*}")
    return _WORD.sub(lambda m: rf"\text{{{m[1]}}}".replace(r"\_", "_"), latex)


def _written(node: Any) -> Markup:
    """An element with what is in it; an element of another kind is an error."""
    if node.tag not in TAGS:
        raise ValueError(f"no element of a formula: {node.tag}")
    tag, text = node.tag, html.unescape(node.text or "")
    kept = {name: value for name, value in node.attrib.items() if name in ATTRIBUTES}
    if tag == "math":
        kept = {"displaystyle": "true"}
    if tag in ("mi", "mo", "mtext") and re.fullmatch(r"[^\W\d]\w+", text):
        tag, kept = "mo", _NAMED  # the name of a function, or of a parameter
    if text == "/":
        kept = {"lspace": "0", "rspace": "0"}  # between the axes of a statistic
    return element(tag, text, *map(_written, node), **kept)
