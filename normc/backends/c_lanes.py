"""C lanes: many reductions side by side, one in each lane of the axes contiguous in memory.

A reduction along contiguous memory adds up a row. One along any other axis, instance statistics of
a channels-last tensor or a value per position of a channels-first one, would walk memory in
strides. Here the innermost loop runs over the contiguous axes instead, each lane with numbers of
its own; what does not vary in the loops between is computed into arrays before them. Where the
channels of a group are lanes, their numbers are merged, in order, when all is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from normc.backends.c_folds import START, again, finish, merge, spelled, step, still
from normc.backends.c_place import LANE, Places
from normc.backends.c_text import index, loop
from normc.backends.emit import Block
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.expr import Expr
from normc.language.geometry import Geometry
from normc.schedule.plan import Fold, Kernel, Sweep, innermost

LANES = 1024
"""The most lanes side by side: the room of an array."""

_BLOCK = 8192  # elements folded before a merge, so that a state can look at them twice
_SLICE = 2**20  # elements of a slice that stay in the cache between two sweeps
_LEAST = 128  # lanes: a few lines of memory


def lanes_of(kernel: Kernel, order: tuple[Axis, ...]) -> Axis:
    """The axes over which the instances of a kernel are run side by side, if any."""
    lanes = innermost(order)
    outermost = Axis.G if lanes == CHANNEL else lanes
    return lanes if kernel.grid & outermost else NONE


def width(kernel: Kernel, lanes: Axis, geometry: Geometry, threads: int) -> int:
    """How many lanes a tile of a kernel has: whole groups, a slice that the cache holds."""
    total = geometry.count(lanes)
    unit = geometry.count(lanes & ~kernel.grid)
    most = min(LANES, _SLICE // max(1, geometry.count(FULL & ~kernel.grid & ~lanes)))
    if geometry.count(kernel.grid & ~lanes) < threads:
        most = min(most, -(-total // threads))
    some = max(_LEAST, most // _LEAST * _LEAST)
    return max(unit, min(some, total) // max(1, unit) * unit, 1)


@dataclass
class LaneBlock(Block):
    """A block whose statements run once per loop (even levels) or once per lane (odd levels)."""

    lanes: Axis = NONE

    def depth(self, axes: Axis) -> int:
        return 2 * super().depth(axes & ~self.lanes) + bool(axes & self.lanes)

    @property
    def levels(self) -> int:
        return 2 * len(self.depths)

    def _name(self, node: Expr) -> None:
        level = self.depth(node.axes)
        if level % 2 == 0 or level == self.levels - 1:
            super()._name(node)
            return
        super()._name(node)
        name = self.names[id(node)]
        text = self.lines[level].pop().partition(" = ")[2]
        self.lines[level].append(f"{name}[i] = {text}")
        self.names[id(node)] = f"{name}[i]"


def arrays(lines: list[str]) -> list[str]:
    """The arrays that lane statements fill, and the loop which does so."""
    if not lines:
        return []
    names = [line.partition("[i]")[0] for line in lines]
    return [f"real {', '.join(f'{n}[{LANES}]' for n in names)};", *simd(), *lines, "}"]


def simd() -> list[str]:
    """The head of the loop over lanes."""
    return ["#pragma omp simd", "for (i64 i = 0; i < lanes; i++) {"]


class LaneSweeps:
    """Prints sweeps over the lanes of ``places``, inside a tile from ``first`` to ``last``."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.out = places.out

    def block(self, loops: list[Axis]) -> LaneBlock:
        p = self.places
        return LaneBlock([NONE, *loops], p.spelling, p.load, "const real {} = {};", lanes=p.lanes)

    def open(self, block: LaneBlock, level: int) -> None:
        """The temporaries of a loop that has just been entered."""
        self.out.add(*block.lines[2 * level])
        if level < len(block.depths) - 1:
            self.out.add(*arrays(block.lines[2 * level + 1]))

    def chunk(self, block: LaneBlock, before: int) -> None:
        """Enter a chunk of the tile's lanes, and compute what holds for all of it."""
        self.out.add(
            f"for (i64 base = first; base < last; base += {LANES}) {{",
            f"const i64 lanes = least({LANES}, last - base);",
        )
        inner = before == len(block.depths) - 1
        levels = range(before if inner else before + 1)
        self.out.add(*arrays([line for level in levels for line in block.lines[2 * level + 1]]))

    def write(self, grid: list[Axis], sweep: Sweep) -> None:
        """Write outputs, a row of lanes at a time."""
        p, out = self.places, self.out
        loops = p.ordered((sweep.rows | sweep.cols) & ~p.lanes)
        block = self.block([*grid, *loops])
        values = block.prepare(sweep.exprs)
        for level in range(len(grid) + 1):
            out.add(*block.lines[2 * level])
        self.chunk(block, len(grid))
        for i, axis in enumerate(loops):
            out.add(loop(axis))
            self.open(block, len(grid) + 1 + i)
        full = [w for w in sweep.writes if w.axes == FULL and p.job.unit]
        out.add(*[f"real {w.name}_stage[{LANES}];" for w in full], *simd(), *block.lines[-1])
        for w, value in zip(sweep.writes, values, strict=True):
            place = f"{w.name}_stage[i]" if w in full else p.place(w.var)
            narrow = p.half and w.axes == FULL and w not in full
            out.add(f"{place} = narrow_({value});" if narrow else f"{place} = {value};")
        out.close()
        for w in full:
            start = p.place(w.var).replace(LANE, "base")
            out.add(f"put_(&{start}, {w.name}_stage, lanes, stream);")
        out.close(len(loops) + 1)

    def fold(self, grid: list[Axis], sweep: Sweep) -> None:
        """Fold statistics: per lane, and then over the lanes of a group if it has several."""
        p, out = self.places, self.out
        rows, outer = p.ordered(sweep.rows & ~p.lanes), p.ordered(sweep.cols & ~p.lanes)
        block = self.block([*grid, *rows, *outer])
        exprs = [*(f.arg for f in sweep.folds), *(k.expr for k in sweep.keeps)]
        values = block.prepare(exprs)
        before = len(grid) + len(rows)
        for level in range(before + 1):
            if level > len(grid):
                out.add(loop(rows[level - len(grid) - 1]))
            out.add(*block.lines[2 * level])
        grouped = bool(sweep.cols & p.lanes)
        if grouped:
            self.begin_groups(sweep)
        self.chunk(block, before)
        self.columns(sweep, block, outer, values)
        self.groups(sweep) if grouped else self.finish(sweep)
        out.close()
        if grouped:
            self.finish_groups(sweep)
        out.close(len(rows))

    def columns(self, sweep: Sweep, block: LaneBlock, outer: list[Axis], values: list[str]) -> None:
        """Run over the columns, in blocks of a few rows of lanes."""
        p, out, before = self.places, self.out, len(block.depths) - len(outer)
        out.add("i64 seen = 0;")
        for n, fold in _named(sweep):
            out.add(*[f"wide {n}_{f.name}[{LANES}];" for f in fold.state.folds])
            out.add(*[f"for (i64 i = 0; i < lanes; i++) {n}_{f.name}[i] = 0;"
                      for f in fold.state.folds])  # fmt: skip
        for i, axis in enumerate(outer[:-1]):
            out.add(loop(axis))
            self.open(block, before + i)
        size = str(outer[-1].name) if outer else "1"
        out.add(f"const i64 rows = {_BLOCK}/lanes;",
                f"for (i64 from = 0; from < {size}; from += rows) {{",
                f"const i64 to = least(from + rows, {size}), n_ = to - from;")  # fmt: skip
        self.phases(sweep, block, index(outer[-1]) if outer else "row", values, bool(outer))
        for n, fold in _named(sweep):
            out.add(*simd(), *merge(p, fold, (n, "[i]", "seen"), (f"{n}_b", "[i]", "n_")), "}")
        out.add("seen += n_;")
        out.close(max(1, len(outer)))
        out.add("if (seen == 0) seen = 1;  /* an empty batch: statistics of 0, not NaN */")

    def phases(
        self, sweep: Sweep, block: LaneBlock, row: str, values: list[str], outer: bool
    ) -> None:
        """Fold a block of rows: the n-th folds of all states share the n-th loop over it."""
        out, p = self.out, self.places
        saved = {n: again(p, n, f, f"({row} - from)*lanes + i") for n, f in _named(sweep)}
        out.add(*[f"real {n}_stage[{_BLOCK}];" for n, (_, stored) in saved.items() if stored])
        for phase in range(max(len(f.state.folds) for f in sweep.folds)):
            active = [(*pair, v) for pair, v in zip(_named(sweep), values, strict=False)
                      if phase < len(pair[1].state.folds)]  # fmt: skip
            known = {n: self.begin(n, f, phase) for n, f, _ in active}
            out.add(f"for (i64 {row} = from; {row} < to; {row}++) {{")
            if phase == 0 and outer:
                self.open(block, len(block.depths) - 1)
            out.add(*simd(), *(block.lines[-1] if phase == 0 else []))
            for n, f, value in active:
                text, stored = saved[n]
                out.add(f"const real {n}_e = {text if phase else value};")
                if phase == 0 and stored:
                    out.add(f"{text} = {n}_e;")
                number = f.state.folds[phase]
                out.add(step(p, number, f"{n}_b_{number.name}[i]", known[n]))
            if phase == 0:
                kept = zip(sweep.keeps, values[len(sweep.folds) :], strict=True)
                out.add(*[f"{p.place(k.var)} = {value};" for k, value in kept])
            out.close(2)

    def begin(self, n: str, fold: Fold, phase: int) -> dict[Expr, str]:
        """Arrays for the numbers of a block, and for what is the same for all its elements."""
        p, number = self.places, fold.state.folds[phase]
        names = spelled(fold, f"{n}_b", "[i]", f"{n}_e")
        each = f"{n}_b_{number.name}[i] = {START[number.op]};"
        self.out.add(f"real {n}_b_{number.name}[{LANES}];", *simd(), each, "}")
        parts = {e: f"{n}_{number.name}_{j}[i]" for j, e in enumerate(still(number))}
        texts = [f"{part} = {p.text(e, p.spelling, names, '')};" for e, part in parts.items()]
        self.out.add(*arrays(texts))
        return names | parts

    def finish(self, sweep: Sweep) -> None:
        """Store the statistics, one per lane."""
        for n, fold in _named(sweep):
            stores = [finish(self.places, fold, s, n, "[i]", "seen") for s in fold.stats]
            self.out.add("for (i64 i = 0; i < lanes; i++) {", *stores, "}")

    def begin_groups(self, sweep: Sweep) -> None:
        """Numbers for each group of the tile."""
        self.out.add(f"i64 all[{LANES}];")
        names = [f"{n}_g_{f.name}" for n, fold in _named(sweep) for f in fold.state.folds]
        self.out.add(f"wide {', '.join(f'{n}[{LANES}]' for n in names)};")
        zero = [f"{n}[j] = 0;" for n in names]
        self.out.add("for (i64 j = 0; j < (last - first)/K; j++) {", "all[j] = 0;", *zero, "}")

    def groups(self, sweep: Sweep) -> None:
        """Merge the lanes of each group, in order."""
        self.out.add("for (i64 i = 0; i < lanes; i++) {", f"const i64 j = ({LANE} - first)/K;")
        for n, fold in _named(sweep):
            group, lane = (f"{n}_g", "[j]", "all[j]"), (n, "[i]", "seen")
            self.out.add("{", *merge(self.places, fold, group, lane), "}")
        self.out.add("all[j] += seen;", "}")

    def finish_groups(self, sweep: Sweep) -> None:
        """Store the statistics, one per group."""
        p = self.places
        p.group, lane = "first/K + j", p.group
        self.out.add("for (i64 j = 0; j < (last - first)/K; j++) {")
        for n, fold in _named(sweep):
            self.out.add(*[finish(p, fold, s, f"{n}_g", "[j]", "all[j]") for s in fold.stats])
        self.out.close()
        p.group = lane


def _named(sweep: Sweep) -> list[tuple[str, Fold]]:
    return [(f"f{i}", fold) for i, fold in enumerate(sweep.folds)]
