"""GPU speed: one row of the table on the device, in a worker.

Ours is judged by the oracle in float64, on the device, before anything is timed; what is out of
tolerance is not timed. Whatever a provider raises is noted, and the others are timed without it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import poison
from benchmarks.gpu_peers import MissingError, peer
from benchmarks.gpu_pool import Answer, Task
from benchmarks.gpu_rows import EAGER, ROWS, Row
from benchmarks.gpu_timing import (
    Contestant,
    Cuda,
    host_times,
    race,
    reason,
    replays,
    summary,
)
from normc.analysis import contest
from normc.analysis.agreement import Case, Tensors, gradients
from normc.analysis.contest import Accuracy
from normc.analysis.providers import OURS, Call, ours
from normc.language.definition import Definition
from normc.reference import reference

ORACLE = 2**27
"""Elements of x of which the oracle sees all; of a larger x, it sees some samples."""

CAPTURED = 64e6
"""Bytes of x up to which calls are timed in graphs too."""


def speed(task: Task) -> Answer:
    """Judge and time one row: the numbers of each provider, and why some have none."""
    row, seconds = ROWS[task["row"]], float(task["seconds"])
    _compile_anew()
    free()
    notes: dict[str, str] = {}
    calls, errors, seen = _judge(row, task["providers"], notes)
    free()
    record: Answer = {"errors": errors, "judged": list(seen.shape), "notes": notes, "times": {}}
    if OURS not in calls:
        return record
    given, cotangents = drawn(row.formula.definition, row.case)
    contestants = [contestant(who, call, given, cotangents) for who, call in calls.items()]
    device = Cuda()
    samples, failed = race([*contestants, copying(given["x"])], device, seconds)
    notes |= failed
    record["times"] = {
        who: {part: summary(values) for part, values in parts.items()}
        for who, parts in samples.items()
    }
    if row.host:
        record["host"] = {c.name: host_times(c, device) for c in contestants if c.name in samples}
    if row.bytes <= CAPTURED:
        del contestants, given, cotangents
        record["graphs"], record["graph_same"] = _graphs(row, calls, notes)
    return record


def warm(task: Task) -> Answer:
    """Run a provider once, so that what it compiles is found on disk later."""
    row = ROWS[task["row"]]
    _compile_anew()
    try:
        gradients(_call(row, task["provider"]), *drawn(row.formula.definition, row.case))
    except MissingError:
        pass
    finally:
        free()
    return {}


def _compile_anew() -> None:
    """Settle what `torch.compile` remembers: code from the disk, and nothing else."""
    from torch._inductor import config

    torch.compiler.reset()  # or it gives up on a function after a few shapes
    config.autotune_local_cache = False  # what was tuned while other workers ran is worth nothing


def _call(row: Row, who: str) -> Call:
    return ours(row.formula, row.case, row.eps) if who == OURS else peer(who, row)


def contestant(who: str, call: Call, given: Tensors, cotangents: list[Tensor]) -> Contestant:
    """A call as it is timed: forward as in training, and the gradients of all that is given."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    wanted = list(leaves.values())

    def forward() -> tuple[Tensor, ...]:
        value = call(**leaves)
        return value if isinstance(value, tuple) else (value,)

    def backward(results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(results, wanted, cotangents, allow_unused=True)

    return Contestant(who, forward, backward)


def copying(x: Tensor) -> Contestant:
    """A copy of x, which moves 2A."""
    room = torch.empty_like(x)
    return Contestant(contest.COPY, lambda: (room.copy_(x),))


def free() -> None:
    """Give the memory back that nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def _graphs(
    row: Row, calls: dict[str, Call], notes: dict[str, str]
) -> tuple[dict[str, dict[str, dict[str, float]]], bool | None]:
    """The times in graphs, and whether ours computes the same there."""
    count = min(24, max(3, ceil(2 * l2() / row.bytes)))  # sets of twice that: four times the cache
    sets = [drawn(row.formula.definition, row.case, 1 + i) for i in range(count)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    same: bool | None = None
    for who in sorted(calls, key=OURS.__ne__):  # a failed capture may spoil the next
        try:
            found[who], equal = replays([contestant(who, calls[who], *each) for each in sets])
            same = equal if who == OURS else same
        except Exception as error:
            notes[f"{who}, graph"] = reason(error)
    return found, same


def l2() -> int:
    """Bytes of the cache that all processors share."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 60_000_000)


# --- accuracy ------------------------------------------------------------------------------------


def drawn(definition: Definition, case: Case, seed: int = 0) -> tuple[Tensors, list[Tensor]]:
    """Tensors as `normc.analysis.agreement.draw` has them, made on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(case.seed + seed)
    dtype, place, geometry = getattr(torch, case.dtype), case.layout.place, case.geometry

    def normal(shape: tuple[int, ...], mean: float, spread: float) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        values.normal_(mean, spread, generator=generator)
        return place(values) if shape == case.shape else values

    given = {"x": normal(case.shape, 0.3, 1.5)}
    given |= {row.name: normal(geometry.shape_of(row.axes), 0.2, 1.0) for row in definition.inputs}
    for row in definition.params:
        given[row.name] = normal(geometry.shape_of(row.axes), row.init, 0.4)
    return given, [normal(case.shape, 0.0, 1.0) for _ in definition.results]


def _judge(
    row: Row, providers: Iterable[str], notes: dict[str, str]
) -> tuple[dict[str, Call], dict[str, dict[str, float]], Case]:
    """The calls that may be timed, the errors of all, and the case that they were judged on."""
    case = judged(row.case)
    given, cotangents, exact = _exactly(row, case)
    calls: dict[str, Call] = {}
    found: dict[str, Accuracy] = {}
    for who in sorted(providers, key=lambda who: (who != EAGER, who != OURS)):
        try:
            call = _call(row, who)
            # torch.compile would compile once more for the smaller shape.
            if case == row.case or who in (OURS, EAGER):
                poison(given["x"], 0)
                found[who] = contest.accuracy(call, given, cotangents, exact)
            if who == OURS:
                found[OURS].require(OURS, case.dtype, _excuse(found.get(EAGER), exact))
            calls[who] = call
        except Exception as error:
            notes[who] = reason(error)
        torch.cuda.empty_cache()
    return calls, {who: dict(each.errors) for who, each in found.items()}, case


def _exactly(row: Row, case: Case) -> tuple[Tensors, list[Tensor], Tensors]:
    """A case's tensors and cotangents, and the oracle's results and gradients in float64."""
    given, cotangents = drawn(row.formula.definition, case)
    how: dict[str, Any] = {"groups": case.groups, "channel_dim": case.layout.channel_dim}
    oracle = partial(reference(row.formula), eps=row.eps, **how)
    wide = {name: t.double() for name, t in given.items()}
    return given, cotangents, gradients(oracle, wide, [t.double() for t in cotangents])


def _excuse(eager: Accuracy | None, exact: Tensors) -> Accuracy | None:
    """Eager's errors of the parameters' gradients, whose terms cancel; nothing excuses the rest."""
    if eager is None:
        return None
    strict = {name for name in exact if name == "d_x" or not name.startswith("d_")}
    errors = {name: 0.0 if name in strict else error for name, error in eager.errors.items()}
    return Accuracy(errors, 0)


def judged(case: Case) -> Case:
    """The case itself, or one with so few samples that the oracle can see them all."""
    sample = case.geometry.dims()[0]
    each = prod(case.shape) // case.shape[sample]
    shape = list(case.shape)
    shape[sample] = min(shape[sample], max(1, ORACLE // each))
    return replace(case, shape=tuple(shape))
