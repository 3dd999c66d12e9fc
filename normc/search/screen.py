"""Screen: what can be said of a layer before anything is trained, at thousands a second.

    blind         what is left without dead nodes does not read x
    series        a statistic crosses samples, and none may (series S)
    flat          without samples, channels or positions to vary over: a statistic alone
    form          the same expression as a layer that passed, but for the order of operands
    value         not finite on random input, with parameters at their start or elsewhere
    constant      the same value everywhere, up to rounding
    duplicate     equal, in value, to a layer that passed
    gradient      the gradient of x is not finite, or zero up to rounding

Values are computed in float64 by plain torch operations on a tensor of a few dozen numbers. Two
layers are one if they agree there, parameters being random, in six digits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from normc.language.axes import FULL
from normc.language.definition import Definition, X
from normc.language.expr import Expr, Var
from normc.language.geometry import Geometry
from normc.language.reductions import EPS
from normc.reference import evaluate, view
from normc.search.genome import BETA, GAMMA, Genome, crosses_samples, form, reads_input
from normc.search.space import Space

Series = Literal["B", "S"]
"""B: statistics may cross samples; S: none of a layer's may, once its dead nodes are gone."""

STAGES = ("blind", "series", "flat", "form", "value", "constant", "duplicate", "gradient")
GEOMETRY = Geometry.of((4, 6, 2, 3), 2)
DIGITS = 6
NOISE = 1e-9
"""What differs by less, relative to the size of values, differs by rounding."""


@dataclass(frozen=True)
class Screened:
    """What became of a genome: the stage that rejected it, or none."""

    genome: Genome
    expr: Expr
    rejected: str  # by which stage; empty if it passed
    fingerprint: str = ""  # of its values, for those that have any
    form: bytes = b""  # of its expression, for those that read x


@dataclass
class Screen:
    """Judges genomes one after the other, and counts; remembers what passed."""

    space: Space
    series: Series = "B"
    full: bool = True
    eps: float = 1e-5
    seen: set[str] = field(default_factory=set[str])
    forms: set[bytes] = field(default_factory=set[bytes])
    counts: Counter[str] = field(default_factory=Counter[str])

    def __call__(self, genome: Genome) -> Screened:
        """Judge a genome; equal layers pass once."""
        found = self.judge(genome)
        self.counts["screened"] += 1
        self.counts[found.rejected or "passed"] += 1
        if not found.rejected:
            self.remember(found)
        return found

    def remember(self, found: Screened) -> None:
        """Let layers that equal it be rejected."""
        self.seen.add(found.fingerprint)
        self.forms.add(found.form)

    def judge(self, genome: Genome) -> Screened:
        """The same, without counting it or remembering it."""
        expr = genome.expr(self.space)
        if not reads_input([expr]):
            return Screened(genome, expr, "blind")
        if self.series == "S" and crosses_samples(expr):
            return Screened(genome, expr, "series")
        if self.full and expr.axes != FULL:
            return Screened(genome, expr, "flat")
        name = form(expr)
        if name in self.forms:
            return Screened(genome, expr, "form")
        return replace(self._values(genome, expr), form=name)

    def _values(self, genome: Genome, expr: Expr) -> Screened:
        with torch.no_grad():
            (value,) = evaluate([expr], self.probes.elsewhere, GEOMETRY, self.eps)
        if not bool(value.isfinite().all()):
            return Screened(genome, expr, "value")
        if value.amax() - value.amin() <= NOISE * value.abs().amax():
            return Screened(genome, expr, "constant")
        mark = fingerprint(value)
        if mark in self.seen:
            return Screened(genome, expr, "duplicate", mark)
        return Screened(genome, expr, self._gradient(expr), mark)

    def _gradient(self, expr: Expr) -> str:
        """How the layer fails where training begins."""
        (value,) = evaluate([expr], self.probes.start, GEOMETRY, self.eps)
        if not bool(value.isfinite().all()):
            return "value"
        if not value.requires_grad:
            return "gradient"
        (grad,) = torch.autograd.grad((value * self.probes.weights).sum(), self.probes.x)
        usual = value.detach().abs().amax() / self.probes.x.detach().abs().amax()
        there = bool(grad.isfinite().all()) and bool(grad.abs().amax() > NOISE * usual)
        return "" if there else "gradient"

    @cached_property
    def probes(self) -> Probes:
        """The tensors that layers are tried on."""
        return Probes.of(self.space, self.eps)


@dataclass(frozen=True)
class Probes:
    """Values for everything a layer reads, always the same."""

    x: Tensor
    weights: Tensor
    start: Mapping[Var, Tensor]  # parameters at their start; x wants a gradient
    elsewhere: Mapping[Var, Tensor]  # parameters somewhere else

    @staticmethod
    def of(space: Space, eps: float) -> Probes:
        """Those of a space."""
        chance = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=chance, dtype=torch.float64)

        sizes = GEOMETRY.sizes()
        x, weights = normal(*sizes).requires_grad_(), normal(*sizes)
        common = {EPS: torch.tensor(eps, dtype=torch.float64), X: x}
        start: dict[Var, Tensor] = dict(common)
        elsewhere: dict[Var, Tensor] = {**common, X: x.detach()}
        for param in space.params.values():
            shape = GEOMETRY.shape_of(param.axes)
            begin = torch.full(shape, param.init, dtype=torch.float64)
            start[param.var] = view(begin, param.axes, GEOMETRY)
            other = begin + 0.5 * normal(*shape)
            elsewhere[param.var] = view(other, param.axes, GEOMETRY)
        return Probes(x, weights, start, elsewhere)


def agree(one: Definition, other: Definition, space: Space) -> bool:
    """Whether two layers of a space, with their affine transforms, have the same values.

    Texts may differ: how a formula is simplified changes from version to version.
    """
    values = dict(Probes.of(space, 1e-5).elsewhere)
    chance = torch.Generator().manual_seed(1)
    for param in (GAMMA, BETA):
        drawn = torch.randn(GEOMETRY.shape_of(param.axes), generator=chance, dtype=torch.float64)
        values[param] = view(drawn, param.axes, GEOMETRY)
    with torch.no_grad():
        found = [evaluate(d.results, values, GEOMETRY, 1e-5) for d in (one, other)]
    return len(found[0]) == len(found[1]) == 1 and torch.allclose(
        *(f[0].expand(GEOMETRY.sizes()) for f in found), rtol=1e-6, atol=1e-9, equal_nan=True
    )


def fingerprint(value: Tensor) -> str:
    """A name for the values of a layer: equal layers have the same, up to rounding.

    Values are rounded to six digits of the largest; a value that varies over fewer axes is taken
    as broadcast.
    """
    full = value.detach().expand(GEOMETRY.sizes())
    scale = full.abs().amax()
    exponent = torch.frexp(scale).exponent
    rounded = torch.round(torch.ldexp(full, -exponent) * 10**DIGITS).to(torch.int64)
    data = rounded.numpy().tobytes() + int(exponent).to_bytes(4, "big", signed=True)
    return hashlib.sha256(data).hexdigest()[:32]
