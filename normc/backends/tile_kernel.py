"""Tile kernels, long as one skeleton: a `Form` becomes the text of one Triton function.

It walks the phases and sweeps of a kernel and knows no sizes; `tile_scope` has what every line
needs. A statistic is folded over a tile, two-pass where its state asks for it, and in loops merged
with what earlier tiles gave, always in the same order. Where programs share an instance,
`tile_shares` prints how they exchange states. A statistic per row that a later sweep of a loop
reads goes through memory, behind a barrier; every other value stays in registers. A sum that is
carried is kept by each program for its own instances, and another kernel adds up their parts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from normc.backends.emit import Block
from normc.backends.tile_scope import START, Scope
from normc.backends.tile_shares import LOCAL, exchange, hand_over, share_of
from normc.backends.tile_spelling import settled, spelling
from normc.backends.tile_states import finished, label, values_of, weighs
from normc.backends.tiling import Dim, Form
from normc.language.axes import FULL, NONE, show
from normc.language.expr import Expr, Var, rewrite, var, variables
from normc.language.reductions import COUNT, EPS, E, count, counted
from normc.program.program import Stat, is_scalar
from normc.schedule.plan import Fold, Sweep


class Printer:
    """The text of one kernel in one form."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.scope = Scope(form)
        self.spelling = spelling(form.job.dtype)
        self.waiting: set[str] = set()  # statistics stored since the last barrier
        self.temporaries = 0
        # On chip, what varies over no axis of the grid is read before the rest.
        depths = [FULL & ~form.kernel.grid, FULL] if form.resident else [form.kernel.grid]
        self.block = Block(depths, self.spelling, self.load, "{} = {}")

    def kernel(self) -> str:
        """The whole function."""
        self.scope.signature(_summary(self.form))
        kernel, sweeps = self.form.kernel, self.form.kernel.sweeps
        with self.instances():
            for phase in kernel.phases:
                for sweep in phase:
                    self.sweep(sweeps.index(sweep), sweep)
                if self.form.resident:
                    self.conclude(phase)
        if self.form.resident:
            for stat in kernel.carries:
                axes = kernel.grid | stat.kept
                total = self.scope.fold(0, axes, kernel.grid, "sum", f"{stat.name}_t")
                self.scope.store_at(self.part(stat), stat.kept, total)
        return self.scope.text()

    @contextmanager
    def instances(self) -> Generator[None, None, None]:
        """The instances of a program: one block of them, or block after block."""
        scope, form = self.scope, self.form
        if form.shared:
            scope.parts()
        first = "program" if form.shared else "tl.program_id(0)"
        if not form.turns:
            scope.instances(first)
            self.read_all()
            self.flush(0, 1)
            yield
            return
        scope.add(f"part = {first}")
        self.read_all()
        if form.kernel.carries:  # else Triton would change the layout of what it holds at each turn
            self.flush(0)
        if form.resident:
            for stat in form.kernel.carries:
                start = scope.full(0, form.kernel.grid | stat.kept, "sum")
                scope.add(f"{stat.name}_t = {start}")
        blocks = "*".join(map(scope.blocks, form.grid)) or "1"
        together = "".join(f"//{d.parts}" for d in form.free) if form.shared else ""
        with scope.loop(f"turn in range(part, {blocks}, tl.num_programs(0){together})"):
            scope.instances("turn")
            if form.kernel.carries and not form.resident:
                scope.add("tl.debug_barrier()  # the part stored in the turn before can be read")
            self.flush(0, 1)
            yield

    def read_all(self) -> None:
        """What is on chip from the start: the indices of all elements, the loads of all tensors."""
        if self.form.resident:
            for d in self.form.free:
                first = f"{d.letter}_part" if self.form.shared else "0"
                if self.form.shared and not self.scope.one(d):
                    first = f"{first}*{d.block()}"
                self.scope.index(d, first, d.block())
            self.prepare(self.form.kernel.reads)

    def flush(self, *levels: int) -> None:
        """Print the temporaries that wait in the block for these levels."""
        for level in levels:
            if level < len(self.block.lines):
                self.scope.add(*self.block.lines[level])
                self.block.lines[level] = []

    # --- values ----------------------------------------------------------------------------------
    def load(self, v: Var) -> str:
        """The text that reads a tensor or names a scalar."""
        if v is EPS:
            return self.scope.eps()
        return self.scope.count(counted(v)) if is_scalar(v.name) else self.scope.load(v)

    def prepare(self, exprs: Sequence[Expr]) -> list[str]:
        """The text of expressions over tensors; their temporaries wait in the block."""
        return self.block.prepare(rewrite(exprs, settled))

    def numbers(self, exprs: Sequence[Expr], names: Mapping[Var, str]) -> list[str]:
        """The text of expressions over the numbers of a state; their temporaries are added here."""
        block = Block([NONE], self.spelling, self.load, "{} = {}", "u", count=self.temporaries)
        for v, name in names.items():
            block.bind(v, name)
        texts = block.prepare(exprs)
        self.temporaries = block.count
        self.scope.add(*block.lines[0])
        return texts

    # --- sweeps ----------------------------------------------------------------------------------
    def sweep(self, i: int, sweep: Sweep) -> None:
        """One pass: loops over rows and columns, or everything at once in the resident form."""
        self.scope.add("", f"# {_describe(sweep)}")
        if self.waiting & {v.name for v in sweep.reads}:
            self.scope.add("tl.debug_barrier()  # what other threads have stored can be read")
            self.waiting.clear()
        if self.form.resident:
            values = self.prepare(sweep.exprs)
            self.flush(0, 1)
            self.tile(i, sweep, values)
            return
        rows, cols = self.form.along(sweep.rows), self.form.along(sweep.cols)
        self.block.depths = [self.block.depths[0], *(d.axes for d in (*rows, *cols))]
        values = self.prepare(sweep.exprs)
        self.flush(0)
        with self.loops(i, rows, 1):
            self.start(i, sweep)
            with self.loops(i, cols, 1 + len(rows)):
                self.tile(i, sweep, values)
            self.collect(i, sweep)
            if not self.form.shared:
                self.finish(sweep)
        self.block.leave()

    def conclude(self, phase: Sequence[Sweep]) -> None:
        """What a phase on chip has folded becomes statistics, once all programs have met."""
        every = self.form.kernel.sweeps
        folding = {every.index(sweep): sweep for sweep in phase if sweep.folds}
        if self.form.shared and folding:
            exchange(self.scope, folding)
        for sweep in folding.values():
            self.finish(sweep)

    @contextmanager
    def loops(self, i: int, dims: Sequence[Dim], level: int) -> Generator[None, None, None]:
        """Loops over dimensions, each followed by the temporaries of its level."""
        with ExitStack() as stack:
            for d in dims:
                stack.enter_context(self.scope.loop(self.range(d, d.block(i))))
                self.scope.index(d, f"{d.letter}_from", d.block(i))
                self.flush(level)
                level += 1
            yield

    def range(self, d: Dim, step: str) -> str:
        """The loop over a dimension: all of it, or the share of this program."""
        by = "" if self.scope.one(d) else f", {step}"
        if not self.form.shared:
            return f"{d.letter}_from in range(0, {d.size}{by})"
        end = f"tl.minimum(({d.letter}_part + 1)*{d.share}, {d.size})"
        return f"{d.letter}_from in range({d.letter}_part*{d.share}, {end}{by})"

    def start(self, i: int, sweep: Sweep) -> None:
        """The states of a row before its first tile."""
        if any(weighs(fold.state) for fold in sweep.folds):
            self.scope.add(f"seen{i} = tl.zeros([], {self.scope.real})")
        for fold in sweep.folds:
            axes = self.form.kernel.grid | sweep.rows | (NONE if weighs(fold.state) else sweep.cols)
            for f in fold.state.folds:
                self.scope.add(f"{label(fold)}_{f.name} = {self.scope.full(i, axes, f.op)}")

    def tile(self, i: int, sweep: Sweep, values: Sequence[str]) -> None:
        """What is done with one tile: it is folded, written, or carried on."""
        weighed = not self.form.resident and any(weighs(fold.state) for fold in sweep.folds)
        if weighed:
            self.scope.add(f"here = {self.elements(i, sweep)}")
        written = len(sweep.folds) + len(sweep.writes)
        for fold, value in zip(sweep.folds, values, strict=False):
            self.fold(i, sweep, fold, value)
        if weighed:
            self.scope.add(f"seen{i} += here")
        for out, value in zip(sweep.writes, values[len(sweep.folds) : written], strict=True):
            self.scope.store(out.var, self.scope.named(f"{out.name}_", value))
        for stat, value in zip(sweep.carries, values[written:], strict=True):
            self.carry(i, stat, value)

    def elements(self, i: int, sweep: Sweep) -> str:
        """The number of elements that a row has in this tile."""
        cols = [d for d in self.form.along(sweep.cols) if not self.scope.one(d)]
        parts = [
            f"tl.minimum({d.block(i)}, {d.size} - {d.letter}_from)"
            if self.scope.ragged(d)
            else d.block(i)
            for d in cols
        ]
        return f"tl.cast({'*'.join(parts) or '1'}, {self.scope.real})"

    # --- folds -----------------------------------------------------------------------------------
    def fold(self, i: int, sweep: Sweep, fold: Fold, value: str) -> None:
        """Fold a tile into the state: at once, merged with earlier tiles, or element by element."""
        element = self.scope.named(f"{label(fold)}_e", value)
        if self.form.resident:
            self.state(i, sweep, fold, element, LOCAL if self.form.shared else "")
        elif weighs(fold.state):
            self.state(i, sweep, fold, element, "_tile")
            self.merge(i, fold)
        else:
            self.gather(sweep, fold, element)

    def state(self, i: int, sweep: Sweep, fold: Fold, element: str, suffix: str) -> None:
        """The state of each row of a tile."""
        names = {E: element}
        if weighs(fold.state):
            names[COUNT] = self.held(sweep)
        axes = self.form.kernel.grid | sweep.rows | sweep.cols
        for f in fold.state.folds:
            (each,) = self.numbers([f.each], names)
            names[var(f.name)] = number = f"{label(fold)}_{f.name}{suffix}"
            inside = self.scope.masked(sweep.cols, each, START[f.op])
            self.scope.add(f"{number} = {self.scope.fold(i, axes, sweep.cols, f.op, inside)}")

    def held(self, sweep: Sweep) -> str:
        """The number of elements of a row that are folded together."""
        if not self.form.resident:
            return "here"
        if not self.form.shared:
            return self.scope.count(sweep.cols)
        return self.scope.here(sweep.cols, share_of(self.form))

    def merge(self, i: int, fold: Fold) -> None:
        """Merge a tile's state with that of the tiles before it, of which there may be none."""
        totals, tiles = values_of(fold), values_of(fold, "_tile")
        seen, here = var(f"seen{i}"), var("here")
        merged = fold.state.merge(totals, tiles, seen, here)
        every = [*totals.values(), *tiles.values(), seen, here]
        texts = self.numbers([merged[name] for name in totals], {v: v.name for v in every})
        self.scope.add(f"{', '.join(v.name for v in totals.values())} = (")
        for tile, text in zip(tiles.values(), texts, strict=True):
            self.scope.add(f"    tl.where(seen{i} == 0.0, {tile.name}, {text}),")
        self.scope.add(")")

    def gather(self, sweep: Sweep, fold: Fold, element: str) -> None:
        """Add a tile to those before it, element by element; `finish` folds their sum, once."""
        (f,) = fold.state.folds
        (each,) = self.numbers([f.each], {E: element})
        inside = var(self.scope.masked(sweep.cols, each, START[f.op]))
        total = values_of(fold)[f.name]
        merged = fold.state.merge({f.name: total}, {f.name: inside}, COUNT, COUNT)[f.name]
        (text,) = self.numbers([merged], {total: total.name, inside: inside.name})
        self.scope.add(f"{total.name} = {text}")

    def collect(self, i: int, sweep: Sweep) -> None:
        """Fold what a row has gathered; where programs share the row, hand it to the others."""
        axes = self.form.kernel.grid | sweep.rows | sweep.cols
        for fold in sweep.folds:
            names = [v.name for v in values_of(fold).values()]
            if not weighs(fold.state):
                for f, name in zip(fold.state.folds, names, strict=True):
                    self.scope.add(f"{name} = {self.scope.fold(i, axes, sweep.cols, f.op, name)}")
            if self.form.shared:
                hand_over(self.scope, sweep, fold, names)

    def finish(self, sweep: Sweep) -> None:
        """Turn the states of a row into its statistics."""
        for fold in sweep.folds:
            values = values_of(fold)
            for stat in fold.stats:
                value = finished(stat, values)
                names = {v: v.name for v in values.values()}
                if count(sweep.cols) in variables([value]):
                    names[count(sweep.cols)] = self.scope.count(sweep.cols)
                (text,) = self.numbers([value], names)
                self.keep(stat, self.scope.named(stat.name, text))

    def keep(self, stat: Stat, name: str) -> None:
        """Keep a statistic in registers or store it, or both."""
        if self.form.registered(stat):
            self.block.bind(stat.var, name)
        else:
            self.waiting.add(stat.name)
        if self.form.stores(stat):
            self.scope.store(stat.var, name)

    # --- sums over the grid ----------------------------------------------------------------------
    def carry(self, i: int, stat: Stat, value: str) -> None:
        """Add the instances of a tile to the program's part of a sum: in registers or in memory."""
        grid, scope = self.form.kernel.grid, self.scope
        element = scope.named(f"{stat.name}_e", value)
        inside = scope.masked(grid, element, "0.0")
        if self.form.resident:
            scope.add(f"{stat.name}_t = {stat.name}_t + {inside}")
            return
        inner = scope.mask(stat.kept)
        mask = f", {inner}, 0.0" if inner else ""
        scope.add(f"{stat.name}_t = {scope.fold(i, grid | stat.kept, grid, 'sum', inside)}")
        scope.add(f"{stat.name}_before = tl.load({self.part(stat)}{mask})")
        total = f"{stat.name}_t + tl.where(turn == part, 0.0, {stat.name}_before)"
        scope.store_at(self.part(stat), stat.kept, total)

    def part(self, stat: Stat) -> str:
        """Pointers to the program's part of a sum."""
        sizes = [d.size for d in self.form.along(stat.kept)]
        terms = ["*".join(["part", *sizes]), *self.scope.offset(stat.kept)]
        return " + ".join([f"{stat.name}_parts", *terms])


def _summary(form: Form) -> str:
    grid = ", ".join(d.letter for d in form.grid)
    free = ", ".join(d.letter for d in form.free)
    several = "every so many blocks" if form.turns else "a block"
    who = "Several programs take" if form.shared else "A program takes"
    owner = f"{who} {several} of ({grid})" if grid else f"{who} everything"
    if not free:
        return f"{owner}."
    how = f"holds all of ({free}) in one tile" if form.resident else f"loops over ({free})"
    if form.shared:
        how = how.replace("holds all", "hold parts").replace("loops over", "loop over parts of")
    return f"{owner} and {how}."


def _describe(sweep: Sweep) -> str:
    stats = [f"{s.name} = {s.op}[{show(s.over)}]" for f in sweep.folds for s in f.stats]
    written = [f"write {w.name}" for w in sweep.writes]
    return ", ".join([*stats, *written, *(f"carry {s.name}" for s in sweep.carries)])
