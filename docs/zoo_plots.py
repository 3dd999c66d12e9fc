"""The figures of the zoo: y of one element against x of that element, and the slope of that curve.

All other elements stay what they are: a fixed sample of standard normal numbers, which everything
is computed on by the oracle, in float64. Parameters are where they start, other inputs are 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from normc.formula import zoo
from normc.language.geometry import Geometry
from normc.language.zoo import ZOO, Entry
from normc.reference import reference
from normc.search.report.svg import Axis, element, frame

FOLDER = Path(__file__).parent / "figures" / "zoo"

SHAPE = (4, 16, 4, 4)
GROUPS = 4
ELEMENT = (0, 0, 0, 0)
REACH = 4
POINTS = 160  # an even number: none is at 0, where the slope of a kink is a convention

STEEP = 3  # slopes above this multiple of the largest y do not stretch the axis

WIDTH, HEIGHT = 340, 226
STYLE = (
    "text{font:11px sans-serif;fill:#7d8590}.middle{text-anchor:middle}.end{text-anchor:end}"
    ".grid,.zero{stroke:#7d8590;stroke-opacity:.25}.zero{stroke-opacity:.8}"
    "path{fill:none;stroke-linejoin:round}path.y{stroke:#2f7fe0;stroke-width:2}text.y{fill:#2f7fe0}"
    "path.slope{stroke:#d97f35;stroke-width:1.2}text.slope{fill:#d97f35}"
)
"""Colours that can be seen on white and on black: a picture does not know the page's."""


def figures() -> dict[str, str]:
    """Every figure as SVG, by the name of its layer."""
    return {name: figure(row) for name, row in ZOO.items()}


def write() -> None:
    """Write every figure, and remove those of layers that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.svg"):
        if path.stem not in ZOO:
            path.unlink()
    for name, text in figures().items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def response(row: Entry) -> tuple[list[float], list[float]]:
    """y at `POINTS` values of x, and the derivative at each, of the first result of a layer."""
    oracle, x = reference(zoo[row.name]), sample()
    groups = GROUPS if row.groups == "auto" else row.groups
    geometry = Geometry.of(SHAPE, groups, 1)
    inputs = {i.name: x.new_ones(geometry.shape_of(i.axes)) for i in zoo[row.name].inputs}
    here = torch.zeros(SHAPE, dtype=torch.bool)
    here[ELEMENT] = True

    def one(value: Tensor) -> Tensor:
        results = oracle(torch.where(here, value, x), groups=groups, eps=row.eps, **inputs)
        return (results[0] if isinstance(results, tuple) else results)[ELEMENT]

    slopes, values = vmap(grad_and_value(one))(torch.tensor(places(), dtype=x.dtype))
    return values.tolist(), slopes.tolist()


def sample() -> Tensor:
    """Standard normal numbers; of a generator whose stream no version of numpy changes."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal(SHAPE))


def places() -> list[float]:
    """The values of x, from end to end."""
    return np.linspace(-REACH, REACH, POINTS).tolist()


def figure(row: Entry) -> str:
    """The curves of a layer as SVG."""
    values, slopes = response(row)
    assert all(map(isfinite, [*values, *slopes])), f"{row.name} has a curve that is not finite"
    most = STEEP * max(map(abs, values))
    x = Axis(-REACH, REACH, 42, WIDTH - 10)
    y = Axis.over([*values, *(s for s in slopes if abs(s) <= most)], (HEIGHT - 40, 24))
    parts = [
        element("style", STYLE),
        frame(x, y, ("x", "y"), (2 * REACH, 5)),
        *_zeros(x, y),
        element("path", d=_path(x, y, slopes), class_="slope"),
        element("path", d=_path(x, y, values), class_="y"),
        element("text", "y", x=x.end - 40, y=y.end - 10, class_="y end"),
        element("text", "dy/dx", x=x.end, y=y.end - 10, class_="slope end"),
    ]
    return f"{_whole(*parts)}\n"


def _whole(*parts: str) -> str:
    size = {"width": WIDTH, "height": HEIGHT, "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size)


def _zeros(x: Axis, y: Axis) -> list[str]:
    """The lines where x is 0 and, if it is in sight, where y is."""
    upright = element("line", x1=x(0), x2=x(0), y1=y.start, y2=y.end, class_="zero")
    level = element("line", x1=x.start, x2=x.end, y1=y(0), y2=y(0), class_="zero")
    return [upright, level] if y.low < 0 < y.high else [upright]


def _path(x: Axis, y: Axis, values: Sequence[float]) -> str:
    points = zip(places(), values, strict=True)
    return "M" + " ".join(f"{x(at):.1f} {y(value):.1f}" for at, value in points)
