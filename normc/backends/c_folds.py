"""C folds: a state's numbers begin, take in an element, merge with another's and finish.

The same steps serve a sum along a row, where each number is a variable, and sums side by side,
where it is an array with a place, ``[i]``, for each lane.
"""

from __future__ import annotations

from collections.abc import Mapping

from normc.backends.c_place import Places
from normc.backends.c_spelling import WIDE
from normc.language.expr import Call, Expr, Var, children, var, variables
from normc.language.reductions import COUNT, REDUCTIONS, E
from normc.language.reductions import Fold as StateFold
from normc.program.program import Stat, is_scalar
from normc.schedule.plan import Fold

START = {"sum": "0", "max": "-__builtin_inf()", "min": "__builtin_inf()"}
"""Where a native fold begins."""


def step(places: Places, fold: StateFold, total: str, names: Mapping[Expr, str]) -> str:
    """Take one element into a number of a block; ``names`` spell the element and other numbers."""
    each = places.text(fold.each, places.spelling, names, "")
    return f"{total} += {each};" if fold.op == "sum" else f"{total} = {fold.op}_({each}, {total});"


def spelled(fold: Fold, name: str, at: str, element: str) -> dict[Expr, str]:
    """How the element, the count and the numbers of a block are spelled."""
    numbers: dict[Expr, str] = {var(f.name): f"{name}_{f.name}{at}" for f in fold.state.folds}
    return {E: element, COUNT: "(real)n_"} | numbers


def still(fold: StateFold) -> list[Expr]:
    """The parts of a fold that are the same for all elements of a block."""
    found: list[Expr] = []
    stack = [fold.each]
    while stack:
        node = stack.pop()
        if E in variables([node]):
            stack += children(node)
        elif isinstance(node, Call) and node not in found:
            found.append(node)
    return found


def again(places: Places, name: str, fold: Fold, at: str) -> tuple[str, bool]:
    """How an element is read a second time, and whether it has to be stored for that."""
    plain = isinstance(fold.arg, Var) and not is_scalar(fold.arg.name)
    if plain or len(fold.state.folds) == 1:
        return places.load(fold.arg) if isinstance(fold.arg, Var) else "", False
    return f"{name}_stage[{at}]", True


def merge(
    places: Places,
    fold: Fold,
    running: tuple[str, str, str],
    block: tuple[str, str, str],
) -> list[str]:
    """Merge a block's numbers into the running ones, in double.

    Each side is (name, place, count): its numbers are ``{name}_{number}{place}``.
    """
    parts = [f.name for f in fold.state.folds]
    a = {p: var(f"{running[0]}_{p}{running[1]}") for p in parts}
    b = {p: var(f"{block[0]}_{p}{block[1]}") for p in parts}
    merged = fold.state.merge(a, b, var(f"(wide){running[2]}"), var(f"(wide){block[2]}"))
    if all(merged[p] is a[p] + b[p] for p in parts):
        return [f"{a[p].name} += {b[p].name};" for p in parts]
    made = [f"const wide m_{p} = {places.text(merged[p], WIDE, {}, '')};" for p in parts]
    first = [f"{a[p].name} = {b[p].name};" for p in parts]
    then = [f"{a[p].name} = m_{p};" for p in parts]
    return [f"if ({running[2]} == 0) {{", *first, "} else {", *made, *then, "}"]


def finish(places: Places, fold: Fold, stat: Stat, name: str, at: str, seen: str) -> str:
    """Turn the numbers of a state into a statistic and store it."""
    rule = REDUCTIONS[stat.op].finish
    assert rule is not None
    values = {f.name: var(f"{name}_{f.name}{at}") for f in fold.state.folds}
    text = places.text(rule(values, var(f"(wide){seen}")), WIDE, {}, "")
    return f"{places.place(stat.var)} = {text};"
