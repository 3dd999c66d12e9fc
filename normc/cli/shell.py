"""Shell: what commands share, the way to a formula and the way to the screen."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from normc.formula import Formula


class Backend(str, Enum):
    """The backends by name."""

    c = "c"
    triton = "triton"
    tape = "tape"
    torch = "torch"


class DType(str, Enum):
    """The storage types by name."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Layout(str, Enum):
    """The orders of axes in memory."""

    channels_first = "channels-first"
    channels_last = "channels-last"


FormulaText = Annotated[
    str, typer.Argument(metavar="FORMULA", help="A formula, or the name of one in the zoo.")
]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain text, without colours.")]


def find_formula(text: str) -> Formula:
    """The formula of a text; a single word other than ``x`` is a name in the zoo."""
    from normc.formula import formula_of

    return formula_of(text)


def find_shape(text: str) -> tuple[int, ...]:
    """The sizes of x in an option, with commas; `ShapeError` for what are none."""
    from normc.errors import ShapeError

    sizes = [size.strip() for size in text.split(",")]
    if not all(size.isdecimal() and len(size) <= 18 and int(size) for size in sizes):
        raise ShapeError(f"--shape is {text!r}: expected sizes from 1 with commas, as 16,128,56,56")
    return tuple(map(int, sizes))


def console(no_color: bool = False) -> Console:
    """The screen; where output is no terminal it is plain, and wide enough for tables."""
    from rich.console import Console

    screen = Console(no_color=True if no_color else None, highlight=False)
    if not screen.is_terminal:
        screen.width = 120
    return screen


def write(screen: Console, text: str) -> None:
    """Print text exactly as it is: no markup, no wrapping."""
    screen.print(text, markup=False, highlight=False, soft_wrap=True)
