"""C source: the skeleton that turns a plan into loops over (N, G, K, S), sizes and strides at run
time.

It walks Kernel and Sweep and decides loops, loads and stores; `normc.backends.emit` prints
expressions. Statistics are accumulated block by block along the innermost loop (two-pass within a
block, merged between blocks in double), always in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from normc.backends.c_folds import START, again, finish, merge, spelled, step
from normc.backends.c_lanes import LaneSweeps, lanes_of, width
from normc.backends.c_place import Places
from normc.backends.c_spelling import HALF, WIDE, declarations
from normc.backends.c_text import Lines, count, describe, index, instances, loop, threads
from normc.backends.contract import Job, Source
from normc.backends.emit import Block
from normc.language.axes import FULL, NONE, Axis, members
from normc.language.expr import Var, var
from normc.language.geometry import Geometry
from normc.language.reductions import REDUCTIONS
from normc.program.program import Output, Stat
from normc.schedule.plan import Kernel, Sweep, innermost

PARTS = 64
"""Into how many parts a grid is cut that sums are carried over, however many threads there are."""

_BLOCK = 1024  # elements folded before a merge: small enough for L1, long enough to amortise it


class _Printer:
    """The skeleton for one job: kernels, their loops and the sweeps along rows."""

    def __init__(self, job: Job, out: Lines) -> None:
        self.job = job
        self.out = out
        self.places = Places(job, out)

    def block(self, loops: Sequence[Axis]) -> Block:
        p = self.places
        return Block([NONE, *loops], p.spelling, p.load, "const real {} = {};")

    # --- kernels ---------------------------------------------------------------------------------
    def kernel(self, number: int, kernel: Kernel) -> None:
        self.places.grid = kernel.grid
        out, grid = self.out, self.places.ordered(kernel.grid)
        lanes = lanes_of(kernel, self.job.plan.order)
        out.add("", f"/* {kernel.name}: {instances(kernel)} */")
        if lanes:
            grid = self.places.ordered(kernel.grid & ~lanes)
            loops = self.enter_tiles(number, grid, lanes)
        elif kernel.carries:
            loops = self.enter_parts(kernel, grid)
        elif grid:
            size = "*".join(str(a.name) for a in grid)
            out.add(f"#pragma omp parallel for collapse({len(grid)}) {threads(size)}")
            out.add(*[loop(a) for a in grid])
            loops = len(grid)
        else:
            out.add("{")
            loops = 1
        for k in kernel.keeps:
            inner = members(FULL & ~kernel.grid & ~lanes)
            each = [str(a.name) for a in inner] + ["width"] * bool(lanes)
            room = f"{k.name}_ptr + thread_()*{'*'.join(each)}"
            out.add(f"real *restrict const {k.name} = {room};")
        for sweep in kernel.sweeps:
            out.add(*describe(sweep), "{")
            self.sweep(grid, sweep, lanes)
            out.close()
        out.close(loops)
        for stat in kernel.carries:
            self.finish_parts(stat, grid)

    def sweep(self, grid: list[Axis], sweep: Sweep, lanes: Axis) -> None:
        """One sweep: side by side where its rows lie along memory, else row by row."""
        side = innermost(self.job.plan.order)
        if not lanes and sweep.folds and not side & ~sweep.rows:
            self.out.add(f"const i64 first = 0, width = {count(side)}, last = width;")
            lanes = side
        if not lanes:
            self.fold_sweep(grid, sweep) if sweep.folds else self.write_sweep(grid, sweep)
            return
        self.places.lanes = lanes
        printer = LaneSweeps(self.places)
        printer.fold(grid, sweep) if sweep.folds else printer.write(grid, sweep)
        self.places.lanes = NONE

    def enter_tiles(self, number: int, grid: list[Axis], lanes: Axis) -> int:
        """Cut the axes that are contiguous in memory into tiles of lanes."""
        total = count(lanes)
        tiles = f"(({total} + width - 1)/width)"
        self.out.add(
            "{",
            f"const i64 width = size[{4 + number}];",
            f"#pragma omp parallel for collapse({len(grid) + 1}) "
            + threads("*".join([*(str(a.name) for a in grid), tiles])),
            *[loop(a) for a in grid],
            f"for (i64 first = 0; first < {total}; first += width) {{",
            f"const i64 last = least(first + width, {total});",
        )
        return len(grid) + 2

    def enter_parts(self, kernel: Kernel, grid: list[Axis]) -> int:
        """Cut the grid into parts, each with accumulators of its own for what is carried."""
        out, total = self.out, "*".join(str(a.name) for a in grid)
        out.add(f"const i64 parts = least({PARTS}, {total});")
        out.add(f"#pragma omp parallel for {threads('parts')}")
        out.add("for (i64 part = 0; part < parts; part++) {")
        for stat in kernel.carries:
            size = count(stat.kept)
            out.add(f"for (i64 i = 0; i < {size}; i++) {stat.name}_parts_ptr[part*{size} + i] = 0;")
        out.add(f"for (i64 at = part*({total})/parts; at < (part + 1)*({total})/parts; at++) {{")
        inner = [str(a.name) for a in grid]
        for i, axis in enumerate(grid):
            below = "*".join(inner[i + 1 :])
            position = f"at/({below})" if below else "at"
            wrap = f"%{axis.name}" if i else ""
            out.add(f"const i64 {index(axis)} = {position}{wrap};")
        return 2

    def part(self, stat: Stat) -> str:
        """The accumulator of a carried sum in the current part."""
        return f"{stat.name}_parts_ptr[part*{count(stat.kept)} + {self.places.offset(stat.var)}]"

    def finish_parts(self, stat: Stat, grid: list[Axis]) -> None:
        """Add up the parts of a carried sum, always in the same order."""
        rule = REDUCTIONS[stat.op].finish
        assert rule is not None
        total = "*".join(str(a.name) for a in grid)
        kept = self.places.ordered(stat.kept)
        self.out.add(f"/* {stat.name}: the parts together */", "{", *[loop(a) for a in kept])
        self.out.add(
            "wide t = 0;", f"for (i64 part = 0; part < parts; part++) t += {self.part(stat)};"
        )
        value = self.places.text(rule({"t": var("t")}, var(f"(wide)({total})")), WIDE, {}, "")
        self.out.add(f"{self.places.place(stat.var)} = {value};")
        self.out.close(len(kept) + 1)

    # --- sweeps along rows -----------------------------------------------------------------------
    def write_sweep(self, grid: list[Axis], sweep: Sweep) -> None:
        p = self.places
        loops = [*p.ordered(sweep.rows), *p.ordered(sweep.cols)]
        block = self.block([*grid, *loops])
        values = block.prepare(sweep.exprs)
        staged = self.job.unit and loops[-1:] == [self.job.plan.order[-1]]
        self.enter(block, grid, loops[:-1] if staged else loops, simd=not staged)
        if staged:
            self.enter_stage(sweep, loops[-1], block.lines[-1])
        stage = [staged and w.axes == FULL for w in sweep.writes]
        for w, value, here in zip(sweep.writes, values, stage, strict=False):
            place = self.staged(w, loops[-1]) if here else p.place(w.var)
            narrow = p.half and w.axes == FULL and not here
            self.out.add(f"{place} = narrow_({value});" if narrow else f"{place} = {value};")
        for stat, value in zip(sweep.carries, values[len(stage) :], strict=True):
            self.out.add(f"{self.part(stat)} += {value};")
        if staged:
            self.leave_stage(sweep, loops[-1])
        self.out.close(len(loops))

    def staged(self, w: Output, axis: Axis) -> str:
        return f"{w.name}_stage[{index(axis)} - from]"

    def enter_stage(self, sweep: Sweep, axis: Axis, lines: list[str]) -> None:
        """Compute a block into the cache first; `put_` then stores it whole lines at a time."""
        i = index(axis)
        self.out.add(f"for (i64 from = 0; from < {axis.name}; from += {_BLOCK}) {{",
                     f"const i64 to = least(from + {_BLOCK}, {axis.name});")  # fmt: skip
        full = [w for w in sweep.writes if w.axes == FULL]
        self.out.add(*[f"real {w.name}_stage[{_BLOCK}];" for w in full], "#pragma omp simd")
        self.out.add(f"for (i64 {i} = from; {i} < to; {i}++) {{", *lines)

    def leave_stage(self, sweep: Sweep, axis: Axis) -> None:
        self.out.close()
        for w in sweep.writes:
            if w.axes == FULL:
                first = re.sub(rf"\b{index(axis)}\]$", "from]", self.places.place(w.var))
                self.out.add(f"put_(&{first}, {w.name}_stage, to - from, stream);")

    def enter(self, block: Block, grid: list[Axis], loops: list[Axis], simd: bool = False) -> None:
        """Open loops inside the grid, each followed by the temporaries of its level."""
        for level in range(len(grid) + 1):
            self.out.add(*block.lines[level])
        for i, axis in enumerate(loops):
            if simd and i == len(loops) - 1:
                self.out.add("#pragma omp simd")
            self.out.add(loop(axis), *block.lines[len(grid) + 1 + i])

    def fold_sweep(self, grid: list[Axis], sweep: Sweep) -> None:
        p, out = self.places, self.out
        rows, cols = p.ordered(sweep.rows), p.ordered(sweep.cols)
        block = self.block([*grid, *rows, *cols])
        values = block.prepare([*(f.arg for f in sweep.folds), *(k.expr for k in sweep.keeps)])
        names = [f"f{i}" for i in range(len(sweep.folds))]
        self.enter(block, grid, rows)
        out.add("i64 seen = 0;")
        for name, fold in zip(names, sweep.folds, strict=True):
            out.add(*[f"wide {name}_{f.name} = 0;" for f in fold.state.folds])
        for i, axis in enumerate(cols[:-1]):
            out.add(loop(axis), *block.lines[len(grid) + 1 + len(rows) + i])
        size, i = cols[-1].name, index(cols[-1])
        out.add(f"for (i64 from = 0; from < {size}; from += {_BLOCK}) {{",
                f"const i64 to = least(from + {_BLOCK}, {size}), n_ = to - from;")  # fmt: skip
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


@dataclass(frozen=True)
class Stored:
    """A tensor that a job stores for itself or for backward, contiguous over (N, G, K, S)."""

    var: Var
    times: str  # "saved": handed out; "once"; "parts": one for each; "threads": one for each
    kernel: int = 0  # which kernel keeps it


def stored(job: Job) -> list[Stored]:
    """Statistics, those that are handed out first; parts of what is carried; slices kept."""
    plan = job.plan
    stats = [Stored(s.var, "saved" if s.name in plan.saved else "once") for s in plan.program.stats]
    parts = [Stored(var(f"{s.name}_parts", s.kept), "parts") for s in plan.carries]
    kept = [
        Stored(k.var, "threads", i) for i, kernel in enumerate(plan.kernels) for k in kernel.keeps
    ]
    return [*sorted(stats, key=lambda s: s.times != "saved"), *parts, *kept]


def copies(job: Job, s: Stored, geometry: Geometry, threads: int) -> int:
    """The elements of room for a tensor that is not handed out."""
    if s.times == "threads":
        kernel, order = job.plan.kernels[s.kernel], job.plan.order
        lanes = lanes_of(kernel, order)
        wide = width(kernel, lanes, geometry, threads) if lanes else 1
        return threads * wide * geometry.count(FULL & ~kernel.grid & ~lanes)
    return (PARTS if s.times == "parts" else 1) * geometry.count(s.var.axes)


def sizes(job: Job, geometry: Geometry, threads: int) -> list[int]:
    """N, G, K, S; then for each kernel the lanes in a tile, 0 where it has none."""
    kernels = [(k, lanes_of(k, job.plan.order)) for k in job.plan.kernels]
    tiles = [width(k, lanes, geometry, threads) if lanes else 0 for k, lanes in kernels]
    return [*geometry.sizes(), *tiles]


def arguments(job: Job) -> list[tuple[Var, str]]:
    """Every tensor of a job with its C type, in the order of the pointer array."""
    program = job.plan.program

    def kind(v: Var) -> str:
        return "store" if v.axes == FULL and job.dtype in HALF else "real"

    ins = [(i, f"const {kind(i)} *restrict") for i in program.inputs]
    outs = [(o.var, f"{kind(o.var)} *restrict") for o in program.outputs]
    return [*ins, *outs, *[(s.var, "real *") for s in stored(job)]]


def _signature(job: Job) -> list[str]:
    lines = [f"void {job.entry}(void **ptr, const i64 *stride, const i64 *size, double eps_, "
             "int threads, int stream) {",
             "const i64 N = size[0], G = size[1], K = size[2], S = size[3];",
             "const real eps = eps_;"]  # fmt: skip
    dense = {s.var.name for s in stored(job) if s.times in ("parts", "threads")}
    for i, (v, kind) in enumerate(arguments(job)):
        lines.append(f"{kind} {v.name}_ptr = ptr[{i}];")
        steps = [f"{v.name}_{index(a)} = stride[{4 * i + list(Axis).index(a)}]"
                 for a in members(v.axes)]  # fmt: skip
        if steps and v.name not in dense:
            lines.append(f"const i64 {', '.join(steps)};")
    return lines


def render(job: Job) -> Source:
    """The whole translation unit of a job, headed by its formula and plan."""
    body = Lines()
    body.add(*_signature(job))
    printer = _Printer(job, body)
    for number, kernel in enumerate(job.plan.kernels):
        printer.kernel(number, kernel)
    body.close()
    code = "\n".join(body.lines)
    first, *rest = job.header
    header = [f"/* {first}", *[f" * {line}".rstrip() for line in rest], " */"]
    text = [*header, declarations(code, job.dtype), "", code, ""]
    return Source("\n".join(text), job.entry, ".c", job.dtype)
