"""Gains: what keeps the variance of a unit Gaussian that goes through a formula.

    gain = 1/sqrt(Var f(z)), z ~ N(0, 1)

as Brock, De and Smith use it, arXiv 2101.08692, where it is called gamma and estimated from
samples. Parameters have their initial values.

A point-wise formula is integrated over [-20, 20] by Gauss-Legendre rules of ten points, on panels
that are halved until both halves agree with the whole; kinks and jumps need no announcement, as
panels shrink around them. What the rules differ by is reported: for all but singular functions a
relative error of the gain below 1e-11. A formula with statistics is sampled through its compiled
kernels, with a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normc.analysis.draws import checked, gaussian, undisturbed
from normc.errors import FormulaError, NormcError
from normc.formula import Formula, formula_of, parse
from normc.language.axes import CHANNEL
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Groups
from normc.language.primitives import PRIMITIVES
from normc.ops.op import compile
from normc.reference import reference

REACH = 20.0
"""How far the quadrature goes on both sides; beyond lies 5e-89 of the Gaussian."""

SAMPLE = (64, 64, 8, 8)
"""The shape of a draw where formulas with statistics are sampled."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)
_EACH = 1e-13  # of the second moment: what one panel may be off
_MOST = 50_000  # panels that are halved at once
_HALVINGS = 45  # jumps have settled then; at a pole, panels as narrow as numbers are would agree
_TAIL = 1e-10  # of the second moment: what the last unit of the range may hold

Rows = np.ndarray[Any, np.dtype[np.float64]]


class GainError(NormcError):
    """The variance of a formula of a unit Gaussian is not there: infinite, undefined or zero."""


@dataclass(frozen=True)
class Moments:
    """Mean, variance and gain of a formula of a unit Gaussian."""

    formula: str
    mean: float
    variance: float
    error: float  # of the variance: what the rules differ by, or the standard error of samples
    how: str

    @property
    def gain(self) -> float:
        """1/sqrt(variance)."""
        return self.variance**-0.5

    @property
    def gain_error(self) -> float:
        """The error of the gain that follows from that of the variance, to first order."""
        return 0.5 * self.gain**3 * self.error

    def show(self) -> str:
        """One line of text."""
        found = f"mean {self.mean:.6f}, variance {self.variance:.6f}, gain {self.gain:.6f}"
        return f"{self.formula}: {found}, error {self.gain_error:.0e} ({self.how})"


def gain(f: Formula | str, *, sample: Sequence[int] | None = None, **how: Any) -> float:
    """The factor that gives f of a unit Gaussian variance 1; `moments` says more of it.

    >>> round(gain("relu(x)"), 6)
    1.712859
    """
    return moments(f, sample=sample, **how).gain


def moments(
    f: Formula | str,
    *,
    sample: Sequence[int] | None = None,
    draws: int = 16,
    groups: Groups = "auto",
    eps: float | None = None,
    seed: int = 0,
) -> Moments:
    """Mean, variance and gain of f(z), z ~ N(0, 1) independent per element.

    ``f`` is a formula, its text, a name in the zoo, or the name of a function, such as "relu". A
    point-wise one is integrated. One with statistics, or any with a ``sample``, is computed on
    ``draws`` tensors of that shape, channels in dimension 1 (default `SAMPLE`), in float64: mean
    and variance are those of all elements, as every element has the same distribution. ``eps`` is
    the zoo's, else 1e-5.

    Raises `FormulaError` for a formula with inputs or several results, `GainError` if the variance
    is infinite, undefined or zero, `ShapeError` for a ``sample`` without channels.
    """
    formula = function_of(f)
    if eps is None:
        eps = formula.eps
    with undisturbed():
        if sample is None and not has_statistics(formula):
            return _integrated(formula, eps)
        shape = SAMPLE if sample is None else checked("sample", sample, least=2)
        return _sampled(formula, shape, draws, groups, eps, seed)


def function_of(f: Formula | str) -> Formula:
    """The formula of a text, or of the name of a zoo's formula or of a function of one argument.

    Raises `FormulaError` if it does not map one tensor to one tensor.
    """
    row = PRIMITIVES.get(f.strip()) if isinstance(f, str) else None
    unary = row is not None and row.callable and len(row.args) == 1
    f = parse(f"{row.name}(x)") if row and unary else formula_of(f)
    if f.inputs:
        raise FormulaError(f"`{f.text}` needs the input `{f.inputs[0].name}`, which has no default")
    if len(f.definition.results) > 1:
        raise FormulaError(f"`{f.text}` has several results: write the one that is meant")
    return f


def has_statistics(formula: Formula) -> bool:
    """Whether a formula is not point-wise."""
    return any(isinstance(node, Reduce) for node in postorder(formula.definition.results))


def initial(formula: Formula, channels: int, like: Tensor) -> dict[str, Tensor]:
    """The parameters of a formula at their initial values."""
    shapes = {p.name: (channels,) if p.axes & CHANNEL else () for p in formula.params}
    return {p.name: like.new_full(shapes[p.name], p.init) for p in formula.params}


