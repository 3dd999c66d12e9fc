"""Agreement: a compiled formula against the oracle in float64, value and every gradient.

Cases of every layout, rank and dtype, and the errors of each; how an error is judged is said in
`normc.ops.judge`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from normc.formula import Formula, formula_of
from normc.language.definition import Definition
from normc.language.geometry import Geometry
from normc.ops.judge import (
    FACTOR,
    TOLERANCE,
    Error,
    Tensors,
    amplification,
    distance,
    expect,
    gradients,
    magnitude,
)
from normc.ops.op import compile
from normc.reference import reference

DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Layout:
    """How x lies in memory: its rank, where its channels are, and its strides."""

    name: str
    rank: int
    channel_dim: int
    place: Callable[[Tensor], Tensor] = lambda t: t  # the same values over other memory


def _slice(t: Tensor) -> Tensor:
    """Every second column of a larger tensor, without its first row."""
    *outer, height, width = t.shape
    room = t.new_zeros((*outer, height + 1, 2 * width))
    return room[..., 1:, ::2].copy_(t)


LAYOUTS = (
    Layout("channels-first", 4, 1),
    Layout("channels-last", 4, 1, lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)),
    Layout("tokens", 3, -1),
    Layout("rows", 2, 1),
    Layout("slice", 4, 1, _slice),
    Layout("rank 3", 3, 1),
    Layout("rank 5", 5, 1),
)
"""Every kind of x a layer may meet; a new row is checked at once."""


@dataclass(frozen=True)
class Case:
    """Sizes, layout and dtype of one comparison; its numbers follow from the seed."""

    layout: Layout
    shape: tuple[int, ...]
    groups: int
    dtype: str
    seed: int

    @property
    def geometry(self) -> Geometry:
        """The shape seen as (N, G, K, S)."""
        return Geometry.of(self.shape, self.groups, self.layout.channel_dim)

    def show(self) -> str:
        """``channels-last (2, 6, 5, 3) groups 3 float32``."""
        return f"{self.layout.name} {self.shape} groups {self.groups} {self.dtype}"


def cases(
    seed: int = 0,
    count: int = len(LAYOUTS),
    ranks: Collection[int] = (2, 3, 4, 5),
    dtypes: Collection[str] = DTYPES,
) -> list[Case]:
    """``count`` random shapes in each dtype; the layouts of the given ranks take turns.

    >>> [case.layout.name for case in cases(seed=1, count=3, ranks=(2, 3), dtypes=["float64"])]
    ['tokens', 'rows', 'rank 3']
    """
    chance = random.Random(seed)
    layouts = [layout for layout in LAYOUTS if layout.rank in ranks]
    made: list[Case] = []
    for i in range(count):
        layout = layouts[i % len(layouts)]
        shape, groups = _shape(layout, chance)
        number = chance.randrange(2**31)
        made += [Case(layout, shape, groups, dtype, number) for dtype in dtypes]
    return made


def _shape(layout: Layout, chance: random.Random) -> tuple[tuple[int, ...], int]:
    """A shape small enough to be quick, with odd sizes, and a group count that divides it."""
    groups, inside = chance.choice((1, 2, 3, 4)), chance.choice((2, 3, 4, 5, 7))
    sizes = [chance.choice((2, 3, 5, 8, 9)) for _ in range(layout.rank - 1)]
    sizes.insert(layout.channel_dim % layout.rank, groups * inside)
    return tuple(sizes), groups


def compare(
    formula: Formula | str, case: Case, backend: str = "auto", *, eps: float = 1e-5
) -> list[Error]:
    """The errors of all results (``y``) and gradients (``d_x``, ``d_gamma``, ...) of one case.

    Triton's cases are on the GPU where there is one. Raises `BackendError` where the backend cannot
    run on the case's dtype.
    """
    parsed = formula_of(formula)
    given, cotangents = draw(parsed.definition, case)
    how = {"groups": case.groups, "eps": eps, "channel_dim": case.layout.channel_dim}
    oracle, op = reference(parsed), compile(parsed, backend)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

    def run(call: Callable[..., object], change: Callable[[Tensor], Tensor]) -> Tensors:
        tensors = {name: change(t) for name, t in given.items()}
        return gradients(lambda **t: call(**t, **how), tensors, [change(t) for t in cotangents])

    amplified = amplification(parsed.definition, case.geometry, eps)
    wanted = expect(lambda change: run(oracle, change), case.dtype, amplified)
    return wanted.errors(run(op, lambda t: t.to(device)))


def draw(definition: Definition, case: Case) -> tuple[Tensors, list[Tensor]]:
    """The tensors of a case by name, x first, and one cotangent per result."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype, place, geometry = getattr(torch, case.dtype), case.layout.place, case.geometry

    def normal(shape: tuple[int, ...], mean: float, spread: float) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        full = shape == case.shape
        values = (mean + spread * numbers).to(dtype)
        return place(values) if full else values

    given = {"x": normal(case.shape, 0.3, 1.5)}
    for row in definition.inputs:
        given[row.name] = normal(geometry.shape_of(row.axes), 0.2, 1.0)
    for row in definition.params:
        given[row.name] = normal(geometry.shape_of(row.axes), row.init, 0.4)
    return given, [normal(case.shape, 0.0, 1.0) for _ in definition.results]


__all__ = [
    "DTYPES",
    "FACTOR",
    "LAYOUTS",
    "TOLERANCE",
    "Case",
    "Error",
    "Layout",
    "Tensors",
    "cases",
    "compare",
    "distance",
    "draw",
    "gradients",
    "magnitude",
]
