"""C source: the skeleton that turns a plan into loops over (N, G, K, S), sizes and strides at run
time.

It walks the kernels and decides how instances are run: one by one, in parts that carry sums, or in
tiles of lanes. What a sweep does inside is in `normc.backends.c_rows` and `normc.backends.c_lanes`,
where a tensor's elements lie in `normc.backends.c_place`; `normc.backends.emit` prints expressions.
"""

from __future__ import annotations

from dataclasses import dataclass

from normc.backends.c_lanes import LaneSweeps, lanes_of, width
from normc.backends.c_place import Places
from normc.backends.c_rows import RowSweeps, part
from normc.backends.c_spelling import HALF, WIDE, declarations
from normc.backends.c_text import Lines, count, describe, index, instances, loop, threads
from normc.backends.contract import Job, Source
from normc.language.axes import FULL, NONE, Axis, members
from normc.language.expr import Var, var
from normc.language.geometry import Geometry
from normc.language.reductions import REDUCTIONS
from normc.program.program import Stat
from normc.schedule.plan import Kernel, Sweep, innermost

PARTS = 64
"""Into how many parts a grid is cut that sums are carried over, however many threads there are."""


class _Printer:
    """The skeleton for one job: kernels and the loops over their instances."""

    def __init__(self, job: Job, out: Lines) -> None:
        self.job = job
        self.out = out
        self.places = Places(job, out)

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
        self.places.lanes = lanes
        printer = LaneSweeps(self.places) if lanes else RowSweeps(self.places)
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

    def finish_parts(self, stat: Stat, grid: list[Axis]) -> None:
        """Add up the parts of a carried sum, always in the same order."""
        rule = REDUCTIONS[stat.op].finish
        assert rule is not None
        total = "*".join(str(a.name) for a in grid)
        kept = self.places.ordered(stat.kept)
        self.out.add(f"/* {stat.name}: the parts together */", "{", *[loop(a) for a in kept])
        self.out.add(
            "wide t = 0;",
            f"for (i64 part = 0; part < parts; part++) t += {part(self.places, stat)};",
        )
        value = self.places.text(rule({"t": var("t")}, var(f"(wide)({total})")), WIDE, {}, "")
        self.out.add(f"{self.places.place(stat.var)} = {value};")
        self.out.close(len(kept) + 1)


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
