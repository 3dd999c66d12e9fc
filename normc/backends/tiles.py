"""Tiles, long as one skeleton: a Job becomes the text of Triton kernels; it knows no sizes.

    source ::= header, {function of `tile_functions`}, {kernel, in both its forms}, {carried sum}
    kernel ::= signature, indices of its instances, {sweep}

The dimensions of tiles and the two forms are those of `normc.backends.tiling`; `tile_scope` has
what every line needs. A statistic is folded over a tile, two-pass where its state asks for it, and
in the streaming form merged with what earlier tiles gave, always in the same order. A statistic per
row that a later sweep reads goes through memory, behind a barrier; every other value stays in
registers. A sum that is carried is kept by each program for its own instances, and the programs'
parts are added up by a kernel of its own.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from normc.backends.contract import Job
from normc.backends.emit import Block, Spelling, write
from normc.backends.tile_functions import functions
from normc.backends.tile_scope import START, Scope
from normc.backends.tiling import Dim, Form, sum_name
from normc.language.axes import FULL, NONE, show
from normc.language.expr import Call, Const, Expr, Var, const, rewrite, var, variables
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import COUNT, EPS, REDUCTIONS, E, Values, count, counted
from normc.program.program import Stat, is_scalar
from normc.schedule.plan import Fold, Sweep

_FUNCTIONS = {fn: f"tl.{fn}({{}})" for fn in ("abs", "exp", "log", "sin", "cos", "erf")} | {
    "tanh": "tanh({})",
    "atan": "atan({})",
    "expm1": "expm1({})",
    "log1p": "log1p({})",
    "sign": "sign({})",
    "max": "larger({}, {})",
    "min": "smaller({}, {})",
    "where": "tl.where({}, {}, {})",
}


def source(job: Job) -> str:
    """The text of a job: a Python file that imports nothing but triton."""
    forms = [Form(job, k, resident) for k in job.plan.kernels for resident in (False, True)]
    kernels = [Printer(form).kernel() for form in forms if form.resident or form.free]
    kernels += [carried_sum(job, stat) for stat in job.plan.carries]
    body = "\n\n\n".join(kernels)
    used = [
        text.strip()
        for name, text in functions(job.wide).items()
        if re.search(rf"\b{name}\b", body)
    ]
    return "\n\n\n".join([_header(job), *used, body]) + "\n"


def _header(job: Job) -> str:
    return "\n".join(
        [
            *[f"# {line}".rstrip() for line in job.header],
            "#",
            "# n, g, k, s: sample, group, channel in its group, position; c = g*K + k.",
            f"# Computed in {job.wide}; loads cast up, stores cast down.",
            "",
            "import triton",
            "import triton.language as tl",
        ]
    )


def spelling(wide: str) -> Spelling:
    """How kernels that compute in ``wide`` write primitives and numbers."""
    root = "tl.sqrt_rn({})" if wide == "float32" else "tl.sqrt({})"
    own = {"sqrt": root, "pow": f"power({{}}, {{}}, tl.{wide})"}
    if wide == "float64":  # of two bare numbers Triton makes float32
        own["where"] = "tl.where({}, {}, {}).to(tl.float64)"
    return Spelling(_FUNCTIONS | own, lambda value: _number(value, wide))


def _number(value: float, wide: str) -> str:
    text = repr(value)
    if text.strip("-") in ("inf", "nan"):
        return f'float("{text}")'
    # Where nothing tells it better, Triton takes a bare number for float32.
    exact = wide == "float32" or torch.tensor(value, dtype=torch.float32).item() == value
    return text if exact else f"tl.full([], {text}, tl.{wide})"


def _settled(node: Expr) -> Expr:
    """A call on numbers alone is a number: Triton's functions take tensors."""
    if not isinstance(node, Call):
        return node
    if node.fn == "where" and isinstance(node.args[0], Const):
        return node.args[1 if node.args[0].value else 2]
    values = [torch.tensor(a.value, dtype=torch.float64) for a in node.args if isinstance(a, Const)]
    if len(values) < len(node.args):
        return node
    return const(PRIMITIVES[node.fn].reference(torch, *values).item())


