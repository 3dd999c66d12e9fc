"""Contest: a formula's kernels beside plain torch, torch.compile and torch's own functions.

All are judged by the oracle in float64 before any is timed. Times are those of forward alone and of
forward with backward, which gives the gradient of x and of everything else that was passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from normc.analysis.agreement import Case, Tensors, draw, gradients
from normc.analysis.providers import OURS, Call
from normc.analysis.timing import Samples, Thunk, interleave
from normc.errors import NormcError
from normc.formula import Formula
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.ops.target import target_of
from normc.reference import reference
from normc.schedule.cost import moved

COPY = "copy"
FORWARD, BOTH = "forward", "forward+backward"

LIMIT = {"float64": 1e-11, "float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
"""The relative error, in the L2 norm, that a result and the gradient of x may have."""

SUMS = 5.0
"""How many times that for a parameter's gradient: its terms cancel, their rounding does not."""

JUDGED = 2**25
"""Elements of x up to which the oracle sees all of it; of a larger x, it sees some samples."""


@dataclass(frozen=True)
class Entrant:
    """A layer and the tensors it is called with."""

    name: str
    call: Call
    given: Tensors
    cotangents: list[Tensor]  # one per result

    def forward(self) -> Thunk:
        """One forward pass without autograd."""
        given = self.given

        def run() -> object:
            with torch.no_grad():
                return self.call(**given)

        return run

    def both(self) -> Thunk:
        """Forward, and the gradients of all that is given; none of them is accumulated."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.given.items()}
        wanted = list(leaves.values())

        def run() -> object:
            value = self.call(**leaves)
            results = value if isinstance(value, tuple) else (value,)
            pairs = zip(results, self.cotangents, strict=True)
            ends = [(y, d) for y, d in pairs if y.requires_grad]
            ys, ds = zip(*ends, strict=True)
            return torch.autograd.grad(ys, wanted, ds, allow_unused=True)

        return run

    def passes(self) -> dict[str, Thunk]:
        """What is timed, by name."""
        return {FORWARD: self.forward(), BOTH: self.both()}


# --- accuracy ------------------------------------------------------------------------------------


class InaccurateError(NormcError):
    """A provider is out of tolerance: what it takes to be wrong is not timed."""


@dataclass(frozen=True)
class Accuracy:
    """The relative errors of a provider by tensor: y, d_x, d_gamma, ..."""

    errors: Mapping[str, float]
    kinks: int  # elements left out, see `accuracy`

    def limit(self, tensor: str, dtype: str) -> float:
        """What a tensor's error may be."""
        summed = tensor.startswith("d_") and tensor != "d_x"
        kinks = self.kinks if tensor.startswith("d_") else 0
        return LIMIT[dtype] * (SUMS if summed else 1.0) + KINK * kinks

    def require(self, name: str, dtype: str, noise: Accuracy | None = None) -> None:
        """Raise `InaccurateError` for a tensor out of tolerance; ``noise`` is excused twice."""
        for tensor, error in self.errors.items():
            limit = self.limit(tensor, dtype)
            if noise is not None:
                limit = max(limit, 2 * noise.errors[tensor])
            if not error <= limit:
                raise InaccurateError(
                    f"{name} is not timed: the relative error of {tensor} is {error:.1e}, "
                    f"more than {limit:.1e} in {dtype}"
                )


KINK = 1e-5
"""What one element on the other side of a kink may change in the tensors it is a term of."""


def accuracy(call: Call, given: Tensors, cotangents: list[Tensor], exact: Tensors) -> Accuracy:
    """The errors of a call against the oracle's results.

    Where a value is within rounding of a kink (of relu, of max), its gradient may be that of the
    other side. Up to one element of d_x in a million may differ so: that many of the worst entries
    are left out of the norm of each gradient.
    """
    found = gradients(call, given, cotangents)
    offs = {name: _off(found[name], want) for name, want in exact.items()}
    rms = _norm(exact["d_x"]) / math.sqrt(exact["d_x"].numel())
    kinks = int((offs["d_x"].abs() > 1e-2 * rms).sum())
    if kinks > 1e-6 * offs["d_x"].numel():
        kinks = 0  # more than rounding explains
    largest = max(map(_norm, exact.values()))
    errors: dict[str, float] = {}
    for name, want in exact.items():
        off, norm = offs[name], _norm(want)
        if name.startswith("d_") and off.numel() > 8 * kinks:
            off[off.abs().topk(kinks).indices] = 0
        # What is zero to rounding is judged as if it were 1 large, as cotangents are.
        scale = norm if norm > 1e-9 * largest else math.sqrt(want.numel())
        error = float(off.norm()) / scale
        errors[name] = error if math.isfinite(error) else math.inf
    return Accuracy(errors, kinks)


