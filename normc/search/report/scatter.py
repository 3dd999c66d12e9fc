"""Scatter: candidates and known layers by their scores, two at a time, or along one line.

A point is found again by its key: the tooltip's text is looked up under it, and the same candidate
in other panels. Arrow keys go from point to point, so that a panel is one stop of the Tab key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from markupsafe import Markup

from normc.search.report.scores import Score
from normc.search.report.svg import Axis, element, frame, join, picture

Kind = Literal["pale", "front", "known"]

KINDS: tuple[Kind, ...] = ("pale", "known", "front")
"""In the order in which points are drawn, so that those on the front lie on top."""

SIDE, LARGE = (360, 340), (560, 440)
"""Of a panel among several, or on a phone, and of a single one."""

LETTER = 7.0
"""How wide a letter of a label is."""


@dataclass(frozen=True)
class Dot:
    """A candidate or a known layer."""

    key: str
    kind: Kind
    values: tuple[float, ...]
    title: str  # all that is said of it
    label: str = ""  # what stands beside it


def pairs(count: int) -> list[tuple[int, int]]:
    """Which scores are drawn against each other: all pairs of up to four, else neighbours."""
    if count <= 4:
        return list(combinations(range(count), 2))
    return [(i, (i + 1) % count) for i in range(count)]


def panels(dots: Sequence[Dot], scores: Sequence[Score]) -> list[Markup]:
    """One picture for each pair of scores; a single pair in two sizes, the large one first."""
    found = [(scores[i], scores[j]) for i, j in pairs(len(scores))]
    if len(found) == 1:
        return [panel(dots, *found[0], size, stairs=True) for size in (LARGE, SIDE)]
    return [panel(dots, across, up, SIDE, stairs=False) for across, up in found]


def panel(
    dots: Sequence[Dot], across: Score, up: Score, size: tuple[int, int], stairs: bool
) -> Markup:
    """One score against another; with stairs, the line below which all is dominated."""
    width, height = size
    x = across.axis([d.values[across.place] for d in dots], (46, width - 12))
    y = up.axis([d.values[up.place] for d in dots], (height - 46, 30))
    at = [(d, x(d.values[across.place]), y(d.values[up.place])) for d in dots]
    parts = [frame(x, y, (across.label, up.label))]
    if stairs:
        parts.append(_stairs([(a, b) for d, a, b in at if d.kind == "front"], x, y))
    name = f"{across.name} and {up.name}: {len(dots)} points, arrow keys go through them"
    return picture(width, height, *parts, _points(at, (width, height)), class_="scatter",
                   role="group", aria_label=name)  # fmt: skip


def strip(dots: Sequence[Dot], score: Score, width: int) -> Markup:
    """The only score there is, along one line; points are moved up and down to be seen."""
    height = 150
    x = score.axis([d.values[0] for d in dots], (14, width - 14))
    middle = 58.0
    parts = [
        element("line", x1=p, x2=p, y1=18, y2=height - 50, class_="grid")
        for p, _ in x.ticks(width // 80)
    ]
    for p, text in x.ticks(width // 80):
        parts.append(element("text", text, x=p, y=height - 34, class_="tick middle"))
    parts.append(element("text", f"{score.label} →", x=width - 14, y=height - 14,
                         class_="axis end"))  # fmt: skip
    at = [(d, x(d.values[0]), middle + _stray(i, d)) for i, d in enumerate(dots)]
    name = f"{score.name}: {len(dots)} points, arrow keys go through them"
    return picture(width, height, element("g", *parts, aria_hidden="true"),
                   _points(at, (width, height)), class_="scatter", role="group",
                   aria_label=name)  # fmt: skip


def _stray(i: int, dot: Dot) -> float:
    """How far a point is moved: by its place, spread evenly; those that matter stay in the line."""
    return 56 * ((i * 0.618034) % 1 - 0.5) if dot.kind == "pale" else 0.0


# --- points ---------------------------------------------------------------------------------------

Placed = tuple[Dot, float, float]


def _points(at: Sequence[Placed], size: tuple[float, float]) -> Markup:
    ordered = sorted(at, key=lambda one: KINDS.index(one[0].kind))
    entry = ordered[-1][0].key if ordered else ""
    marks = [_mark(d, x, y, d.key == entry) for d, x, y in ordered]
    return join([*marks, element("g", *_labels(ordered, size), aria_hidden="true")])


def _mark(dot: Dot, x: float, y: float, entry: bool) -> Markup:
    """A circle, or a diamond for what was known before; the Tab key comes to one of them."""
    if dot.kind == "known":
        shape = element("path", d="M0-6.5 6.5 0 0 6.5-6.5 0z")
    else:
        shape = element("circle", r=5 if dot.kind == "front" else 3)
    return element("g", element("title", dot.title), shape, class_=f"dot {dot.kind}",
                   transform=f"translate({x:.1f} {y:.1f})", data_key=dot.key, role="img",
                   tabindex=0 if entry else -1)  # fmt: skip


def _stairs(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Markup:
    """From the left edge along the front to the bottom."""
    line = f"M{x.start:.1f} {min((b for _, b in points), default=y.start):.1f}"
    for across, up in sorted(points):
        line += f"V{up:.1f}H{across:.1f}"
    return element("path", d=line + f"V{y.start:.1f}", class_="stairs")


# --- labels ---------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _labels(at: Sequence[Placed], size: tuple[float, float]) -> Iterator[Markup]:
    """Names beside points; where there is no room a known layer's is farther away, with a line.

    A candidate's number is left out there: it is in the tooltip.
    """
    marks = [(_box(x, y, 12, 12), 12.0) for d, x, y in at if d.kind != "pale"]
    pale = [(_box(x, y, 5, 5), 2.0) for d, x, y in at if d.kind == "pale"]
    taken = [*marks, *pale]
    for dot, x, y in at:
        if dot.label:
            width = LETTER * len(dot.label) + 4
            cost, far, box = min(_spots(x, y, width, size, taken))
            if dot.kind == "known" or (cost < 10 and not far):
                taken.append((box, 50.0))
                yield _label(dot, x, y, far, box)


def _label(dot: Dot, x: float, y: float, far: float, box: Box) -> Markup:
    text = element("text", dot.label, x=(box[0] + box[2]) / 2, y=box[3] - 3,
                   class_=f"label middle {dot.kind}")  # fmt: skip
    if not far:
        return text
    end = min(max(x, box[0] + 4), box[2] - 4), min(max(y, box[1] + 1), box[3] - 1)
    return element("line", x1=x, y1=y, x2=end[0], y2=end[1], class_="leader") + text


def _spots(
    x: float, y: float, width: float, size: tuple[float, float], taken: Sequence[tuple[Box, float]]
) -> Iterator[tuple[float, float, Box]]:
    """Where a label may be: what it would cover there, how far away that is, and its box."""
    for far in (0.0, 16.0, 32.0, 48.0, 64.0, 80.0):
        for i in range(16):
            right, down = math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)
            across = x + right * (width / 2 + 8 + far)
            box = _box(across, y + down * (15 + far), width, 13)
            if box[0] > 2 and box[2] < size[0] and box[1] > 16 and box[3] < size[1] - 46:
                covered = sum(weight for other, weight in taken if _meet(box, other))
                yield covered + far / 8 + 0.1 * (i % 8 != 0), far, box
    yield 1e3, 0.0, _box(min(max(x, width / 2), size[0] - width / 2), y - 16, width, 13)


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