# --- quadrature ----------------------------------------------------------------------------------


def _integrated(formula: Formula, eps: float) -> Moments:
    oracle = reference(formula)

    def value(z: Rows) -> Rows:
        y = oracle(torch.from_numpy(z.reshape(-1, 1)), groups=1, eps=eps)
        assert isinstance(y, Tensor)
        return y.numpy().reshape(z.shape)

    edges = np.linspace(-REACH, REACH, round(4 * REACH) + 1)  # kinks at halves lie between panels
    _check_values(formula, value, edges)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        centre = _panels(value, 0.0, edges[:-1], edges[1:])[:, 0].sum()
        first, second, error = _settled(formula, lambda a, b: _panels(value, centre, a, b), edges)
        variance, ends = second - first * first, np.array([-REACH, REACH])
        last = ((value(ends) - centre) ** 2 * _density(ends)).max()
    if last > _TAIL * second:
        raise GainError(f"the variance of `{formula.text}` is infinite, or made beyond {REACH:g}")
    _check_variance(formula, centre + first, variance)
    return Moments(formula.text, float(centre + first), float(variance), float(error), "quadrature")


def _panels(value: Callable[[Rows], Rows], centre: float, left: Rows, right: Rows) -> Rows:
    """The integrals of f - centre and of its square over each panel, weighted by the density."""
    half = (right - left)[:, None] / 2
    z = (left + right)[:, None] / 2 + half * _NODES
    h = value(z) - centre
    weights = half * _WEIGHTS * _density(z)
    return np.stack([(weights * h).sum(1), (weights * h * h).sum(1)], 1)


def _density(z: Rows) -> Rows:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _settled(
    formula: Formula, panels: Callable[[Rows, Rows], Rows], edges: Rows
) -> tuple[float, float, float]:
    """Both integrals, and what the last halvings changed in the second."""
    left, right = edges[:-1], edges[1:]
    whole = panels(left, right)
    total, error = np.zeros(2), 0.0
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        halves = panels(np.r_[left, middle], np.r_[middle, right])
        pairs = halves.reshape(2, -1, 2)
        off = abs(pairs.sum(0) - whole)
        scale = abs(total[1]) + abs(pairs[..., 1].sum())
        if not math.isfinite(scale):
            break
        bad = (off[:, 1] > _EACH * scale) | (off[:, 0] > _EACH * math.sqrt(scale))
        total += pairs[:, ~bad].sum((0, 1))
        error += off[~bad, 1].sum()
        if not bad.any():
            return float(total[0]), float(total[1]), float(error)
        if bad.sum() > _MOST:
            break
        whole = pairs[:, bad].reshape(-1, 2)
        left, right = np.r_[left[bad], middle[bad]], np.r_[middle[bad], right[bad]]
    raise GainError(
        f"the variance of `{formula.text}` does not settle: it is infinite, or the formula is too "
        "rough for quadrature; give sample=(N, C, H, W) to draw it"
    )


# --- sampling ------------------------------------------------------------------------------------


def _sampled(
    formula: Formula, shape: tuple[int, ...], draws: int, groups: Groups, eps: float, seed: int
) -> Moments:
    """Two moments per draw; draws are independent, elements of one need not be."""
    if draws < 2:
        raise NormcError("a standard error needs draws=2 or more")
    chance, op = torch.Generator().manual_seed(seed), compile(formula)
    rows: list[tuple[float, float]] = []
    for _ in range(draws):
        x = gaussian(shape, chance)
        with torch.no_grad():
            y = op.run(x, initial(formula, shape[1], x), groups, eps, 1)[0]
        rows.append((float(y.mean()), float(y.square().mean())))
    m1, m2 = torch.tensor(rows, dtype=torch.float64).T
    mean, variance = float(m1.mean()), float(m2.mean() - m1.mean() ** 2)
    _check_variance(formula, mean, variance)
    error = (m2 - 2 * mean * m1).std() / math.sqrt(draws)  # to first order in m1 - mean
    how = f"{draws} samples of {'x'.join(map(str, shape))}"
    return Moments(formula.text, mean, variance, float(error), how)


def _check_values(formula: Formula, value: Callable[[Rows], Rows], edges: Rows) -> None:
    """Values between and at the panels' edges, but for 0, where a formula may have a pole."""
    z = np.r_[edges[edges != 0], (edges[:-1] + edges[1:]) / 2]
    wrong = z[~np.isfinite(value(z))]
    if wrong.size:
        at = wrong[abs(wrong).argmin()]
        raise GainError(f"`{formula.text}` is {value(np.array([at]))[0]} at {at:g}: no variance")


def _check_variance(formula: Formula, mean: float, variance: float) -> None:
    if not math.isfinite(variance):
        raise GainError(f"the variance of `{formula.text}` is {variance}: no gain can set it to 1")
    if variance <= (1e-12 * mean) ** 2 or variance <= 0:
        raise GainError(f"`{formula.text}` is {mean:g} for every input: no gain can set it to 1")
