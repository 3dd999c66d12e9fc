"""Tile states: what Triton kernels know about the states of reductions: names, merges, results."""

from __future__ import annotations

from normc.language.expr import Expr, Var, var, variables
from normc.language.reductions import ALL, COUNT, REDUCTIONS, State, Values, count
from normc.program.program import Stat
from normc.schedule.plan import Fold


def finished(stat: Stat, values: Values) -> Expr:
    """The value of a statistic, from the numbers of its state."""
    rule = REDUCTIONS[stat.op].finish
    assert rule is not None, f"{stat.op} is not a core reduction"
    return rule(values, count(stat.over))


def label(fold: Fold) -> str:
    """What the numbers of a fold's state are called after."""
    return fold.stats[0].name


def values_of(fold: Fold, suffix: str = "") -> dict[str, Var]:
    """The numbers of a fold's state, under the names they have in the text."""
    return {f.name: var(f"{label(fold)}_{f.name}{suffix}") for f in fold.state.folds}


def weighs(state: State) -> bool:
    """Whether tiles are merged as states; a lone fold that ignores how many may gather elements."""
    if len(state.folds) > 1:
        return True
    values: Values = {f.name: var(f.name) for f in state.folds}
    seen, here = var("seen"), var("here")
    merged = state.merge(values, values, seen, here).values()
    read = variables([*merged, *(f.each for f in state.folds)])
    return not {COUNT, seen, here}.isdisjoint(read)


def gathers_by_weight(state: State) -> bool:
    """Whether it matters how many elements a block has when states of many are gathered."""
    return not {COUNT, ALL}.isdisjoint(variables(f.each for f in state.gather))
