"""Checks of the numbers that a caller gives: from there on they are Python's own, and fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import SupportsFloat

from normc.errors import NormcError


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number from ``least`` on, NumPy's as well as Python's; else `NormcError`."""
    return _whole(name, value, (value,), least, "a whole number")[0]


def whole_ones(
    name: str, value: object, counts: Sequence[int], least: int, told: str
) -> tuple[int, ...]:
    """As many whole numbers as ``counts`` allows, of which a single one stands for two.

    ``told`` says in the `NormcError` what was expected.

    >>> whole_ones("stride", 3, (2,), 1, "one or two numbers")
    (3, 3)
    """
    given = value if isinstance(value, Sequence) else (value, value)
    return _whole(name, value, given if len(given) in counts else (), least, told)


def _whole(
    name: str, value: object, given: Sequence[object], least: int, told: str
) -> tuple[int, ...]:
    try:
        found = tuple([index(one) for one in given])  # pyright: ignore[reportArgumentType]
    except TypeError:  # a fraction, None, text
        found = ()
    if not found or min(found) < least:
        raise NormcError(f"{name} must be {told}, from {least} on, not {value!r}")
    return found


def real(
    name: str, value: object, least: float = 0.0, below: float = math.inf, *, above: bool = False
) -> float:
    """A number from ``least`` on, or ``above`` it, that is less than ``below``; else `NormcError`.

    >>> real("dropout_p", 0.5, below=1)
    0.5
    """
    number = float(value) if isinstance(value, SupportsFloat) else math.nan
    if least <= number < below and not (above and number == least):
        return number
    start = f"above {least:g}" if above else f"from {least:g} on"
    end = "" if below == math.inf else f" and below {below:g}"
    raise NormcError(f"{name} must be a finite number {start}{end}, not {value!r}")
