"""Pieces of Markdown that the pages of `generate` are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a ``|`` inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", r"\|") for c in line) + " |" for line in lines
    )


def code(text: str) -> str:
    """Text as it is, in a cell or a sentence."""
    return f"`{text}`"


def codes(texts: Iterable[str]) -> str:
    """Several texts as they are, separated by commas."""
    return ", ".join(map(code, texts))


def block(text: str, language: str = "text") -> str:
    """Text as it is, on lines of its own."""
    return f"```{language}\n{text.rstrip()}\n```"


def prose(text: str) -> str:
    """Text in which no star begins an emphasis."""
    return text.replace("*", r"\*")


_WORD = r"\\mathrm\{(?:[^{}\\]|\\_)+\}"
_FACTOR = r"(?=\w|\\(?!cdot|end|left|text|[lgn]e\b)[a-z])"


def math(latex: str) -> str:
    r"""LaTeX of normc as GitHub takes it.

    GitHub refuses ``\operatorname``, so that a word is ``\mathrm``, which keeps no distance from
    what it is multiplied by: it gets a thin space. A ``|`` would end a cell of a table.
    """
    latex = latex.replace(r"\operatorname", r"\mathrm")
    latex = latex.replace(r"\left|", r"\left\lvert ").replace(r"\right|", r"\right\rvert")
    latex = re.sub(rf"(?<=[\w)}}]) (?={_WORD})", r" \\, ", latex)
    return re.sub(rf"({_WORD}) {_FACTOR}", r"\1 \\, ", latex)
