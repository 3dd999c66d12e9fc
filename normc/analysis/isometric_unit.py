"""The unit whose gradients `normc.analysis.isometric` looks at, and their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from normc.analysis.draws import gaussian, undisturbed
from normc.analysis.gains import function_of, initial
from normc.errors import FormulaError, NormcError, ShapeError
from normc.formula import Formula, parse
from normc.language.definition import Definition, X
from normc.language.expr import const, substitute
from normc.language.geometry import Groups
from normc.language.show import show
from normc.ops.dropin import activates
from normc.ops.op import compile
from normc.ops.setting import splits_channels

By = Literal["mean", "median"]

_NORM = "(x - group_mean(x))/group_std(x)"
_DERIVED = (_NORM, f"relu({_NORM})", f"leaky_relu({_NORM})")


@dataclass(frozen=True)
class Ratio:
    """Var(dL/dx)/Var(dL/dy) for one number of groups."""

    groups: int
    channels: int  # of one group
    derived: float | None  # None where nothing is derived, or the mean is infinite
    mean: float | None = None  # over samples; None if nothing was sampled
    error: float | None = None  # the standard error of the mean, over weights
    median: float | None = None
    low: float | None = None  # 16 of 100 samples are below
    high: float | None = None  # 16 of 100 samples are above

    def value(self, by: By) -> float | None:
        """The mean, derived if it was not sampled, or the median."""
        return self.median if by == "median" else self.derived if self.mean is None else self.mean


@dataclass(frozen=True)
class Unit:
    """What is sampled: of a convolution its sizes, then a formula."""

    formula: Formula
    before: Formula  # what stands before the convolution
    fan_in: int
    fan_out: int
    kernel: int
    stride: int
    size: int
    eps: float

    @property
    def derivable(self) -> bool:
        """Whether the derived expression's assumptions hold."""
        if (self.kernel, self.stride, self.size) != (1, 1, 1):
            return False
        return _bound(self.formula) in {_bound(parse(text)) for text in _DERIVED}


def unit_of(
    formula: Formula | str,
    activation: Formula | str | None,
    before: Formula | str | None,
    sizes: tuple[int, int, int, int, int | None],
    eps: float | None,
) -> Unit:
    """Check the arguments."""
    fan_in, fan_out, kernel, stride, size = sizes
    norm = function_of(formula)
    if not splits_channels(norm):
        raise NormcError(
            f"the statistics of `{norm.text}` do not depend on groups: nothing to find"
        )
    if size is None:
        size = 1 if kernel == 1 else 8
    if min(fan_in, fan_out, kernel, stride, size) < 1 or size % stride or size < kernel:
        raise ShapeError("sizes are at least 1, size is at least kernel and a multiple of stride")
    if eps is None:
        eps = norm.eps
    act = None if activation is None else function_of(activation)
    whole = norm if act is None else _composed(act, norm)
    if before is None:
        before = act or (whole if activates(norm) else "x")
    return Unit(whole, function_of(before), fan_in, fan_out, kernel, stride, size, eps)


def _composed(outer: Formula, inner: Formula) -> Formula:
    """``outer`` of what ``inner`` computes, as one formula."""
    both = {p.name for p in outer.params} & {p.name for p in inner.params}
    if both:
        raise FormulaError(f"norm and activation both have a parameter `{min(both)}`: rename one")
    (result,) = substitute(outer.definition.results, {X: inner.definition.results[0]})
    return Formula(show(Definition((result,), (*inner.params, *outer.params))))


@lru_cache(maxsize=256)
def _bound(formula: Formula) -> str:
    """A name for what a formula computes with its parameters at their initial values."""
    d = formula.definition
    results = substitute(d.results, {p.var: const(p.init) for p in d.params})
    return Formula(show(Definition(tuple(results)))).canonical().shown


def derived(unit: Unit) -> list[Ratio]:
    """A row per divisor of fan_out, with the derived mean where there is one."""
    found: list[Ratio] = []
    for g in (d for d in range(1, unit.fan_out + 1) if unit.fan_out % d == 0):
        m, ratio = unit.fan_out // g, None
        if unit.derivable and m > 3:
            ratio = unit.fan_out / unit.fan_in * (m - 2) / (m - 3)
        found.append(Ratio(g, m, ratio))
    return found


# --- sampling ------------------------------------------------------------------------------------


def sampled(unit: Unit, rows: Sequence[Ratio], draws: int, inputs: int, seed: int) -> list[Ratio]:
    """Rows with what was sampled; every number of groups sees the same numbers."""
    if draws < 2 or inputs < 1:
        raise NormcError("a standard error needs draws=2 or more, and inputs=1 or more")
    chance = torch.Generator().manual_seed(seed)
    with undisturbed():
        parts = [_draw(unit, [r.groups for r in rows], inputs, chance) for _ in range(draws)]
        ratios = torch.stack(parts)  # (draws, rows, inputs)
        return [_summary(row, ratios[:, i]) for i, row in enumerate(rows)]


def _summary(row: Ratio, ratios: Tensor) -> Ratio:
    low, median, high = ratios.flatten().quantile(ratios.new_tensor([0.16, 0.5, 0.84])).tolist()
    error = float(ratios.mean(1).std()) / math.sqrt(len(ratios))
    return replace(row, mean=float(ratios.mean()), error=error, median=median, low=low, high=high)


def _draw(unit: Unit, groups: Sequence[int], inputs: int, chance: torch.Generator) -> Tensor:
    """The ratios (groups, inputs) of one weight, in float64."""
    maps = (unit.size, unit.size) if unit.size > 1 else ()
    z = gaussian((inputs, unit.fan_in, *maps), chance)
    with torch.no_grad():
        x = _run(unit.before, z, "auto", unit.eps)
    x = x.detach().requires_grad_()
    weight = gaussian((unit.fan_out, unit.fan_in, *[unit.kernel] * len(maps)), chance)
    h = _convolved(x, weight / math.sqrt(weight[0].numel()), unit)
    dy = gaussian(h.shape, chance)
    found: list[Tensor] = []
    for g in groups:
        (dh,) = torch.autograd.grad(
            _run(unit.formula, leaf := h.detach().requires_grad_(), g, unit.eps), leaf, dy
        )
        (dx,) = torch.autograd.grad(h, x, dh, retain_graph=True)
        found.append(dx.square().flatten(1).mean(1) / dy.square().flatten(1).mean(1))
    return torch.stack(found)


_op = lru_cache(maxsize=256)(compile)


def _run(formula: Formula, x: Tensor, groups: Groups, eps: float) -> Tensor:
    return _op(formula).run(x, initial(formula, x.shape[1], x), groups, eps, 1)[0]


def _convolved(x: Tensor, weight: Tensor, unit: Unit) -> Tensor:
    """The convolution on a torus: all positions are alike."""
    if x.dim() == 2:
        return x @ weight.T
    before, after = (unit.kernel - 1) // 2, unit.kernel // 2
    return F.conv2d(F.pad(x, [before, after] * 2, mode="circular"), weight, stride=unit.stride)
