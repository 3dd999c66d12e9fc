"""C rows: sweeps whose innermost loop runs along contiguous memory, a block at a time.

Statistics are accumulated block by block (two-pass within a block, merged between blocks in
double), always in the same order. Full-size results are computed into the cache by blocks, and
stored from there whole lines at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from normc.backends.c_folds import START, again, finish, merge, spelled, step
from normc.backends.c_place import Places
from normc.backends.c_text import count, index, loop
from normc.backends.emit import Block
from normc.language.axes import FULL, NONE, Axis
from normc.program.program import Output, Stat
from normc.schedule.plan import Sweep

_BLOCK = 1024  # elements folded before a merge: small enough for L1, long enough to amortise it


def part(places: Places, stat: Stat) -> str:
    """The accumulator of a carried sum in the current part of the grid."""
    return f"{stat.name}_parts_ptr[part*{count(stat.kept)} + {places.offset(stat.var)}]"


class RowSweeps:
    """Prints sweeps along rows."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.out = places.out

    def block(self, loops: Sequence[Axis]) -> Block:
        p = self.places
        return Block([NONE, *loops], p.spelling, p.load, "const real {} = {};")

    def write(self, grid: list[Axis], sweep: Sweep) -> None:
        """Write outputs, and add to what is carried."""
        p = self.places
        loops = [*p.ordered(sweep.rows), *p.ordered(sweep.cols)]
        block = self.block([*grid, *loops])
        values = block.prepare(sweep.exprs)
        staged = p.job.unit and loops[-1:] == [p.job.plan.order[-1]]
        self.enter(block, grid, loops[:-1] if staged else loops, simd=not staged)
        if staged:
            self.enter_stage(sweep, loops[-1], block.lines[-1])
        stage = [staged and w.axes == FULL for w in sweep.writes]
        for w, value, here in zip(sweep.writes, values, stage, strict=False):
            place = self.staged(w, loops[-1]) if here else p.place(w.var)
            narrow = p.half and w.axes == FULL and not here
            self.out.add(f"{place} = narrow_({value});" if narrow else f"{place} = {value};")
        for stat, value in zip(sweep.carries, values[len(stage) :], strict=True):
            self.out.add(f"{part(p, stat)} += {value};")
        if staged:
            self.leave_stage(sweep, loops[-1])
        self.out.close(len(loops))

    def staged(self, w: Output, axis: Axis) -> str:
        return f"{w.name}_to[{index(axis)} - from]"

    def enter_stage(self, sweep: Sweep, axis: Axis, lines: list[str]) -> None:
        """Compute a block into the cache first where it is narrowed or stored past the cache,
        whole lines at a time, by `put_`; else straight into its place."""
        i, half = index(axis), self.places.half
        self.out.add(f"for (i64 from = 0; from < {axis.name}; from += {_BLOCK}) {{",
                     f"const i64 to = least(from + {_BLOCK}, {axis.name});")  # fmt: skip
        for name, first in self.firsts(sweep, axis):
            there = f"{name}_stage" if half else f"stream ? {name}_stage : {first}"
            self.out.add(f"real {name}_stage[{_BLOCK}];", f"real *const {name}_to = {there};")
        self.out.add("#pragma omp simd", f"for (i64 {i} = from; {i} < to; {i}++) {{", *lines)

    def leave_stage(self, sweep: Sweep, axis: Axis) -> None:
        self.out.close()
        when = "" if self.places.half else "if (stream) "
        for name, first in self.firsts(sweep, axis):
            self.out.add(f"{when}put_({first}, {name}_stage, to - from, stream);")

    def firsts(self, sweep: Sweep, axis: Axis) -> list[tuple[str, str]]:
        """The full-size outputs, each with the place where the block begins."""
        full = [w for w in sweep.writes if w.axes == FULL]
        places = [re.sub(rf"\b{index(axis)}\]$", "from]", self.places.place(w.var)) for w in full]
        return [(w.name, f"&{place}") for w, place in zip(full, places, strict=True)]

    def enter(self, block: Block, grid: list[Axis], loops: list[Axis], simd: bool = False) -> None:
        """Open loops inside the grid, each followed by the temporaries of its level."""
        for level in range(len(grid) + 1):
            self.out.add(*block.lines[level])
        for i, axis in enumerate(loops):
            if simd and i == len(loops) - 1:
                self.out.add("#pragma omp simd")
            self.out.add(loop(axis), *block.lines[len(grid) + 1 + i])

    def fold(self, grid: list[Axis], sweep: Sweep) -> None:
        """Fold statistics, and store them."""
        p, out = self.places, self.out
        rows, cols = p.ordered(sweep.rows), p.ordered(sweep.cols)
        block = self.block([*grid, *rows, *cols])
        values = block.prepare([*(f.arg for f in sweep.folds), *(k.expr for k in sweep.keeps)])
        names = [f"f{i}" for i in range(len(sweep.folds))]
        self.enter(block, grid, rows)
        out.add("i64 seen = 0;")
        for name, fold in zip(names, sweep.folds, strict=True):
            out.add(*[f"wide {name}_{f.name} = 0;" for f in fold.state.folds])
        between = [block.lines[len(grid) + 1 + len(rows) + i] for i in range(len(cols) - 1)]
        joined = self.join(sweep, cols, between)
        for i, (axis, lines) in enumerate(zip(cols[:-1], between, strict=True)):
            outer = joined and i == len(cols) - 2
            out.add(loop(axis, f"{axis.name}_" if outer else ""), *lines)
        size, i = f"{cols[-1].name}_" if joined else cols[-1].name, index(cols[-1])
        out.add(f"for (i64 from = 0; from < {size}; from += {_BLOCK}) {{",
                f"const i64 to = least(from + {_BLOCK}, {size}), n_ = to - from;")  # fmt: skip
        self.fetch(sweep, [*rows, *cols])
        kept = zip(sweep.keeps, values[len(names) :], strict=True)
        inner = [*block.lines[-1], *[f"{p.place(k.var)} = {value};" for k, value in kept]]
        self.phases(sweep, names, values[: len(names)], inner, i)
        for name, fold in zip(names, sweep.folds, strict=True):
            out.add(*merge(p, fold, (name, "", "seen"), (f"{name}_b", "", "n_")))
        out.add("seen += n_;")
        out.close(len(cols))
        out.add("if (seen == 0) seen = 1;  /* an empty batch: statistics of 0, not NaN */")
        for name, fold in zip(names, sweep.folds, strict=True):
            out.add(*[finish(p, fold, stat, name, "", "seen") for stat in fold.stats])
        out.close(len(rows))

    def join(self, sweep: Sweep, cols: list[Axis], between: list[list[str]]) -> bool:
        """Go through channels and positions as one run where nothing is in between: short rows
        cost more to merge than to fold. What is computed per channel, or kept, needs them apart."""
        p, order = self.places, self.places.job.plan.order
        if len(cols) < 2 or tuple(cols[-2:]) != tuple(order[-2:]) or not p.job.unit:
            return False
        full = [v for v in sweep.reads if v.axes == FULL and v.name not in p.kept]
        apart = any(v.axes != FULL and v.axes & (cols[-2] | cols[-1]) for v in sweep.reads)
        if sweep.keeps or not full or apart or between[-1]:
            return False
        far, near = (axis.name for axis in cols[-2:])
        whole = " && ".join(f"{v.name}_{index(cols[-2])} == {near}" for v in full)
        self.out.add(
            f"const int one_run = {whole};",
            f"const i64 {far}_ = one_run ? 1 : {far}, {near}_ = one_run ? {far}*{near} : {near};",
        )
        return True

    def fetch(self, sweep: Sweep, loops: list[Axis]) -> None:
        """Fetch the next block from memory where it does not follow this one: no cache foresees it.

        Batch statistics of a channels-first tensor jump from sample to sample.
        """
        p, order = self.places, self.places.job.plan.order
        if len(loops) < 2 or not p.job.unit or loops[-1] != order[-1] or loops[-2] == order[-2]:
            return
        far, near = index(loops[-2]), index(loops[-1])
        full = [v for v in sweep.reads if v.axes == FULL and v.name not in p.kept]
        places = [re.sub(rf"\b{far}\b", f"({far} + 1)", p.offset(v)) for v in full]
        places = [re.sub(rf"\b{near}$", "from", place) for place in places]
        self.out.add(f"if (stream && {far} + 1 < {loops[-2].name}) {{")
        for v, place in zip(full, places, strict=True):
            self.out.add(f"ahead_(&{v.name}_ptr[{place}], n_*sizeof(*{v.name}_ptr));")
        self.out.close()

    def phases(
        self, sweep: Sweep, names: list[str], values: list[str], inner: list[str], i: str
    ) -> None:
        """Fold one block: the n-th folds of all states share the n-th loop over it."""
        saved = {n: again(self.places, n, f, f"{i} - from")
                 for n, f in zip(names, sweep.folds, strict=True)}  # fmt: skip
        self.out.add(*[f"real {n}_stage[{_BLOCK}];" for n in names if saved[n][1]])
        for phase in range(max(len(f.state.folds) for f in sweep.folds)):
            active = [(n, f, v) for n, f, v in zip(names, sweep.folds, values, strict=True)
                      if phase < len(f.state.folds)]  # fmt: skip
            numbers = [(n, f.state.folds[phase]) for n, f, _ in active]
            totals = [f"{n}_b_{number.name}" for n, number in numbers]
            for total, (_, number) in zip(totals, numbers, strict=True):
                self.out.add(f"real {total} = {START[number.op]};")
            if all(number.op == "sum" for _, number in numbers):
                self.out.add(f"#pragma omp simd reduction(+:{', '.join(totals)})")
            self.out.add(f"for (i64 {i} = from; {i} < to; {i}++) {{", *(inner if not phase else []))
            for total, (n, fold, value) in zip(totals, active, strict=True):
                stage, stored = saved[n]
                self.out.add(f"const real {n}_e = {stage if phase else value};")
                if not phase and stored:
                    self.out.add(f"{stage} = {n}_e;")
                known = spelled(fold, f"{n}_b", "", f"{n}_e")
                self.out.add(step(self.places, fold.state.folds[phase], total, known))
            self.out.close()
