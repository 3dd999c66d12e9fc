"""Schedule: a Program becomes a Plan, by the axes of its statistics alone, never by a layer's name.

1. The statistics on which full-size outputs depend form *stages*. The grid of a stage is the set of
   axes that all its statistics keep: then no value crosses instances inside a kernel. A statistic
   joins the current stage while one grid contains the other and something is left to run in
   parallel.
2. The other statistics, parameter gradients above all, ride in an existing stage where its grid
   allows, if need be as a partial sum whose finishing sum runs in a later, tiny kernel: in fixed
   order, no atomics, bitwise repeatable. A sum over exactly the grid is *carried* from instance to
   instance where the backend can: the rows of a row norm add to parameter gradients while they are
   in the cache.
3. Outputs are written in the stage of the last statistic they read.
   Where nothing but the axes contiguous in memory would be left as a grid, or nothing at all, a
   statistic is taken per sample first, so that samples run in parallel and memory in rows.
4. In a stage, statistics of one level over the same rows and columns share a sweep. A statistic
   over more axes than another is made from one like that (`normc.schedule.finer`), and what is
   dear is computed in one sweep only (`normc.schedule.keep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from normc.language.axes import FULL, NONE, ORDER, Axis
from normc.language.expr import Expr
from normc.language.reductions import REDUCTIONS
from normc.program.program import Output, Program, Stat, tensors, verify
from normc.schedule.finer import from_finer
from normc.schedule.keep import keep
from normc.schedule.plan import PLAIN, Able, Fold, Kernel, Plan, Sweep, innermost

CHANNELS_FIRST = ORDER
CHANNELS_LAST = (Axis.N, Axis.S, Axis.G, Axis.K)


@dataclass
class Stage:
    """A kernel in the making."""

    grid: Axis
    stats: list[Stat] = field(default_factory=lambda: [])
    writes: list[Output] = field(default_factory=lambda: [])
    carries: list[Stat] = field(default_factory=lambda: [])


def schedule(
    program: Program,
    order: tuple[Axis, ...] = CHANNELS_FIRST,
    able: Able = PLAIN,
    split: bool = False,
) -> Plan:
    """Plan the kernels of a program for tensors whose axes lie in memory in ``order``.

    ``split``: reductions are few and large, so each is to be shared among instances.
    """
    finer = from_finer(program, order, _essential(program), split)
    program = _partial_sums(finer, order, split)
    stages = _stages(program, order, able.carry, split)
    kernels = [_kernel(f"k{i}", stage, order) for i, stage in enumerate(stages)]
    for i, kernel in enumerate(kernels):
        if able.keep:
            kernels[i] = keep(kernel, sum(len(k.keeps) for k in kernels[:i]))
    return Plan(program, tuple(kernels), order)


def pointwise_grid(order: tuple[Axis, ...]) -> Axis:
    """The grid where no statistic asks for one: all but the innermost axis (channels are one)."""
    return FULL & ~innermost(order)


def _essential(program: Program) -> set[str]:
    """Names of the statistics on which full-size outputs depend."""
    needed = {v.name for o in program.outputs if o.axes == FULL for v in tensors([o.expr])}
    for stat in reversed(program.stats):
        if stat.name in needed:
            needed |= {v.name for v in tensors([stat.arg])}
    return {s.name for s in program.stats} & needed


def _main_stages(program: Program, order: tuple[Axis, ...], split: bool) -> list[Stage]:
    """Stages of the essential statistics, in order; the last one writes the full-size outputs."""
    essential = _essential(program)
    stages: list[Stage] = []
    home: dict[str, int] = {}
    for stat in program.stats:
        if stat.name not in essential:
            continue
        ready = max((home[v.name] for v in tensors([stat.arg]) if v.name in home), default=0)
        early = [i for i, s in enumerate(stages[ready:], ready) if s.grid == stat.kept]
        if early:
            stages[early[0]].stats.append(stat)
            home[stat.name] = early[0]
            continue
        last = stages[-1] if stages else None
        grid = last.grid & stat.kept if last else NONE
        whole = not split and grid & ~innermost(order) or (last and grid == last.grid)
        if last and grid and grid in (last.grid, stat.kept) and whole:
            last.grid = grid
            last.stats.append(stat)
        else:
            stages.append(Stage(stat.kept, [stat]))
        home[stat.name] = len(stages) - 1
    full = any(o.axes == FULL for o in program.outputs)
    if full and (split or not (stages and stages[-1].grid & ~innermost(order))):
        kept = stages[-1].grid & ~Axis.N if stages and not split else NONE
        stages.append(Stage(Axis.N | kept if kept else pointwise_grid(order)))
    return stages


def _partial_sums(program: Program, order: tuple[Axis, ...], split: bool) -> Program:
    """Split sums which no full-size output needs at the main grid: a partial sum and a finish."""
    stages = _main_stages(program, order, split)
    grid = stages[-1].grid if stages else pointwise_grid(order)
    essential = _essential(program)
    stats: list[Stat] = []
    known = {(s.op, s.over, s.arg): s for s in reversed(program.stats)}
    for s in program.stats:
        splits = REDUCTIONS[s.op].linear and s.over & grid and s.over & ~grid
        if s.name in essential or not splits or grid & ~s.arg.axes:
            stats.append(s)
            continue
        taken = any(other.name == f"{s.name}_part" for other in program.stats)
        part = Stat(f"{s.name}_part{2 if taken else ''}", s.op, s.over & ~grid, s.arg)
        found = known.setdefault((part.op, part.over, part.arg), part)
        if found is part:
            stats.append(part)
        stats.append(replace(s, over=s.over & grid, arg=found.var))
    return verify(replace(program, stats=tuple(stats)))


def _stages(program: Program, order: tuple[Axis, ...], carry: bool, split: bool) -> list[Stage]:
    """All stages: essential statistics, then the others and the outputs placed among them."""
    stages = _main_stages(program, order, split)
    main = len(stages) - 1
    home = {s.name: i for i, stage in enumerate(stages) for s in stage.stats}
    for stat in program.stats:
        if stat.name not in home:
            main_grid = stages[main].grid if carry and main >= 0 else NONE
            if _carried(stat, main_grid, order) and _ready(stat.arg, home) <= main:
                stages[main].carries.append(stat)
                home[stat.name] = main + 1  # complete only when the kernel is: read later
            else:
                home[stat.name] = _place(stages, stat, home)
    for out in program.outputs:
        if out.axes == FULL:
            stages[main].writes.append(out)
        else:
            _place_output(stages, out, home)
    return stages


def _carried(stat: Stat, grid: Axis, order: tuple[Axis, ...]) -> bool:
    """Whether a sum is over exactly the grid and kept along the rows that lie in memory."""
    apart = not grid & innermost(order)
    whole = bool(grid) and apart and stat.over == grid and REDUCTIONS[stat.op].linear
    return whole and (not stat.kept or bool(stat.kept & innermost(order)))


def _ready(expr: Expr, home: dict[str, int]) -> int:
    """The first stage in which everything an expression reads has been computed."""
    return max((home[v.name] for v in tensors([expr]) if v.name in home), default=0)


def _holds(stage: Stage, axes: Axis) -> bool:
    """Whether a value over ``axes`` belongs to one instance of the stage's grid."""
    return not stage.grid & ~axes and (bool(stage.grid) or not axes)


