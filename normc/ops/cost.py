"""Cost: the operations and bytes of an op, for its user and for torch's own counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from normc.backends.contract import Job
from normc.formula import Formula
from normc.language.geometry import Geometry, Groups
from normc.ops.call import Back
from normc.ops.explain import all_jobs, all_programs
from normc.ops.library import described
from normc.ops.target import target_of
from normc.program.program import Program
from normc.schedule.cost import moved
from normc.schedule.flops import flops


@dataclass(frozen=True)
class Cost:
    """One pass over tensors: operations (`normc.schedule.flops` says how they are counted), the
    bytes that its kernels ask memory for, and the least that any kernels could."""

    flops: int
    bytes: int
    floor: int


@dataclass(frozen=True)
class Costs:
    """Forward, and backward with every gradient."""

    forward: Cost
    backward: Cost


def costs(
    formula: Formula, x: Tensor, groups: Groups = "auto", channel_dim: int = 1,
    backend: str = "auto",
) -> Costs:  # fmt: skip
    """The cost of a formula for tensors like x; nothing is compiled or run."""
    geometry = Geometry.of(x.shape, groups, channel_dim)
    jobs = all_jobs(formula, target_of(formula, backend, x, (), geometry))
    found = all_programs(formula)
    assert found.backward is not None  # what can be compiled reads x
    every = zip(jobs, (found.forward, found.backward), strict=True)
    return Costs(*[_cost(job, p, geometry, x.element_size()) for job, p in every])


def _cost(job: Job, program: Program, geometry: Geometry, itemsize: int) -> Cost:
    found = moved(job.plan, job.dense)
    sizes = [t.bytes(geometry, itemsize) for t in (found.streaming, found.floor)]
    return Cost(flops(program, geometry), sizes[0], sizes[1])


# --- torch.utils.flop_counter --------------------------------------------------------------------

Shapes = Sequence[Sequence[int]]


def _forward(tensors: Shapes, *options: Any, **_: Any) -> int:
    setting, found = described(*options)
    shape = tensors[setting.recipe.full]
    return flops(found.forward, Geometry.of(shape, setting.groups, setting.channel_dim))


def _backward(tensors: Shapes, *options: Any, **_: Any) -> int:
    setting, found = described(*options)
    back = Back(setting.recipe, found)
    shape = tensors[back.passed.index(back.whole[0])]
    assert found.backward is not None
    return flops(found.backward, Geometry.of(shape, setting.groups, setting.channel_dim))


@cache
def announce() -> None:
    """Tell torch's FlopCounterMode what normc's operators cost; a counter knows what was told
    before it was made. Called with the first op, as it takes 0.2 s to import."""
    import torch
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.normc.forward)(_forward)
    register_flop_formula(torch.ops.normc.backward)(_backward)
