"""SVG: the small part of it that charts are made of, with axes whose ticks are round numbers.

Every text and every attribute is escaped where it enters an element, so nothing that a run contains
can become markup. Colours are classes, which the page's style gives them, in light and in dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

MINUS = "\N{MINUS SIGN}"


def element(tag: str, *inside: str, **attributes: object) -> Markup:
    """An element; in the name of an attribute _ stands for -, and one at the end for nothing.

    >>> print(element("text", "a < b", x=1.5, class_="tick"))
    <text x="1.5" class="tick">a &lt; b</text>
    """
    words = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _plain(value))
        for name, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(tag, join(words), join(inside))


def join(parts: Iterable[str]) -> Markup:
    """Several elements or texts in a row; texts are escaped."""
    return Markup("").join(parts)


def breakable(text: str) -> Markup:
    """A formula's text, which may be broken into lines behind its operators and brackets.

    >>> print(breakable("tanh(x)**2"))
    tanh(<wbr>x)**<wbr>2
    """
    parts = re.split(r"(?<=[(,/+*-])(?=[^*])", text)
    return Markup("<wbr>").join(parts)


def picture(width: float, height: float, *inside: str, **attributes: object) -> Markup:
    """A whole picture, which scales with the page."""
    return element("svg", *inside, viewBox=f"0 0 {_plain(width)} {_plain(height)}", **attributes)


def _plain(value: object) -> object:
    """A number in as few digits as a screen can show."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


# --- numbers --------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in a range, about as many as wished: multiples of 1, 2 or 5 times ten to some.

    >>> ticks(0.81, 0.97)
    [0.85, 0.9, 0.95]
    """
    if not low < high:
        return [low]
    step = _step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _step(low: float, high: float, count: int) -> float:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many decimals as the finest of them needs.

    >>> labels([0.95, 1.0]), labels([2e-7, 4e-7])
    (['0.95', '1.00'], ['2e−07', '4e−07'])
    """
    largest = max(map(abs, values), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-4:
        count = len(set(values))
        exact = (d for d in range(3, 16) if len({f"{v:.{d}g}" for v in values}) == count)
        digits = next(exact, 16)
        return [signed(f"{v:.{digits}g}") for v in values]
    decimals = max((len(f"{v:.12g}".partition(".")[2]) for v in values), default=0)
    return [signed(f"{v:.{decimals}f}") for v in values]


def signed(text: str) -> str:
    """A number's text with a minus sign in place of the hyphen."""
    return text.replace("-", MINUS)


# --- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A range of numbers, and the pixels that it is drawn on."""

    low: float
    high: float
    start: float
    end: float
    factor: float = 1.0  # what ticks are multiplied by: 100 for per cent

    @staticmethod
    def over(
        values: Sequence[float],
        pixels: tuple[float, float],
        factor: float = 1.0,
        most: float | None = None,
    ) -> Axis:
        """One that holds all of some values, with room at both ends, and no tick above ``most``."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        return Axis(low - room, high + room if most is None else min(high + room, most), *pixels,
                    factor)  # fmt: skip

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside are drawn at the end."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Pixel and text of each tick."""
        found = ticks(self.low * self.factor, self.high * self.factor, count)
        return [(self(v / self.factor), t) for v, t in zip(found, labels(found), strict=True)]


def frame(x: Axis, y: Axis, names: tuple[str, str], counts: tuple[int, int] = (5, 5)) -> Markup:
    """Grid, ticks, and what the axes are of: written along them, not turned on its side."""
    parts: list[Markup] = []
    for at, text in x.ticks(counts[0]):
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="grid"))
        parts.append(element("text", text, x=at, y=y.start + 16, class_="tick middle"))
    for at, text in y.ticks(counts[1]):
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(element("text", text, x=x.start - 7, y=at + 4, class_="tick end"))
    across, up = names
    parts.append(element("text", f"{across} →", x=x.end, y=y.start + 34, class_="axis end"))
    parts.append(element("text", f"↑ {up}", x=x.start - 34, y=y.end - 10, class_="axis"))
    return element("g", *parts, aria_hidden="true")
