"""Keep: a dear value which two sweeps of a kernel need is computed once and kept in the cache.

A backward kernel evaluates ``sigmoid(v*x)`` for its sums, and again for the gradient of x. What of
the later sweep reads none of the kernel's own statistics, and holds such a value, can be computed
in the first sweep, a slice at a time. Backends that recompute for nothing do not ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

from normc.language.axes import FULL, NONE
from normc.language.expr import Call, Expr, children, postorder, variables, with_children
from normc.language.primitives import PRIMITIVES
from normc.program.program import Output
from normc.schedule.plan import Kernel, Sweep


def keep(kernel: Kernel, before: int = 0) -> Kernel:
    """The kernel with its dear values computed once; ``before`` it, others keep as many."""
    sweeps = list(kernel.sweeps)
    inner = FULL & ~kernel.grid
    whole = [i for i, s in enumerate(sweeps) if s.rows | s.cols == inner]
    own = {s.name for sweep in sweeps for fold in sweep.folds for s in fold.stats}
    if kernel.grid == NONE or len(whole) < 2 or not sweeps[whole[0]].folds:
        return kernel
    first = sweeps[whole[0]]
    for i in whole[1:]:
        cuts = _cuts(first.exprs, sweeps[i].exprs, lambda e: _reads(e, own))
        count = before + len(first.keeps)
        kept = [Output(f"kept{count + j}", FULL, cut) for j, cut in enumerate(cuts)]
        first = replace(first, keeps=(*first.keeps, *kept))
        sweeps[i] = _reading(sweeps[i], kept)
    sweeps[whole[0]] = first
    return replace(kernel, sweeps=tuple(sweeps))


@cache
def is_dear(fn: str) -> bool:
    """Whether a primitive costs more than it costs to store and load its value."""
    row = PRIMITIVES[fn]
    if row.body is None:
        return row.dear
    nodes = postorder([row.expand(*row.parameters())])
    return any(isinstance(e, Call) and is_dear(e.fn) for e in nodes)


def _reads(expr: Expr, names: set[str]) -> bool:
    return any(v.name in names for v in variables([expr]))


def _cuts(
    before: Iterable[Expr], after: Sequence[Expr], late: Callable[[Expr], bool]
) -> list[Expr]:
    """The largest early parts of ``after`` that hold a dear value of ``before``; at best one."""
    known = {id(e) for e in postorder(before)}
    shared = [
        e
        for e in postorder(after)
        if isinstance(e, Call) and is_dear(e.fn) and id(e) in known and e.axes == FULL
    ]
    wanted = {id(e) for e in shared if not late(e)}
    if not wanted:
        return []
    found: dict[int, Expr] = {}
    stack = list(after)
    while stack:
        node = stack.pop()
        if not any(id(e) in wanted for e in postorder([node])):
            continue
        if late(node):
            stack += children(node)
        else:
            found[id(node)] = node
    nested = sum(id(e) in found for root in found.values() for e in postorder([root]))
    values: list[Expr] = [e for e in shared if id(e) in wanted]
    return list(found.values()) if nested == len(found) <= len(values) else values


def _reading(sweep: Sweep, kept: Sequence[Output]) -> Sweep:
    """The sweep with kept values in the place of their expressions."""
    names = {id(k.expr): k.var for k in kept}
    done: dict[int, Expr] = {}

    def read(expr: Expr) -> Expr:
        if id(expr) not in done:
            args = tuple(read(c) for c in children(expr)) if id(expr) not in names else ()
            done[id(expr)] = names.get(id(expr)) or (with_children(expr, args) if args else expr)
        return done[id(expr)]

    return replace(
        sweep,
        folds=tuple(replace(f, arg=read(f.arg)) for f in sweep.folds),
        writes=tuple(replace(w, expr=read(w.expr)) for w in sweep.writes),
        carries=tuple(replace(s, arg=read(s.arg)) for s in sweep.carries),
    )
