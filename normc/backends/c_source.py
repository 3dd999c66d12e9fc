"""C source: the skeleton that turns a plan into loops over (N, G, K, S), sizes and strides at run
time.

It walks Kernel and Sweep and decides loops, loads and stores; `normc.backends.emit` prints
expressions. Statistics are accumulated block by block along the innermost loop (two-pass within a
block, merged between blocks in double), always in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from normc.backends.c_spelling import HALF, NARROW, WIDE, declarations
from normc.backends.c_text import Lines, count, describe, index, instances, loop, threads
from normc.backends.contract import Job, Source
from normc.backends.emit import Block, Spelling, expand, write
from normc.language.axes import CHANNEL, FULL, Axis, members
from normc.language.expr import Expr, Var, var, variables
from normc.language.reductions import COUNT, REDUCTIONS, E
from normc.language.reductions import Fold as StateFold
from normc.program.program import Output, Stat, is_scalar
from normc.schedule.plan import Fold, Kernel, Sweep

PARTS = 64
"""Into how many parts a grid is cut that sums are carried over, however many threads there are."""

_BLOCK = 1024  # elements folded before a merge: small enough for L1, long enough to amortise it


@dataclass
class _Printer:
    """The skeleton for one job."""

    job: Job
    out: Lines

    @property
    def spelling(self) -> Spelling:
        return WIDE if self.job.wide == "float64" else NARROW

    # --- memory: how a variable is read and written ----------------------------------------------
    def place(self, v: Var) -> str:
        """The element of a tensor at the loop indices in scope."""
        if v.name in self.kept:
            return f"{v.name}[{self.inside(v.axes)}]"
        return f"{v.name}_ptr[{self.offset(v)}]"

    def inside(self, axes: Axis) -> str:
        """The position in a slice that is dense over axes, in the order of the loops."""
        sizes = [str(a.name) for a in self.ordered(axes)]
        steps = [["(i64)" + index(a), *sizes[i + 1 :]] for i, a in enumerate(self.ordered(axes))]
        return " + ".join("*".join(step) for step in steps).replace("(i64)", "")

    def offset(self, v: Var) -> str:
        """Where that element lies; the axis that is known to be contiguous needs no stride."""
        unit = self.contiguous(v)
        steps = [f"{index(a)}*{v.name}_{index(a)}" for a in members(v.axes) if a != unit]
        return " + ".join([*steps, index(unit)] if unit else steps) or "0"

    def contiguous(self, v: Var) -> Axis | None:
        """The axis along which a tensor surely has stride 1, if there is one."""
        if v.axes == FULL:
            return self.job.plan.order[-1] if self.job.unit else None
        if v.axes & Axis.S and v.axes & CHANNEL and v.name not in self.stats:
            return None  # a user's tensor: which of the two is inside depends on channel_dim
        return members(v.axes)[-1] if v.axes else None

    @cached_property
    def kept(self) -> set[str]:
        """The values of a slice that one sweep computes and others read."""
        return {k.name for k in self.job.plan.keeps}

    @cached_property
    def stats(self) -> set[str]:
        """The tensors that are contiguous over (N, G, K, S)."""
        return {s.name for s in self.job.plan.program.stats} | set(self.job.dense)

    def load(self, v: Var) -> str:
        if v.name.startswith("|"):
            return f"(real)({'*'.join(v.name.strip('|'))})"
        if is_scalar(v.name):
            return "eps"
        return f"widen_({self.place(v)})" if self.half and v.axes == FULL else self.place(v)

    @property
    def half(self) -> bool:
        """Whether full-size tensors are stored in fewer bits than they are computed in."""
        return self.job.dtype in HALF

    def block(self, loops: Sequence[Axis]) -> Block:
        return Block([Axis(0), *loops], self.spelling, self.load, "const real {} = {};")

    # --- kernels ---------------------------------------------------------------------------------
    def kernel(self, kernel: Kernel) -> None:
        out, grid = self.out, self.ordered(kernel.grid)
        out.add("", f"/* {kernel.name}: {instances(kernel)} */")
        if kernel.carries:
            self.enter_parts(kernel, grid)
        elif grid:
            size = "*".join(str(a.name) for a in grid)
            out.add(f"#pragma omp parallel for collapse({len(grid)}) {threads(size)}")
            out.add(*[loop(a) for a in grid])
        else:
            out.add("{")
        for k in kernel.keeps:
            room = f"{k.name}_ptr + thread_()*{count(k.axes)}"
            out.add(f"real *restrict const {k.name} = {room};")
        for sweep in kernel.sweeps:
            out.add(*describe(sweep), "{")
            if sweep.folds:
                self.fold_sweep(grid, sweep)
            else:
                self.write_sweep(grid, sweep)
            out.close()
        out.close(2 if kernel.carries else max(1, len(grid)))
        for stat in kernel.carries:
            self.finish_parts(stat, grid)

    def enter_parts(self, kernel: Kernel, grid: list[Axis]) -> None:
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

    def part(self, stat: Stat) -> str:
        """The accumulator of a carried sum in the current part."""
        return f"{stat.name}_parts_ptr[part*{count(stat.kept)} + {self.offset(stat.var)}]"

    def finish_parts(self, stat: Stat, grid: list[Axis]) -> None:
        """Add up the parts of a carried sum, always in the same order."""
        rule = REDUCTIONS[stat.op].finish
        assert rule is not None
        total = "*".join(str(a.name) for a in grid)
        kept = self.ordered(stat.kept)
        self.out.add(f"/* {stat.name}: the parts together */", "{", *[loop(a) for a in kept])
        self.out.add(
            "wide t = 0;", f"for (i64 part = 0; part < parts; part++) t += {self.part(stat)};"
        )
        value = self.state_text(rule({"t": var("t")}, var(f"(wide)({total})")), WIDE, {}, "")
        self.out.add(f"{self.place(stat.var)} = {value};")
        self.out.close(len(kept) + 1)

    def ordered(self, axes: Axis) -> list[Axis]:
        return [a for a in self.job.plan.order if a & axes]

    def write_sweep(self, grid: list[Axis], sweep: Sweep) -> None:
        loops = [*self.ordered(sweep.rows), *self.ordered(sweep.cols)]
        block = self.block([*grid, *loops])
        values = block.prepare(sweep.exprs)
        staged = self.job.unit and loops[-1:] == [self.job.plan.order[-1]]
        self.enter(block, grid, loops[:-1] if staged else loops, simd=not staged)
        if staged:
            self.enter_stage(sweep, loops[-1], block.lines[-1])
        places = [self.staged(w, loops[-1]) if staged and w.axes == FULL else self.place(w.var)
                  for w in sweep.writes]  # fmt: skip
        places = [f"{place} =" for place in places] + [f"{self.part(s)} +=" for s in sweep.carries]
        narrow = [self.half and not staged and w.axes == FULL for w in sweep.writes]
        narrow += [False] * len(sweep.carries)
        for place, value, small in zip(places, values, narrow, strict=True):
            self.out.add(f"{place} narrow_({value});" if small else f"{place} {value};")
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
                first = re.sub(rf"\b{index(axis)}\]$", "from]", self.place(w.var))
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
        rows, cols = self.ordered(sweep.rows), self.ordered(sweep.cols)
        block = self.block([*grid, *rows, *cols])
        values = block.prepare([*(f.arg for f in sweep.folds), *(k.expr for k in sweep.keeps)])
        last, inner = cols[-1], block.lines[-1]
        names = [f"f{i}" for i in range(len(sweep.folds))]
        self.enter(block, grid, rows)
        self.out.add("i64 seen = 0;")
        for name, fold in zip(names, sweep.folds, strict=True):
            self.out.add(*[f"wide {name}_{f.name} = 0;" for f in fold.state.folds])
        for i, axis in enumerate(cols[:-1]):
            self.out.add(loop(axis), *block.lines[len(grid) + 1 + len(rows) + i])
        size, i = last.name, index(last)
        self.out.add(f"for (i64 from = 0; from < {size}; from += {_BLOCK}) {{",
                     f"const i64 to = least(from + {_BLOCK}, {size}), n_ = to - from;")  # fmt: skip
        kept = values[len(names) :]
        inner = inner + [
            f"{self.place(k.var)} = {e};" for k, e in zip(sweep.keeps, kept, strict=True)
        ]
        self.phases(sweep, names, values[: len(names)], inner, i)
        for name, fold in zip(names, sweep.folds, strict=True):
            self.merge(name, fold)
        self.out.add("seen += n_;")
        self.out.close(len(cols))
        self.out.add("if (seen == 0) seen = 1;  /* an empty batch: statistics of 0, not NaN */")
        for name, fold in zip(names, sweep.folds, strict=True):
            self.finish(name, fold)
        self.out.close(len(rows))

    def phases(
        self, sweep: Sweep, names: list[str], values: list[str], inner: list[str], i: str
    ) -> None:
        """Fold one block: the n-th folds of all states share the n-th loop over it."""
        depth = max(len(f.state.folds) for f in sweep.folds)
        staged = [n for n, f in zip(names, sweep.folds, strict=True) if len(f.state.folds) > 1]
        self.out.add(*[f"real {n}_stage[{_BLOCK}];" for n in staged])
        for phase in range(depth):
            active = [(n, f.state.folds[phase], v)
                      for n, f, v in zip(names, sweep.folds, values, strict=True)
                      if phase < len(f.state.folds)]  # fmt: skip
            for name, fold, _ in active:
                self.start(name, fold)
            sums = [f"{n}_b_{f.name}" for n, f, _ in active if f.op == "sum"]
            if len(sums) == len(active):
                self.out.add(f"#pragma omp simd reduction(+:{', '.join(sums)})")
            self.out.add(
                f"for (i64 {i} = from; {i} < to; {i}++) {{", *(inner if phase == 0 else [])
            )
            for name, fold, value in active:
                element = value if phase == 0 else f"{name}_stage[{i} - from]"
                self.accumulate(name, fold, element, phase == 0 and name in staged, i)
            self.out.close()

    def start(self, name: str, fold: StateFold) -> None:
        begin = {"sum": "0", "max": "-__builtin_inf()", "min": "__builtin_inf()"}[fold.op]
        self.out.add(f"real {name}_b_{fold.name} = {begin};")

    def accumulate(self, name: str, fold: StateFold, element: str, stage: bool, i: str) -> None:
        self.out.add(f"const real {name}_e = {element};")
        if stage:
            self.out.add(f"{name}_stage[{i} - from] = {name}_e;")
        each = self.state_text(fold.each, self.spelling, {E: f"{name}_e", COUNT: "(real)n_"},
                               f"{name}_b_")  # fmt: skip
        total = f"{name}_b_{fold.name}"
        step = (
            f"{total} += {each};" if fold.op == "sum" else f"{total} = {fold.op}_({each}, {total});"
        )
        self.out.add(step)

    def state_text(
        self, expr: Expr, spelling: Spelling, known: Mapping[Var, str], prefix: str
    ) -> str:
        """An expression over a state's numbers, each variable spelled with a prefix."""
        names = {id(v): text for v, text in known.items()}
        (body,) = expand([expr], spelling)
        for v in variables([body]):
            names.setdefault(id(v), prefix + v.name)
        return write(body, spelling, names)

    def merge(self, name: str, fold: Fold) -> None:
        """Merge a block's numbers into the running ones, in double."""
        parts = [f.name for f in fold.state.folds]
        a = {p: var(f"{name}_{p}") for p in parts}
        b = {p: var(f"{name}_b_{p}") for p in parts}
        merged = fold.state.merge(a, b, var("(wide)seen"), var("(wide)n_"))
        if all(merged[p] is a[p] + b[p] for p in parts):
            self.out.add(*[f"{name}_{p} += {name}_b_{p};" for p in parts])
            return
        self.out.add(
            "if (seen == 0) {", *[f"{name}_{p} = {name}_b_{p};" for p in parts], "} else {"
        )
        for p in parts:
            self.out.add(f"const wide {name}_m_{p} = {self.state_text(merged[p], WIDE, {}, '')};")
        self.out.add(*[f"{name}_{p} = {name}_m_{p};" for p in parts], "}")

    def finish(self, name: str, fold: Fold) -> None:
        """Turn the state into the statistics and store them."""
        values = {f.name: var(f"{name}_{f.name}") for f in fold.state.folds}
        for stat in fold.stats:
            rule = REDUCTIONS[stat.op].finish
            assert rule is not None
            text = self.state_text(rule(values, var("(wide)seen")), WIDE, {}, "")
            self.out.add(f"{self.place(stat.var)} = {text};")


@dataclass(frozen=True)
class Stored:
    """A tensor that a job stores for itself or for backward, contiguous over (N, G, K, S)."""

    var: Var
    times: str  # "saved": handed out; "once"; "parts": one for each; "threads": one for each


def stored(job: Job) -> list[Stored]:
    """Statistics, those that are handed out first; parts of what is carried; slices kept."""
    plan = job.plan
    stats = [Stored(s.var, "saved" if s.name in plan.saved else "once") for s in plan.program.stats]
    parts = [Stored(var(f"{s.name}_parts", s.kept), "parts") for s in plan.carries]
    kept = [Stored(k.var, "threads") for k in plan.keeps]
    return [*sorted(stats, key=lambda s: s.times != "saved"), *parts, *kept]


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
    for kernel in job.plan.kernels:
        printer.kernel(kernel)
    body.close()
    code = "\n".join(body.lines)
    first, *rest = job.header
    header = [f"/* {first}", *[f" * {line}".rstrip() for line in rest], " */"]
    text = [*header, declarations(code, job.dtype), "", code, ""]
    return Source("\n".join(text), job.entry, ".c", job.dtype)
