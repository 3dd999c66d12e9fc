"""Plans: what is computed in which pass over memory; backends walk this and decide nothing.

    plan   ::= {kernel}
    kernel ::= grid axes, {sweep}                  one launch; one instance per index over the grid
    sweep  ::= rows, cols, {fold | write | carry | keep}    one pass; per row, a loop over columns

An instance of a kernel runs its sweeps in order. In a sweep it visits, for every index over
``rows``, all indices over ``cols``: it accumulates statistics over the columns and stores them per
(grid, rows), or writes outputs at (grid, rows, cols). A later sweep or kernel reads what was
stored. Kernels follow each other in stream order, so a statistic may cross instances only from one
kernel to a later one.
"""

from __future__ import annotations

from dataclasses import dataclass

from normc.language.axes import CHANNEL, Axis, show
from normc.language.expr import Expr, Var
from normc.language.reductions import State
from normc.language.show import show_expr
from normc.program.program import Output, Program, Stat, tensors


def innermost(order: tuple[Axis, ...]) -> Axis:
    """The axes that are contiguous in memory; the two of a channel are one."""
    return CHANNEL if order[-1] & CHANNEL else order[-1]


@dataclass(frozen=True)
class Fold:
    """Statistics that share one accumulation: the same argument over the same axes."""

    state: State
    arg: Expr
    stats: tuple[Stat, ...]  # each is finished from the state and stored


@dataclass(frozen=True)
class Sweep:
    """One pass over memory."""

    rows: Axis
    cols: Axis
    folds: tuple[Fold, ...] = ()
    writes: tuple[Output, ...] = ()
    carries: tuple[Stat, ...] = ()  # sums over the whole grid, kept per row and column
    keeps: tuple[Output, ...] = ()  # values of the slice that a later sweep reads again

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """What is evaluated at every element."""
        folded, carried = (f.arg for f in self.folds), (s.arg for s in self.carries)
        return (*folded, *(w.expr for w in self.writes), *carried, *(k.expr for k in self.keeps))

    @property
    def reads(self) -> list[Var]:
        """The tensors read, in order of first use."""
        return tensors(self.exprs)

    @property
    def stores(self) -> tuple[Var, ...]:
        """The statistics or outputs stored."""
        stats = tuple(s.var for f in self.folds for s in f.stats)
        return (*stats, *(w.var for w in self.writes), *(s.var for s in self.carries))


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    grid: Axis
    sweeps: tuple[Sweep, ...]

    @property
    def carries(self) -> tuple[Stat, ...]:
        """The sums that its instances add to, in parts of the grid, merged when all are done."""
        return tuple(s for sweep in self.sweeps for s in sweep.carries)

    @property
    def keeps(self) -> tuple[Output, ...]:
        """The values of a slice that are kept from one sweep to another."""
        return tuple(k for sweep in self.sweeps for k in sweep.keeps)

    @property
    def phases(self) -> tuple[tuple[Sweep, ...], ...]:
        """Its sweeps in order, grouped: none reads what another one of its group stores."""
        groups: list[tuple[Sweep, ...]] = []
        stored: set[str] = set()
        for sweep in self.sweeps:
            if not groups or any(v.name in stored for v in sweep.reads):
                groups.append(())
                stored.clear()
            groups[-1] += (sweep,)
            stored |= {v.name for v in (*sweep.stores, *(k.var for k in sweep.keeps))}
        return tuple(groups)

    @property
    def reads(self) -> list[Var]:
        """Tensors read that the kernel did not store itself."""
        stored = {v.name for sweep in self.sweeps for v in sweep.stores}
        stored |= {k.name for k in self.keeps}
        seen = {v.name: v for sweep in self.sweeps for v in sweep.reads if v.name not in stored}
        return list(seen.values())


@dataclass(frozen=True)
class Plan:
    """All launches of one Program for one order of axes in memory."""

    program: Program
    kernels: tuple[Kernel, ...]
    order: tuple[Axis, ...]  # outermost to innermost in memory: how loops nest
    saved: tuple[str, ...] = ()  # statistics that outlive the call, for backward

    def show(self) -> str:
        """Stable text: kernels, sweeps, what each reads and stores."""
        lines: list[str] = []
        for kernel in self.kernels:
            lines.append(f"kernel {kernel.name} grid[{show(kernel.grid)}]")
            for sweep in kernel.sweeps:
                reads = ", ".join(v.name for v in sweep.reads)
                lines.append(
                    f"  sweep rows[{show(sweep.rows)}] cols[{show(sweep.cols)}] reads {reads}"
                )
                for fold in sweep.folds:
                    names = ", ".join(f"{s.name}:{s.op}" for s in fold.stats)
                    lines.append(f"    {names} <- {fold.state.name} {show_expr(fold.arg)}")
                lines += [f"    {w.name} <- {show_expr(w.expr)}" for w in sweep.writes]
                lines += [f"    {s.name}:{s.op} += {show_expr(s.arg)}" for s in sweep.carries]
                lines += [f"    keep {k.name} <- {show_expr(k.expr)}" for k in sweep.keeps]
        return "\n".join(lines)

    @property
    def carries(self) -> tuple[Stat, ...]:
        """The sums carried over the instances of some kernel."""
        return tuple(s for kernel in self.kernels for s in kernel.carries)

    @property
    def keeps(self) -> tuple[Output, ...]:
        """The values kept from one sweep to another of some kernel."""
        return tuple(k for kernel in self.kernels for k in kernel.keeps)


@dataclass(frozen=True)
class Able:
    """What a backend can do beyond the least, and a schedule may then ask for."""

    carry: bool = False  # accumulate sums from one instance of a kernel to the next
    keep: bool = False  # keep values of an instance's slice from one sweep to a later one
    share: bool = False  # share a large instance among programs by itself, without a plan for it


PLAIN = Able()
"""The least: every sweep reads its tensors and stores its values."""