class Printer:
    """The text of one kernel in one form."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.scope = Scope(form)
        self.spelling = spelling(form.job.wide)
        self.waiting: set[str] = set()  # statistics stored since the last barrier
        self.temporaries = 0
        # In the resident form, what varies over no axis of the grid is read before the rest.
        depths = [FULL & ~form.kernel.grid, FULL] if form.resident else [form.kernel.grid]
        self.block = Block(depths, self.spelling, self.load, "{} = {}")

    def kernel(self) -> str:
        """The whole function."""
        self.scope.signature(_summary(self.form))
        with self.instances():
            for i, sweep in enumerate(self.form.kernel.sweeps):
                self.sweep(i, sweep)
        if self.form.resident:
            for stat in self.form.kernel.carries:
                axes, grid = self.form.kernel.grid | stat.kept, self.form.kernel.grid
                total = self.scope.fold(0, axes, grid, "sum", f"{stat.name}_t")
                self.scope.store_at(self.part(stat), stat.kept, total)
        return self.scope.text()

    @contextmanager
    def instances(self) -> Generator[None, None, None]:
        """The instances of a program: one block of them, or block after block to carry sums."""
        scope, carries = self.scope, self.form.kernel.carries
        if not carries:
            scope.instances("tl.program_id(0)")
            self.read_all()
            self.flush(0, 1)
            yield
            return
        scope.add("part = tl.program_id(0)")
        self.read_all()
        self.flush(0)
        if self.form.resident:
            for stat in carries:
                start = scope.full(0, self.form.kernel.grid | stat.kept, "sum")
                scope.add(f"{stat.name}_t = {start}")
        blocks = "*".join(f"tl.cdiv({d.size}, {d.block()})" for d in self.form.grid)
        with scope.loop(f"turn in range(part, {blocks}, tl.num_programs(0))"):
            scope.instances("turn")
            if not self.form.resident:
                scope.add("tl.debug_barrier()  # the part stored in the turn before can be read")
            self.flush(1)
            yield

    def read_all(self) -> None:
        """In the resident form: the indices of everything on chip, and the loads of all tensors."""
        if self.form.resident:
            for d in self.form.free:
                self.scope.index(d, "0", d.block())
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
        return self.block.prepare(rewrite(exprs, _settled))

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
            self.finish(i, sweep)
            return
        rows, cols = self.form.along(sweep.rows), self.form.along(sweep.cols)
        self.block.depths = [self.block.depths[0], *(d.axes for d in (*rows, *cols))]
        values = self.prepare(sweep.exprs)
        self.flush(0)
        with self.loops(i, rows, 1):
            self.start(i, sweep)
            with self.loops(i, cols, 1 + len(rows)):
                self.tile(i, sweep, values)
            self.finish(i, sweep)
        self.block.leave()

    @contextmanager
    def loops(self, i: int, dims: Sequence[Dim], level: int) -> Generator[None, None, None]:
        """Loops over dimensions, each followed by the temporaries of its level."""
        with ExitStack() as stack:
            for d in dims:
                head = f"{d.letter}_from in range(0, {d.size}, {d.block(i)})"
                stack.enter_context(self.scope.loop(head))
                self.scope.index(d, f"{d.letter}_from", d.block(i))
                self.flush(level)
                level += 1
            yield

    def start(self, i: int, sweep: Sweep) -> None:
        """The states of a row before its first tile."""
        if any(_weighs(fold) for fold in sweep.folds):
            self.scope.add(f"seen{i} = tl.zeros([], {self.scope.real})")
        for fold in sweep.folds:
            axes = self.form.kernel.grid | sweep.rows | (NONE if _weighs(fold) else sweep.cols)
            for f in fold.state.folds:
                self.scope.add(f"{_label(fold)}_{f.name} = {self.scope.full(i, axes, f.op)}")

    def tile(self, i: int, sweep: Sweep, values: Sequence[str]) -> None:
        """What is done with one tile: it is folded, written, or carried on."""
        weighs = not self.form.resident and any(_weighs(fold) for fold in sweep.folds)
        if weighs:
            self.scope.add(f"here = {self.elements(i, sweep)}")
        written = len(sweep.folds) + len(sweep.writes)
        for fold, value in zip(sweep.folds, values, strict=False):
            self.fold(i, sweep, fold, value)
        if weighs:
            self.scope.add(f"seen{i} += here")
        for out, value in zip(sweep.writes, values[len(sweep.folds) : written], strict=True):
            self.scope.store(out.var, self.scope.named(f"{out.name}_", value))
        for stat, value in zip(sweep.carries, values[written:], strict=True):
            self.carry(i, stat, value)

    def elements(self, i: int, sweep: Sweep) -> str:
        """The number of elements that a row has in this tile."""
        cols = self.form.along(sweep.cols)
        parts = [f"tl.minimum({d.block(i)}, {d.size} - {d.letter}_from)" for d in cols]
        return f"tl.cast({'*'.join(parts)}, {self.scope.real})"

    # --- folds -----------------------------------------------------------------------------------
    def fold(self, i: int, sweep: Sweep, fold: Fold, value: str) -> None:
        """Fold a tile into the state: at once, merged with earlier tiles, or element by element."""
        element = self.scope.named(f"{_label(fold)}_e", value)
        if self.form.resident:
            self.state(i, sweep, fold, element, "")
        elif _weighs(fold):
            self.state(i, sweep, fold, element, "_tile")
            self.merge(i, fold)
        else:
            self.gather(sweep, fold, element)

    def state(self, i: int, sweep: Sweep, fold: Fold, element: str, suffix: str) -> None:
        """The state of each row of a tile."""
        names = {E: element}
        if _weighs(fold):
            names[COUNT] = self.scope.count(sweep.cols) if self.form.resident else "here"
        axes = self.form.kernel.grid | sweep.rows | sweep.cols
        for f in fold.state.folds:
            (each,) = self.numbers([f.each], names)
            names[var(f.name)] = number = f"{_label(fold)}_{f.name}{suffix}"
            inside = f"tl.where({self.scope.mask(sweep.cols)}, {each}, {START[f.op]})"
            self.scope.add(f"{number} = {self.scope.fold(i, axes, sweep.cols, f.op, inside)}")

    def merge(self, i: int, fold: Fold) -> None:
        """Merge a tile's state with that of the tiles before it, of which there may be none."""
        totals, tiles = _values(fold), _values(fold, "_tile")
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
        inside = var(f"tl.where({self.scope.mask(sweep.cols)}, {each}, {START[f.op]})")
        total = _values(fold)[f.name]
        merged = fold.state.merge({f.name: total}, {f.name: inside}, COUNT, COUNT)[f.name]
        (text,) = self.numbers([merged], {total: total.name, inside: inside.name})
        self.scope.add(f"{total.name} = {text}")

    def finish(self, i: int, sweep: Sweep) -> None:
        """Turn the states of a row into its statistics."""
        axes = self.form.kernel.grid | sweep.rows | sweep.cols
        for fold in sweep.folds:
            values = _values(fold)
            if not self.form.resident and not _weighs(fold):
                for f in fold.state.folds:
                    name = values[f.name].name
                    self.scope.add(f"{name} = {self.scope.fold(i, axes, sweep.cols, f.op, name)}")
            for stat in fold.stats:
                value = _finished(stat, values)
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
        inside = f"tl.where({scope.mask(grid)}, {element}, 0.0)"
        if self.form.resident:
            scope.add(f"{stat.name}_t = {stat.name}_t + {inside}")
            return
        mask = f", {scope.mask(stat.kept)}, 0.0" if stat.kept else ""
        scope.add(f"{stat.name}_t = {scope.fold(i, grid | stat.kept, grid, 'sum', inside)}")
        scope.add(f"{stat.name}_before = tl.load({self.part(stat)}{mask})")
        total = f"{stat.name}_t + tl.where(turn == part, 0.0, {stat.name}_before)"
        scope.store_at(self.part(stat), stat.kept, total)

    def part(self, stat: Stat) -> str:
        """Pointers to the program's part of a sum."""
        sizes = [d.size for d in self.form.along(stat.kept)]
        terms = ["*".join(["part", *sizes]), *self.scope.offset(stat.kept)]
        return " + ".join([f"{stat.name}_parts", *terms])