def _off(found: Tensor, want: Tensor) -> Tensor:
    """The differences in float64; none where both are NaN, or the same infinity."""
    same = (found == want) | (found.isnan() & want.isnan())
    return (found.double() - want).masked_fill_(same, 0).flatten()


def _norm(tensor: Tensor) -> float:
    """The L2 norm of what is finite."""
    return float(tensor.nan_to_num(0, 0, 0).norm())


def judged(case: Case) -> Case:
    """The case itself, or one with fewer samples that the oracle can see in whole."""
    sample = case.geometry.dims()[0]
    each = prod(case.shape) // case.shape[sample]
    most = max(1, JUDGED // each)
    shape = list(case.shape)
    shape[sample] = min(shape[sample], most)
    return replace(case, shape=tuple(shape))


def exactly(formula: Formula, case: Case, eps: float) -> tuple[Tensors, list[Tensor], Tensors]:
    """A case's tensors and cotangents, and the oracle's results and gradients in float64."""
    given, cotangents = draw(formula.definition, case)
    how: dict[str, Any] = {"groups": case.groups, "channel_dim": case.layout.channel_dim}
    oracle = partial(reference(formula), eps=eps, **how)
    wide = {name: t.double() for name, t in given.items()}
    return given, cotangents, gradients(oracle, wide, [t.double() for t in cotangents])


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """The bytes that forward keeps for backward, each memory counted once."""

    named: Mapping[str, int]  # of tensors that live anyway: x, parameters, results y0, y1, ...
    rest: int  # of what is kept for backward alone

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.named.values()) + self.rest

    @property
    def beyond_x(self) -> int:
        """All of it but x."""
        return self.total - self.named.get("x", 0)


def saved(entrant: Entrant) -> Saved:
    """What a call keeps for backward, as autograd's hooks see it."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())  # alive, so that no later tensor takes its address
        return tensor

    leaves = {name: t.detach().requires_grad_() for name, t in entrant.given.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = entrant.call(**leaves)
    results = value if isinstance(value, tuple) else (value,)
    known = leaves | {f"y{i}" if i or len(results) > 1 else "y": y for i, y in enumerate(results)}
    sizes = {_address(t): t.untyped_storage().nbytes() for t in kept}
    at = {name: _address(t) for name, t in known.items()}
    named = {name: sizes.pop(place) for name, place in at.items() if place in sizes}
    return Saved(named, sum(sizes.values()))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# --- times ---------------------------------------------------------------------------------------


def floors(formula: Formula, x: Tensor, geometry: Geometry) -> dict[str, int]:
    """The full-size tensors that any kernel has to read and write, in forward and in both."""
    jobs = all_jobs(formula, target_of(formula, "auto", x, (), geometry))
    least = [moved(job.plan, job.dense).floor.full for job in jobs]
    return {FORWARD: least[0], BOTH: sum(least)}


def race(
    entrants: list[Entrant], x: Tensor, rounds: int, time: Callable[..., Samples] = interleave
) -> dict[str, Samples]:
    """The samples of every pass; in each round a copy of x, which moves 2A, is timed as well."""
    room = torch.empty_like(x)
    copy: dict[str, Thunk] = {COPY: lambda: room.copy_(x)}
    passes = {entrant.name: entrant.passes() for entrant in entrants}
    return {
        name: time(copy | {who: thunks[name] for who, thunks in passes.items()}, rounds)
        for name in (FORWARD, BOTH)
    }


def times(samples: Mapping[str, Samples], floor: Mapping[str, int]) -> dict[str, Any]:
    """For the record: by pass its floor, the copy's time, and the times of every provider."""
    return {
        name: {
            "floor": floor[name],
            "copy_ms": 1e3 * found.median(COPY),
            "times": {who: _times(found, who, floor[name]) for who in found.seconds if who != COPY},
        }
        for name, found in samples.items()
    }


def _times(samples: Samples, who: str, floor: int) -> dict[str, float]:
    """A provider's times in milliseconds, in units of its floor, and as a multiple of ours.

    The floor is the time in which a copy, which moves 2A, would move what has to be moved.
    """
    low, high = samples.spread(who)
    return {
        "ms": 1e3 * samples.median(who),
        "p20": 1e3 * low,
        "p80": 1e3 * high,
        "over_floor": samples.ratio(who, COPY) / (floor / 2),
        "times_ours": samples.ratio(who, OURS),
    }
