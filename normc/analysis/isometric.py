"""Isometric: how the scale of gradients depends on the number of groups, and which keeps it.

Kim, Choi, Jang, Kim, "On the Ideal Number of Groups for Isometric Gradient Propagation", arXiv
2302.03193, derive a number of groups per layer that calibrates the scale of gradients. Their closed
form was not at hand when this was written: **nothing here is theirs**. This is a measured
counterpart, of the unit x -> convolution -> norm(G) -> activation at its initialisation:

    ratio = mean square of dL/dx / mean square of dL/dy

with random weights of variance 1/fan-in, x the output of such an activation of a unit Gaussian, and
a unit Gaussian dL/dy that knows nothing of x. It goes through the compiled backward. For GroupNorm
with m = fan_out/G channels per group and no positions, with a ReLU-like activation or none, the
mean is also derived, taking values within a group for independent Gaussians:

    ratio = fan_out/fan_in * (m - 2)/(m - 3),    m > 3

(of m directions, centring and scaling take two; 1/variance of m values is m/(m - 3) in the mean;
what the activation takes from the gradient it takes from x, too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from normc.analysis.batches import batches
from normc.analysis.isometric_feeds import Feeds, Sizes, sizes_of
from normc.analysis.isometric_unit import By, Ratio, derived, sampled, unit_of
from normc.analysis.trace import untouched
from normc.errors import NormcError, ShapeError
from normc.formula import Formula
from normc.ops.dropin import activates
from normc.ops.grouping import Data

Method = Literal["auto", "derived", "sampled"]

LARGEST = 8
"""Maps are sampled up to this height and width."""


@dataclass(frozen=True)
class Isometric:
    """The ratios of a unit over all numbers of groups, and the one whose ratio is closest to 1."""

    unit: str  # the formula, with its activation
    fan_in: int
    fan_out: int
    kernel: int
    by: By
    ratios: tuple[Ratio, ...]
    groups: int

    def show(self) -> str:
        """A table as text, the choice marked with a star."""
        head = f"{'groups':>7} {'channels':>9} {'derived':>9} {'mean':>9} {'+-':>8} {'median':>9}"
        title = f"{self.unit}\n{self.fan_in} -> {self.fan_out}, kernel {self.kernel}"
        lines = [f"{title}: Var(dL/dx)/Var(dL/dy)", f"{head}  68 % of samples"]
        for r in self.ratios:
            cells = [_cell(r.derived, 9), _cell(r.mean, 9), _cell(r.error, 8), _cell(r.median, 9)]
            spread = "" if r.low is None or r.high is None else f"{r.low:.3g} to {r.high:.3g}"
            star = "*" if r.groups == self.groups else " "
            lines.append(f"{star}{r.groups:6} {r.channels:9} {' '.join(cells)}  {spread}".rstrip())
        return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.4g}':>{width}}"


def isometric_groups(
    formula: Formula | str,
    fan_in: int,
    fan_out: int,
    kernel: int = 1,
    activation: Formula | str | None = None,
    *,
    stride: int = 1,
    size: int | None = None,
    before: Formula | str | None = None,
    by: By = "mean",
    method: Method = "auto",
    draws: int = 20,
    inputs: int | None = None,
    eps: float | None = None,
    seed: int = 0,
) -> Isometric:
    """The gradient scale ratio of a unit for every number of groups, and the most isometric one.

    The unit is a convolution of ``fan_in`` to ``fan_out`` channels, ``kernel`` and ``stride`` in
    both directions, over maps of ``size`` x ``size`` (default 1 for kernel 1, a linear layer, else
    8), wrapped around at the borders; then ``formula``, then ``activation`` ("relu" or any
    point-wise formula). Both fans count channels, without the kernel. Parameters have their initial
    values. x is ``before(z)``, z unit Gaussian; by default ``activation``, or for a formula that
    contains its activation the formula itself.

    ``method`` "auto" derives the mean where that holds (see above) and ``by`` is "mean", and else
    samples ``draws`` weights with ``inputs`` samples each (50, for maps 10, whose positions are
    samples, too), the same for all numbers of groups.
    Candidates are the divisors of ``fan_out``; chosen is the one with the smallest ``abs(log
    ratio)`` by ``by``, of equals the fewer groups. Below seven channels per group the samples have
    heavy tails: the median is far below the mean, whose standard error says little.

    Raises `NormcError` for a formula whose statistics do not know groups, or if nothing is derived
    that ``method`` asks for.

    >>> isometric_groups("group_norm", 256, 192, activation="relu").groups
    32
    """
    unit = unit_of(formula, activation, before, (fan_in, fan_out, kernel, stride, size), eps)
    if by not in ("mean", "median") or method not in ("auto", "derived", "sampled"):
        raise NormcError('by is "mean" or "median", method "auto", "derived" or "sampled"')
    if method == "derived" and not (unit.derivable and by == "mean"):
        raise NormcError(
            "derived is only the mean, of GroupNorm with relu, leaky_relu or no activation, kernel "
            'and size 1: use method="sampled"'
        )
    found = derived(unit)
    known = by == "mean" and any(r.derived is not None for r in found)
    if method == "sampled" or not (known or method == "derived"):
        if inputs is None:
            inputs = 50 if unit.size == 1 else 10
        found = sampled(unit, found, draws, inputs, seed)
    return Isometric(
        unit.formula.text, fan_in, fan_out, kernel, by, tuple(found), _choice(found, by)
    )


def _choice(found: Sequence[Ratio], by: By) -> int:
    if len(found) == 1:
        return 1
    ranked = [(abs(math.log(v)), r.groups) for r in found if (v := r.value(by)) and v < math.inf]
    if not ranked:
        raise NormcError("no number of groups has a finite ratio above 0, of those looked at")
    return min(ranked)[1]


# --- a whole model -------------------------------------------------------------------------------


def isometric_groups_of(
    model: nn.Module,
    formula: Formula | str,
    data: Data | None = None,
    *,
    shape: Sequence[int] | None = None,
    activation: Formula | str | None = None,
    largest: int = LARGEST,
    **how: Any,
) -> dict[str, int]:
    """The most isometric number of groups for every norm of a model, by the norm's path.

    The model runs once, on the first batch of ``data`` or a unit Gaussian one of ``shape``, and is
    left as it was. A norm is one of torch's or a `Layer`; ``formula`` stands in its place, with
    ``activation`` behind it. What feeds it is the last convolution or linear layer on the way that
    has most of them: fans, kernel and stride are its, maps are those seen, but at most ``largest``
    in both directions. Convolutions with groups count as dense, kernels that are not square as
    square ones of about the same area. ``how`` are other arguments of `isometric_groups`.

    Norms that nothing feeds or another kind of module, or whose channels are not those of what
    feeds them (as behind a concatenation), are left out. Raises `NormcError` as `isometric_groups`
    does, and if the model does not run on one tensor.
    """
    if largest < 1:
        raise ShapeError(f"largest={largest}: maps have a height and width of at least 1")
    (x,) = batches(model, data, shape, 1, how.get("seed", 0))
    feeds = Feeds(model, largest)
    with untouched(model, True, how.get("seed", 0)):
        feeds.run(x)
    different = dict.fromkeys(feeds.found.values())
    known = {sizes: _number(formula, activation, sizes, **how) for sizes in different}
    return {name: known[sizes] for name, sizes in feeds.found.items()}


def _number(
    formula: Formula | str, activation: Formula | str | None, sizes: Sizes, **how: Any
) -> int:
    fan_in, fan_out, kernel, stride, size = sizes
    fans = (fan_in, fan_out, kernel, activation)
    return isometric_groups(formula, *fans, stride=stride, size=size, **how).groups


_remembered = lru_cache(maxsize=1024)(_number)


# --- groups="isometric" ---------------------------------------------------------------------------


def of_layer(formula: Formula, after: nn.Module) -> int:
    """The number of groups behind a convolution or linear layer; `ShapeError` for other modules."""
    if any(map(is_lazy, after.parameters())):
        raise ShapeError(f"after={type(after).__name__} has no shapes yet: call it once on a batch")
    sizes = sizes_of(after, None, LARGEST)
    if sizes is None:
        raise ShapeError(f"after={type(after).__name__}: expected a convolution or linear layer")
    return _remembered(formula, _behind(formula), sizes)


def of_model(
    model: nn.Module, formula: Formula, data: Data | None, shape: Sequence[int] | None
) -> dict[str, int]:
    """`isometric_groups_of`, with a relu behind a formula without an activation of its own."""
    return isometric_groups_of(model, formula, data, shape=shape, activation=_behind(formula))


def _behind(formula: Formula) -> str | None:
    return None if activates(formula) else "relu"


__all__ = ["By", "Isometric", "Method", "Ratio", "isometric_groups", "isometric_groups_of"]