_SUM = '''\
@triton.jit
def {name}(
    {stat}_parts, {stat}_ptr, PARTS, SIZE, COUNT, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """{what}: what the programs' parts add up to, always in the same order."""
    i = tl.program_id(0)*BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK_PARTS, BLOCK], {real})
    for first in range(0, PARTS, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        inside = (part < PARTS) & (i < SIZE)
        total = total + tl.load({stat}_parts + part*SIZE + i, inside, 0.0)
    total = tl.sum(total, 0, keep_dims=True)
    tl.store({stat}_ptr + i, {value}, i < SIZE)'''


def carried_sum(job: Job, stat: Stat) -> str:
    """The kernel that adds up the parts of a carried sum."""
    real, over = f"tl.{job.wide}", count(stat.over)
    (f,) = stat.state.folds
    total = var("total")
    names = {id(total): "total", id(over): f"tl.cast(COUNT, {real})"}
    value = write(_finished(stat, {f.name: total}), spelling(job.wide), names)
    what = f"{stat.name} = {stat.op}[{show(stat.over)}]"
    return _SUM.format(name=sum_name(job, stat), stat=stat.name, what=what, real=real, value=value)


def _finished(stat: Stat, values: Values) -> Expr:
    """The value of a statistic, from the numbers of its state."""
    rule = REDUCTIONS[stat.op].finish
    assert rule is not None, f"{stat.op} is not a core reduction"
    return rule(values, count(stat.over))


