"""Steps: what is derived from a Program is a Program again, and can be derived from in turn.

    vjp    the gradients of some inputs, from the inputs and cotangents of the results
    jvp    the tangents of the results, from the inputs and tangents of some of them
    vmap   the same results with a batch beside the samples, over which some inputs vary too

Results of a step have its level in their names (``grad1_x``, ``push2_grad1_x``), so that no step
meets a name of the steps before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from normc.errors import NormcError
from normc.language.axes import NONE, Axis
from normc.language.expr import Expr, Var, const, substitute, var
from normc.language.reductions import REDUCTIONS, count, counted
from normc.program.program import COTANGENT, Output, Program, Stat, counts, restrict, rewritten

Kind = Literal["vjp", "jvp", "vmap"]


@dataclass(frozen=True)
class Step:
    """One derivation, with respect to, along, or batched over the inputs ``names``."""

    kind: Kind
    names: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """What has been derived so far: outputs from inputs alone; ``results`` can be derived from."""

    source: Program
    results: tuple[str, ...]
    level: int = 0


def take(stage: Stage, step: Step) -> Stage:
    """The next stage. Raises `NormcError` where a tensor has a name that the step needs."""
    return {"vjp": _gradients, "jvp": _tangents, "vmap": _batched}[step.kind](stage, step.names)


# --- what steps call things -------------------------------------------------------------------


def cotangent(result: str) -> str:
    """What arrives at a result of any level."""
    return COTANGENT + result


def tangent(level: int, name: str) -> str:
    """What goes in beside an input of a stage of that level."""
    return f"tangent{level}_{name}"


def past(level: int, result: str) -> str:
    """What a gradient calls a result of the stage before it, which it may read."""
    return f"past{level}_{result}"


def _fresh(names: Iterable[str], program: Program) -> None:
    taken = {i.name for i in program.inputs}.intersection(names)
    if taken:
        name = min(taken)
        raise NormcError(f"`{name}` is what a derivative calls a tensor of its own: rename yours")


# --- reverse mode -----------------------------------------------------------------------------


def _gradients(stage: Stage, wrt: Sequence[str]) -> Stage:
    """Backward as a program: without what forward has saved, which depends on the inputs too."""
    from normc.program.derive import reuse  # brings sympy, which takes 0.3 s to import

    level, source = stage.level, stage.source
    _fresh([past(level, name) for name in stage.results], source)
    whole = _pulled(source, stage.results, wrt)
    own = [replace(o, name=past(level, o.name)) for o in source.outputs if o.name in stage.results]
    whole = reuse(replace(source, outputs=tuple(own)), whole)  # backward may have kept only results
    names = {cotangent(name): f"grad{level + 1}_{name}" for name in wrt}
    outputs = tuple(replace(o, name=names[o.name]) for o in whole.outputs)
    return Stage(replace(whole, outputs=outputs), tuple(o.name for o in outputs), level + 1)


def _pulled(source: Program, results: Sequence[str], wrt: Sequence[str]) -> Program:
    """From inputs and cotangents of the results to the cotangents of the inputs ``wrt``."""
    from normc.program.derive import vjp

    _fresh(map(cotangent, results), source)
    found = vjp(source, wrt, results)
    own = {s.name for s in source.stats}
    inputs = tuple(i for i in found.inputs if i.name not in own)
    inputs = (*inputs, *(i for i in source.inputs if i not in inputs))
    return restrict(Program(inputs, (*source.stats, *found.stats), ()), found.outputs)


# --- forward mode -----------------------------------------------------------------------------


def _tangents(stage: Stage, along: Sequence[str]) -> Stage:
    """Forward mode is the transpose of reverse mode, which is linear in the cotangents."""
    level = stage.level
    _fresh([tangent(level, name) for name in along], stage.source)
    there = _pulled(stage.source, stage.results, along)
    back = _pulled(_reading(there, stage), [o.name for o in there.outputs], _cotangents(stage))
    given = zip(there.outputs, along, strict=True)
    names = {var(cotangent(o.name), o.axes): var(tangent(level, n), o.axes) for o, n in given}
    found = rewritten(back, [names.get(i, i) for i in back.inputs], names)
    outputs = zip(found.outputs, stage.results, strict=True)
    pushed = tuple(replace(o, name=f"push{level + 1}_{name}") for o, name in outputs)
    return Stage(replace(found, outputs=pushed), tuple(o.name for o in pushed), level + 1)


def _cotangents(stage: Stage) -> list[str]:
    return [cotangent(name) for name in stage.results]


def _reading(there: Program, stage: Stage) -> Program:
    """The program with every cotangent among its inputs, read or not."""
    axes = {o.name: o.axes for o in stage.source.outputs}
    every = [var(cotangent(name), axes[name]) for name in stage.results]
    return replace(there, inputs=(*there.inputs, *(v for v in every if v not in there.inputs)))


# --- batches ----------------------------------------------------------------------------------


def crosses(program: Program) -> bool:
    """Whether anything depends on which samples are together, or on how many they are."""
    over = any(s.over & Axis.N for s in program.stats)
    return over or any(counted(v) & Axis.N for v in counts(program))


def _batched(stage: Stage, names: Sequence[str]) -> Stage:
    """N then holds batch and samples: of a program that does not cross it, or for one sample each.

    What crosses a single sample crosses nothing, so every statistic loses N.
    """
    program = stage.source
    values: dict[Var, Expr] = {v: _less(counted(v)) for v in counts(program)}
    more = dict.fromkeys(names, Axis.N)
    inputs = [var(i.name, i.axes | more.get(i.name, NONE)) for i in program.inputs]
    values |= dict(zip(program.inputs, inputs, strict=True))
    stats: list[Stat] = []
    for stat in program.stats:
        (arg,) = substitute([stat.arg], values)
        over = stat.over & ~Axis.N
        if over:
            stats.append(replace(stat, over=over, arg=arg))
            values[stat.var] = stats[-1].var
        else:
            values[stat.var] = REDUCTIONS[stat.op].single(arg)
    exprs = substitute([o.expr for o in program.outputs], values)
    outputs = [
        Output(o.name, o.axes | (e.axes & Axis.N), e)
        for o, e in zip(program.outputs, exprs, strict=True)
    ]
    whole = restrict(Program(tuple(inputs), tuple(stats), ()), outputs)
    return Stage(whole, stage.results, stage.level)


def _less(axes: Axis) -> Expr:
    """The number of elements over axes where there is one sample."""
    left = axes & ~Axis.N
    return const(1) if left == NONE else count(left)
