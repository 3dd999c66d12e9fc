"""Agreement: a compiled formula against the oracle in float64, value and every gradient.

    error  = the largest difference / the largest magnitude of the oracle's result
    passes   error <= TOLERANCE[dtype]                          rule "tolerance"
          or error <= FACTOR * the formula's own noise          rule "eager"

The noise is the error of plain torch in the same dtype or, if that is larger (in float64 plain
torch is the oracle), how far the oracle moves when its inputs move by one unit in the last place.
It matters for ill-conditioned formulas alone. A gradient that is zero to rounding is judged as if
it were 1 large, as cotangents are; where a statistic has a single element, so that terms of size
1/sqrt(eps) cancel, their rounding is noise too. NaN and infinities have to be the oracle's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from normc.formula import Formula, parse
from normc.language.definition import Definition
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Geometry
from normc.ops.op import compile
from normc.reference import reference

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""The error that needs no excuse, per storage type."""

FACTOR = 8.0
"""How many times the formula's own noise a kernel may be off."""

DTYPES = ("float64", "float32")

Tensors = dict[str, Tensor]


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


@dataclass(frozen=True)
class Error:
    """How far one result or gradient is from the oracle's."""

    tensor: str  # "y", "d_x", "d_gamma", ...
    error: float  # relative to the oracle's largest magnitude; infinite where NaN differ
    noise: float  # the formula's own, in this dtype
    tolerance: float

    @property
    def rule(self) -> Literal["tolerance", "eager"]:
        """By which rule it is judged: the noise counts only where the tolerance is exceeded."""
        return "tolerance" if self.error <= self.tolerance else "eager"

    @property
    def limit(self) -> float:
        """The largest error that the rule allows."""
        excused = FACTOR * self.noise if self.rule == "eager" else 0.0
        return max(self.tolerance, excused)

    @property
    def ok(self) -> bool:
        """Whether the result passes."""
        return self.error <= self.limit


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
    parsed = parse(formula) if isinstance(formula, str) else formula
    given, cotangents = draw(parsed.definition, case)
    how = {"groups": case.groups, "eps": eps, "channel_dim": case.layout.channel_dim}
    oracle, op = reference(parsed), compile(parsed, backend)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

    def run(call: Callable[..., object], change: Callable[[Tensor], Tensor]) -> Tensors:
        tensors = {name: change(t) for name, t in given.items()}
        return gradients(lambda **t: call(**t, **how), tensors, [change(t) for t in cotangents])

    exact = run(oracle, lambda t: t.double())
    ours = run(op, lambda t: t.to(device))
    plain = [run(oracle, lambda t: t), run(oracle, _nudge)]
    largest = max(magnitude(want) for want in exact.values())
    least, unit = 1e-9 * largest, torch.finfo(getattr(torch, case.dtype)).eps
    amplified = eps**-0.5 if _single(parsed.definition, case.geometry) else 0.0
    rounding = unit * max(largest, amplified)
    errors: list[Error] = []
    for name, want in exact.items():
        scale = magnitude(want) if magnitude(want) > least else 1.0
        noise = max(rounding / scale, *(distance(rough[name], want, scale) for rough in plain))
        error = distance(ours[name], want, scale)
        errors.append(Error(name, error, noise, TOLERANCE[case.dtype]))
    return errors


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


def gradients(
    call: Callable[..., object], given: Mapping[str, Tensor], cotangents: list[Tensor]
) -> Tensors:
    """The results of a call, ``y`` or ``y0, y1, ...``, and ``d_`` of everything it was given."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    value = call(**leaves)
    results = cast(tuple[Tensor, ...], value if isinstance(value, tuple) else (value,))
    pairs = [(y, d) for y, d in zip(results, cotangents, strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs],
        list(leaves.values()),
        [d for _, d in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    names = ["y"] if len(results) == 1 else [f"y{i}" for i in range(len(results))]
    names += [f"d_{name}" for name in leaves]
    return dict(zip(names, (*(y.detach() for y in results), *found), strict=True))


def magnitude(tensor: Tensor) -> float:
    """The largest finite absolute value; 0 if there is none."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def distance(found: Tensor, want: Tensor, scale: float) -> float:
    """The largest difference in units of ``scale``; infinite where NaN or infinities differ."""
    a, b = found.detach().double().cpu(), want.detach().double().cpu()
    finite = b.isfinite()
    same = a.shape == b.shape and torch.equal(a.isfinite(), finite)
    if not same or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    return magnitude((a - b)[finite]) / scale


def _single(definition: Definition, geometry: Geometry) -> bool:
    """Whether a statistic of the formula is over one element."""
    nodes = postorder(definition.results)
    return any(isinstance(node, Reduce) and geometry.count(node.over) == 1 for node in nodes)


def _nudge(t: Tensor) -> Tensor:
    """Every number moved by one unit in its last place, up or down at random, as float64."""
    generator = torch.Generator().manual_seed(t.numel())
    signs = torch.randint(0, 2, t.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return t.double() * (1 + torch.finfo(t.dtype).eps * signs)