def _label(fold: Fold) -> str:
    """What the numbers of a fold's state are called after."""
    return fold.stats[0].name


def _values(fold: Fold, suffix: str = "") -> dict[str, Var]:
    """The numbers of a fold's state, under the names they have in the text."""
    return {f.name: var(f"{_label(fold)}_{f.name}{suffix}") for f in fold.state.folds}


def _weighs(fold: Fold) -> bool:
    """Whether tiles are merged as states; a lone fold that ignores how many may gather elements."""
    if len(fold.state.folds) > 1:
        return True
    values, seen, here = _values(fold), var("seen"), var("here")
    merged = fold.state.merge(values, values, seen, here).values()
    read = variables([*merged, *(f.each for f in fold.state.folds)])
    return not {COUNT, seen, here}.isdisjoint(read)


def _summary(form: Form) -> str:
    grid = ", ".join(d.letter for d in form.grid)
    free = ", ".join(d.letter for d in form.free)
    several = "every so many blocks" if form.kernel.carries else "a block"
    owner = f"A program takes {several} of ({grid})" if grid else "One program takes everything"
    how = f"holds all of ({free}) in one tile" if form.resident else f"loops over ({free})"
    return f"{owner} and {how}." if free else f"{owner}."


def _describe(sweep: Sweep) -> str:
    stats = [f"{s.name} = {s.op}[{show(s.over)}]" for f in sweep.folds for s in f.stats]
    written = [f"write {w.name}" for w in sweep.writes]
    return ", ".join([*stats, *written, *(f"carry {s.name}" for s in sweep.carries)])
