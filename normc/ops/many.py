"""Many formulas at once, as a search for layers asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Literal

import torch

from normc.backends import contract
from normc.errors import CompileError, NormcError
from normc.formula import Formula, formula_of
from normc.ops.op import Op
from normc.ops.target import choose
from normc.pipeline import Rendered, Target, load, render
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

Optimize = Literal["full", "fast"]


def compile_many(
    formulas: Iterable[Formula | str],
    *,
    optimize: Optimize = "full",
    dtype: torch.dtype = torch.float32,
    channel_dim: int = 1,
    gradients: bool = True,
    workers: int | None = None,
) -> list[Op | CompileError]:
    """Compile many formulas: for each, in order, an op or the error that it met.

    The first call of an op then compiles nothing, if its tensors are contiguous, on the CPU, of
    this ``dtype``, with the channels at ``channel_dim`` (1 or -1); other calls work as ever.
    Without ``gradients``, only the forward kernels are made.

    "full" makes the kernels that `compile` makes, ``workers`` compilers at a time (None: one per
    processor). "fast" runs no compiler: a few milliseconds make a tape, whose kernels take two to
    three times as long; float32 and float64 only. One wrong formula does not stop the others:

    >>> [type(one).__name__ for one in compile_many(["x/channel_rms(x)", "x/rns(x)"])]
    ['Op', 'CompileError']
    """
    from normc.backends.c_batch import Batches, Unit  # seldom wanted, and what it imports is much

    every = list(formulas)
    target = _target(optimize, dtype, channel_dim)
    backend = "tape" if target.backend == "tape" else "auto"
    workers = workers or os.cpu_count() or 1
    rendered: list[tuple[Formula, Rendered] | CompileError] = []
    share = -(-len(every) // workers)
    batches = Batches(workers, share) if target.backend == "c" else None
    with batches or nullcontext():
        for formula in every:
            made = _render(formula, target, gradients)
            rendered.append(made)
            if batches is not None and not isinstance(made, CompileError):
                batches.add(Unit(made[1].jobs, made[1].sources))
    return [_load(one, backend, target, gradients) for one in rendered]


def _target(optimize: Optimize, dtype: torch.dtype, channel_dim: int) -> Target:
    if optimize not in ("full", "fast"):
        raise NormcError(f"optimize is {optimize!r}: expected full or fast")
    if channel_dim not in (1, -1):
        raise NormcError(f"channel_dim is {channel_dim}: expected 1 or -1")
    name = str(dtype).removeprefix("torch.")
    fast = optimize == "fast" and not contract.find("tape").why_not(name, "cpu")
    backend = "tape" if fast else choose("auto", name, "cpu")
    return Target(backend, name, CHANNELS_FIRST if channel_dim == 1 else CHANNELS_LAST)


def _render(
    formula: Formula | str, target: Target, gradients: bool
) -> tuple[Formula, Rendered] | CompileError:
    text = formula.text if isinstance(formula, Formula) else str(formula)
    try:
        f = formula_of(formula)
        names = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
        wrt = names if gradients else ()
        return f, render(f.definition, f.label, f.text, wrt, "batch", target)
    except Exception as error:
        return _failed(text, error)


def _load(
    one: tuple[Formula, Rendered] | CompileError, backend: str, target: Target, gradients: bool
) -> Op | CompileError:
    if isinstance(one, CompileError):
        return one
    formula, rendered = one
    try:
        op = Op(formula, backend)
        op.use(load(rendered), "batch", target, gradients)
    except Exception as error:
        return _failed(formula.text, error)
    return op


def _failed(text: str, error: Exception) -> CompileError:
    """The error of one formula; what is no error of the user's says so, and is an error of one."""
    internal = "" if isinstance(error, NormcError) else f"internal: {type(error).__name__}: "
    failed = CompileError(text, f"{internal}{error}")
    failed.__cause__ = error
    return failed
