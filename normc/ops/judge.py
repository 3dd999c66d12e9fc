"""Judge: how far results and gradients are from the oracle's in float64, and how far they may be.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from normc.language.definition import Definition
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Geometry

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""The error that needs no excuse, per storage type."""

FACTOR = 8.0
"""How many times the formula's own noise a kernel may be off."""

Tensors = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class Expected:
    """What the oracle says of one call, and how far rounding takes others from it."""

    exact: Tensors
    scale: Mapping[str, float]  # what an error is relative to
    noise: Mapping[str, float]
    strays: Mapping[str, int]  # how many numbers rounding takes beyond the tolerance
    tolerance: float

    def errors(self, ours: Mapping[str, Tensor]) -> list[Error]:
        """How far a kernel's results are from the oracle's."""
        return [
            Error(name, distance(ours[name], want, self.scale[name]), self.noise[name],
                  self.tolerance)
            for name, want in self.exact.items()
        ]  # fmt: skip

    def crowd(self, ours: Mapping[str, Tensor], errors: list[Error]) -> str:
        """Which result has more numbers beyond the tolerance than rounding explains; or nothing.

        Of millions of numbers a few lie so near a kink that rounding takes them across, and the
        noise is then as large as the gradient. A kernel may be off in as few places, no more.
        """
        for error in errors:
            if error.rule == "eager":
                name, want = error.tensor, self.exact[error.tensor]
                found = strays(ours[name], want, self.tolerance * self.scale[name])
                if found > FACTOR * self.strays[name]:
                    some = f"{found} of {want.numel()} numbers of {name} are off"
                    return f"{some}, and rounding explains {self.strays[name]}"
        return ""


def expect(run: Callable[[Change], Tensors], dtype: str, amplified: float = 0.0) -> Expected:
    """What is expected of a kernel; ``run`` is the oracle on tensors that are changed first."""
    exact, tolerance = run(Tensor.double), TOLERANCE[dtype]
    largest = max(magnitude(want) for want in exact.values())
    rounding = torch.finfo(getattr(torch, dtype)).eps * max(largest, amplified)
    scale = {name: magnitude(want) for name, want in exact.items()}
    scale = {name: size if size > 1e-9 * largest else 1.0 for name, size in scale.items()}
    noise = {name: rounding / size for name, size in scale.items()}
    many = dict.fromkeys(exact, 0)
    for change in (_same, _nudge):
        rough = run(change)
        for name, want in exact.items():
            size = scale[name]
            noise[name] = max(noise[name], distance(rough[name], want, size))
            many[name] = max(many[name], strays(rough[name], want, tolerance * size))
    return Expected(exact, scale, noise, many, tolerance)


def amplification(definition: Definition, geometry: Geometry, eps: float) -> float:
    """How large the terms are that cancel where a statistic is over one element; else 0."""
    nodes = postorder(definition.results)
    single = any(isinstance(e, Reduce) and geometry.count(e.over) == 1 for e in nodes)
    return eps**-0.5 if single else 0.0


def gradients(
    call: Callable[..., object], given: Mapping[str, Tensor], cotangents: list[Tensor]
) -> Tensors:
    """The results of a call, ``y`` or ``y0, y1, ...``, and ``d_`` of everything it was given."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    found = results(call(**leaves))
    pairs = [(y, d) for y, d in zip(found.values(), cotangents, strict=True) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs],
        list(leaves.values()),
        [d for _, d in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    named = zip((f"d_{name}" for name in leaves), grads, strict=True)
    return {name: y.detach() for name, y in found.items()} | dict(named)


def results(value: object) -> Tensors:
    """What a call returns, by name: ``y``, or ``y0``, ``y1``, ..."""
    several = cast(tuple[Tensor, ...], value if isinstance(value, tuple) else (value,))
    names = ["y"] if len(several) == 1 else [f"y{i}" for i in range(len(several))]
    return dict(zip(names, several, strict=True))


def magnitude(tensor: Tensor) -> float:
    """The largest finite absolute value; 0 if there is none."""
    return float(tensor.abs().where(tensor.isfinite(), 0.0).max()) if tensor.numel() else 0.0


def distance(found: Tensor, want: Tensor, scale: float) -> float:
    """The largest difference in units of ``scale``; infinite where NaN or infinities differ."""
    a, b = _wide(found, want)
    finite = b.isfinite()
    same = a.shape == b.shape and torch.equal(a.isfinite(), finite)
    if not same or not torch.equal(*(t.where(~finite, 0.0).nan_to_num() for t in (a, b))):
        return math.inf
    return magnitude(a - b) / scale


def strays(found: Tensor, want: Tensor, limit: float) -> int:
    """How many numbers differ by more than a limit, or are NaN or infinite in one tensor alone."""
    a, b = _wide(found, want)
    return int((~a.isclose(b, rtol=0.0, atol=limit, equal_nan=True)).sum())


def _wide(found: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, where the second one is."""
    return found.detach().to(want.device, torch.float64), want.detach().double()


def _same(t: Tensor) -> Tensor:
    return t


def _nudge(t: Tensor) -> Tensor:
    """Every number moved by one unit in its last place, up or down at random, as float64."""
    chance = torch.Generator(t.device).manual_seed(t.numel())
    signs = torch.randint(0, 2, t.shape, generator=chance, dtype=torch.float64, device=t.device)
    return t.double() * (1 + torch.finfo(t.dtype).eps * (signs * 2 - 1))
