"""Curves: how far a search has come after each evaluation, and small bars and lines in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from normc.search.report.svg import Axis, element, frame, picture

LineKind = Literal["run", "random", "own"]


@dataclass(frozen=True)
class Line:
    """A quantity after evaluation 1, 2, ..."""

    label: str
    kind: LineKind
    values: Sequence[float]


def curves(lines: Sequence[Line], name: str, size: tuple[int, int]) -> Markup:
    """Steps from evaluation to evaluation; a script adds a rule that reads them off."""
    width, height = size
    longest = max((len(line.values) for line in lines), default=0)
    x = Axis(0, max(1, longest), 52, width - 58)
    y = Axis.over(_seen(lines), (height - 46, 30))
    counts = (max(4, width // 110), 5)
    parts = [frame(x, y, ("evaluations", name), counts)]
    for line in reversed(lines):  # the run itself is drawn last
        parts.append(element("path", d=_steps(line.values, x, y), class_=f"line {line.kind}"))
    parts += _ends(lines, x, y)
    rule = element("line", y1=y.end, y2=y.start, x1=0, x2=0, class_="rule")
    about = f"{name} after each evaluation, {longest} of them; arrow keys go through them"
    return picture(width, height, *parts, rule, class_="curves", role="group", tabindex=0,
                   aria_label=about, data_start=x.start, data_end=x.end,
                   data_most=x.high)  # fmt: skip


def _seen(lines: Sequence[Line]) -> list[float]:
    """What the axis has to hold: the first candidates of a run may be far below all others."""
    found: list[float] = []
    for line in lines:
        risen = [v for v in line.values if v > 0]
        found += risen[len(risen) // 50 :]
    return found or [0.0, 1.0]


def _steps(values: Sequence[float], x: Axis, y: Axis) -> str:
    """A path that turns only where the value changes; nothing is drawn before there is a value."""
    words: list[str] = []
    last = 0.0
    for count, value in enumerate(values, 1):
        if value != last:
            words.append(f"H{x(count):.1f}V{y(value):.1f}" if words
                         else f"M{x(count):.1f} {y(value):.1f}")  # fmt: skip
            last = value
    return " ".join([*words, f"H{x(len(values)):.1f}"]) if words else "M0 0"


def _ends(lines: Sequence[Line], x: Axis, y: Axis) -> list[Markup]:
    """The last value of each line: behind it, and those that would overlap are moved apart."""
    known = [line for line in lines if line.values and line.values[-1] > 0]
    found: list[Markup] = []
    before = -100.0
    for line in sorted(known, key=lambda one: y(one.values[-1])):
        across, down = x(len(line.values)), y(line.values[-1])
        if across < x.end - 1:  # it ends earlier than others, which may go on at the same height
            down -= 6
        else:
            before = down = max(down + 4, before + 13)
        found.append(element("text", value_text(line.values[-1]), x=across + 6, y=down,
                             class_=f"label {line.kind}"))  # fmt: skip
    return found


def value_text(value: float) -> str:
    """A hypervolume."""
    return f"{value:.3f}" if 1e-3 <= value < 1e3 else f"{value:.3g}"


def bar(before: int, kept: int, whole: int) -> Markup:
    """What comes to a stage: the part that goes on, and behind it the part that does not."""
    scale = 100 / whole if whole else 0.0
    return picture(100, 10, element("rect", width=100.0, height=10, class_="all"),
                   element("rect", width=kept * scale, height=10, class_="kept"),
                   element("rect", x=kept * scale, width=(before - kept) * scale, height=10,
                           class_="lost"),
                   class_="bar", preserveAspectRatio="none", aria_hidden="true")  # fmt: skip


def spark(values: Sequence[float]) -> Markup:
    """A line without axes: from the first generation to the last."""
    x, y = Axis(0, max(1, len(values) - 1), 4, 116), Axis.over(values, (24, 4))
    points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
    end = element("circle", cx=x(len(values) - 1), cy=y(values[-1]), r=3)
    return picture(120, 28, element("polyline", points=points), end, class_="spark",
                   aria_hidden="true")  # fmt: skip
