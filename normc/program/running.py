"""Running statistics: which statistics cross samples, and the programs that track or replace them.

Training computes them from the batch and hands them out; evaluation is `freeze`: they become
inputs. Nothing here knows a layer's name: any statistic over N has a running counterpart, nested
ones too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from normc.language.axes import Axis
from normc.program.program import Output, Program, Stat, restrict


@dataclass(frozen=True)
class Running:
    """One statistic over the batch: its buffer's name, axes and start."""

    name: str  # of the buffer: "running_var"
    stat: str  # of the program: "s0"
    op: str
    over: Axis
    kept: Axis
    start: float

    @property
    def unbiased(self) -> bool:
        """Whether the buffer takes n/(n-1) of the value, as nn.BatchNorm's variance does."""
        return self.op == "var"

    @property
    def output(self) -> str:
        """What the tracked program calls the batch's own value."""
        return f"{self.stat}_now"


def running(program: Program) -> tuple[Running, ...]:
    """The statistics of a flat program that cross samples, with names for their buffers."""
    stats = [s for s in program.stats if s.over & Axis.N]
    uses = Counter(s.op for s in stats)
    seen: Counter[str] = Counter()
    rows: list[Running] = []
    for s in stats:
        suffix = f"_{seen[s.op]}" if uses[s.op] > 1 else ""
        seen[s.op] += 1
        name = f"running_{s.op}{suffix}"
        rows.append(Running(name, s.name, s.op, s.over, s.kept, s.start))
    return tuple(rows)


def track(program: Program, rows: Sequence[Running]) -> Program:
    """The program which also returns the batch's own value of every running statistic."""
    stats: dict[str, Stat] = {s.name: s for s in program.stats}
    extra = tuple(Output(r.output, r.kept, stats[r.stat].var) for r in rows)
    return replace(program, outputs=(*program.outputs, *extra))


def freeze(program: Program, rows: Sequence[Running]) -> Program:
    """The program with running statistics as inputs."""
    frozen = {r.stat for r in rows}
    inputs = (*program.inputs, *(s.var for s in program.stats if s.name in frozen))
    stats = tuple(s for s in program.stats if s.name not in frozen)
    return restrict(Program(inputs, stats, ()), program.outputs)
