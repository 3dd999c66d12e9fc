"""Finer: a coarse statistic comes from finer ones that the program computes anyway.

The batch variance of EvoNorm-B0 needs no sweep of its own beside the instance moments: it is the
mean of the instances' variances plus the variance of their means. A sum over batch and positions
is a sum of sums over positions. How each statistic splits is in its row of `REDUCTIONS`.
"""

from __future__ import annotations

from dataclasses import replace

from normc.language.axes import FULL, Axis, members
from normc.language.expr import Expr
from normc.language.reductions import REDUCTIONS
from normc.program.program import Program, Stat, tensors, verify
from normc.schedule.plan import innermost


def from_finer(
    program: Program, order: tuple[Axis, ...], essential: set[str], split: bool
) -> Program:
    """The program in which a statistic over more axes reads those over fewer of the same level.

    An ``essential`` one that would leave no grid outside the contiguous axes is split by samples;
    with ``split``, every one by the rows that lie in memory.
    """
    levels = _levels(program)
    splits = _Splits(program)
    for stat in program.stats:
        finer = [
            s.over
            for s in program.stats
            if s.arg.axes == stat.arg.axes == FULL
            and s.over != stat.over
            and s.over & stat.over == s.over
            and levels[s.name] == levels[stat.name]
        ]
        inside = stat.over & ~Axis.N
        alone = (
            stat.name in essential and stat.arg.axes == FULL and not stat.kept & ~innermost(order)
        )
        if alone and inside and stat.over & Axis.N:
            finer.append(inside)
        row = stat.over & innermost(order)
        if split and stat.name in essential and stat.arg.axes == FULL and row != stat.over:
            finer = [row] if row else finer
        splits.add(stat, finer)
    return verify(replace(program, stats=tuple(splits.stats)))


def _levels(program: Program) -> dict[str, int]:
    """How many full-size statistics each statistic waits for, one after the other."""
    levels: dict[str, int] = {}
    for stat in program.stats:
        below = max((levels[v.name] for v in tensors([stat.arg]) if v.name in levels), default=0)
        levels[stat.name] = below + (stat.arg.axes == FULL)
    return levels


class _Splits:
    """The statistics of the new program, each under the name it has in the old one."""

    def __init__(self, program: Program) -> None:
        self.stats: list[Stat] = []
        self._named = {(s.op, s.over, s.arg): s for s in reversed(program.stats)}
        self._axes: dict[str, list[Axis]] = {}

    def add(self, stat: Stat, finer: list[Axis]) -> None:
        """Add a statistic, over the largest of the finer axes if there are any."""
        if any(s.name == stat.name for s in self.stats):
            return
        rule = REDUCTIONS[stat.op].split
        if not finer or rule is None:
            self.stats.append(stat)
            return
        inside = max(finer, key=lambda axes: len(members(axes)))

        def part(op: str) -> Expr:
            return self._find(stat, op, inside, "part", [])

        def whole(op: str) -> Expr:
            return self._find(stat, op, stat.over, "whole", finer)

        op, arg = rule(part, whole)
        self.stats.append(replace(stat, op=op, over=stat.over & ~inside, arg=arg))

    def _find(self, stat: Stat, op: str, over: Axis, what: str, finer: list[Axis]) -> Expr:
        """The statistic of the same argument, the program's own if it has one."""
        name = f"{stat.name}_{what}" + (f"_{op}" if op != stat.op else "")
        found = self._named.setdefault((op, over, stat.arg), Stat(name, op, over, stat.arg))
        self.add(found, finer)
        return found.var
