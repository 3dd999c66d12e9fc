"""Running statistics: which statistics cross samples, and the programs that track or replace them.

Training computes them from the batch and hands them out; evaluation is `freeze`: they become
inputs. Where a batch is spread over processes, each takes statistics of its `local` part, which are
then merged. Nothing here knows a layer's name: any statistic over N has a running counterpart,
nested ones too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from normc.language.axes import Axis
from normc.language.expr import Var, call, var
from normc.language.reductions import counted
from normc.program.program import Output, Program, Stat, counts, restrict, rewritten, tensors

Mode = str
"""Where batch statistics come from: "batch"; "track", the batch, handed out too; "frozen", inputs;
"synced", inputs, as is the number of samples of all parts of a batch; "local0" computes the
statistics of level 0 and nothing else, "local1" those that depend on them, ..."""
LOCAL, SYNCED = "local", "synced"


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


def by_mode(program: Program, rows: Sequence[Running], mode: Mode) -> Program:
    """The program that a mode computes."""
    if mode.startswith(LOCAL):
        return local(program, rows, int(mode.removeprefix(LOCAL)))
    if mode == "track":
        return track(program, rows)
    if mode == SYNCED:
        return _counting(freeze(program, rows))
    return freeze(program, rows) if mode == "frozen" else program


def whole_counts(program: Program) -> dict[str, Axis]:
    """The numbers of elements that depend on how many samples there are, as inputs: what `local`
    and synced programs call them, and the axes they are counted over."""
    return {_counted(v).name: counted(v) for v in counts(program) if counted(v) & Axis.N}


def _counted(count: Var) -> Var:
    return var(f"count_{count.name.strip('|')}")


def _counting(program: Program) -> Program:
    """The program with those numbers as inputs: a part does not know how large the whole is."""
    values = {v: _counted(v) for v in counts(program) if counted(v) & Axis.N}
    whole = rewritten(program, (*program.inputs, *values.values()), values)
    return restrict(whole, whole.outputs)


def levels(program: Program, rows: Sequence[Running]) -> list[list[Running]]:
    """The running statistics, first those that depend on no other, then those of these, ..."""
    found = {r.stat: r for r in rows}
    depth: dict[str, int] = {}  # of every statistic: of how many running ones in a row it reads
    sorted_rows: dict[int, list[Running]] = {}
    for stat in program.stats:
        here = max((depth.get(v.name, 0) for v in tensors([stat.arg])), default=0)
        if stat.name in found:
            sorted_rows.setdefault(here, []).append(found[stat.name])
        depth[stat.name] = here + (stat.name in found)
    return [sorted_rows[level] for level in sorted(sorted_rows)]


def local(program: Program, rows: Sequence[Running], level: int) -> Program:
    """The statistics of one level over the samples that are here, each with what merging needs.

    Those of the levels before are inputs. Beside a variance goes its mean, beside a maximum or
    minimum the number of elements that are equal to it.
    """
    every = levels(program, rows)
    known = [r for some in every[:level] for r in some]
    below = freeze(replace(program, outputs=track(program, rows).outputs), known)
    stats, outputs = list(below.stats), list[Output]()
    for r in every[level]:
        stat = program.stat(r.stat)
        outputs.append(Output(r.output, r.kept, stat.var))
        beside = _beside(stat)
        if beside is not None:
            stats.append(beside)
            outputs.append(Output(f"{beside.name}_now", r.kept, beside.var))
    return _counting(restrict(Program(below.inputs, tuple(stats), ()), outputs))


def _beside(stat: Stat) -> Stat | None:
    """What has to be known of a part's statistic, so that it can be merged with others."""
    if stat.op == "var":
        return Stat(f"{stat.name}_mean", "mean", stat.over, stat.arg)
    if stat.op in ("max", "min"):
        hit = call("where", call("eq", stat.arg, stat.var), 1, 0)
        return Stat(f"{stat.name}_ties", "sum", stat.over, hit)
    return None
