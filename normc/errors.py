"""Errors: what went wrong, where in the formula, and what to do about it.

Every error a user can cause is a `NormcError` and a `ValueError`. A `FormulaError` points at its
place in the text with a caret; a `ShapeError` names the input or sub-expression that does not fit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NormcError(ValueError):
    """Base of every error that normc raises on purpose."""


class FormulaError(NormcError):
    """The text is not a formula; carries the text, the position and what was expected."""

    def __init__(self, message: str, text: str = "", position: int | None = None) -> None:
        self.message = message
        self.text = text
        self.position = position
        super().__init__(message if position is None else f"{message}\n{frame(text, position)}")


class ShapeError(NormcError):
    """A tensor's shape, dtype or device, a group count or an argument does not fit the formula."""


class BackendError(NormcError):
    """A backend cannot be used here, or refused the code it was given."""


class CompileError(NormcError):
    """A formula among many that failed: ``formula`` is its text, ``__cause__`` what went wrong."""

    def __init__(self, formula: str, message: str) -> None:
        self.formula = formula
        self.message = message
        super().__init__(formula, message)

    def __str__(self) -> str:
        return f"`{self.formula}`: {self.message}"


class CacheError(NormcError):
    """The cache folder is not safe to use."""


def frame(text: str, position: int, width: int = 76) -> str:
    """The line of ``text`` around ``position`` with a caret under it, cut to ``width``."""
    position = min(position, len(text))
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)]
    column = position - start
    left = max(0, column - width // 2)
    shown = "".join(c if c.isprintable() else "?" for c in line[left : left + width])
    dots = "..." if left else ""
    return f"    {dots}{shown}\n    {' ' * (len(dots) + column - left)}^"


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean `x`?)`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""