def _place(stages: list[Stage], stat: Stat, home: dict[str, int]) -> int:
    """Put a statistic into the first stage that may hold it; a new last stage if none may."""
    for i in range(_ready(stat.arg, home), len(stages)):
        if _holds(stages[i], stat.kept):
            stages[i].stats.append(stat)
            return i
    stages.append(Stage(stat.kept, [stat]))
    return len(stages) - 1


def _place_output(stages: list[Stage], out: Output, home: dict[str, int]) -> None:
    """Put a gradient smaller than x where its statistics are ready."""
    for stage in stages[_ready(out.expr, home) :]:
        if _holds(stage, out.axes):
            stage.writes.append(out)
            return
    stages.append(Stage(out.axes, [], [out]))


def _kernel(name: str, stage: Stage, order: tuple[Axis, ...]) -> Kernel:
    """Group a stage's statistics into sweeps by level, rows and columns; then its writes."""
    levels: dict[str, int] = {}
    sweeps: dict[tuple[int, Axis, Axis], list[Stat]] = {}
    for stat in stage.stats:
        below = [levels[v.name] for v in tensors([stat.arg]) if v.name in levels]
        levels[stat.name] = 1 + max(below, default=0)
        rows = stat.kept & ~stage.grid
        sweeps.setdefault((levels[stat.name], rows, stat.over), []).append(stat)
    done = [
        Sweep(rows, cols, folds=_folds(sweeps[level, rows, cols]))
        for level, rows, cols in sorted(sweeps, key=lambda key: key[0])
    ]
    return Kernel(name, stage.grid, (*done, *_write_sweeps(stage, order)))


def _write_sweeps(stage: Stage, order: tuple[Axis, ...]) -> list[Sweep]:
    def shape(axes: Axis) -> tuple[Axis, Axis]:
        inner = axes & ~stage.grid
        return inner & ~innermost(order), inner & innermost(order)

    groups: dict[tuple[Axis, Axis], Sweep] = {}
    for out in stage.writes:
        sweep = groups.setdefault(shape(out.axes), Sweep(*shape(out.axes)))
        groups[shape(out.axes)] = replace(sweep, writes=(*sweep.writes, out))
    for stat in stage.carries:
        sweep = groups.setdefault(shape(stat.kept), Sweep(*shape(stat.kept)))
        groups[shape(stat.kept)] = replace(sweep, carries=(*sweep.carries, stat))
    return list(groups.values())


def _folds(stats: Sequence[Stat]) -> tuple[Fold, ...]:
    """Statistics of one argument share the richest state that serves them all."""
    folds: list[Fold] = []
    for stat in sorted(stats, key=lambda s: -len(s.state.folds)):
        for i, fold in enumerate(folds):
            if fold.arg is stat.arg and set(stat.state.folds) <= set(fold.state.folds):
                folds[i] = replace(fold, stats=(*fold.stats, stat))
                break
        else:
            folds.append(Fold(stat.state, stat.arg, (stat,)))
    return tuple(folds)
