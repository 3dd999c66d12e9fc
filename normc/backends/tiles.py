"""Tiles: the skeleton that turns a Job into the text of Triton kernels; it knows no sizes.

    source ::= header, {function of `tile_functions`}, {kernel, in both its forms}
    kernel ::= signature, indices of the program, {sweep}

The dimensions of tiles and the two forms are those of `normc.backends.tiling`. A statistic is
folded over a tile, two-pass where its state asks for it, and in the streaming form merged with what
earlier tiles gave, always in the same order. A statistic per row that a later sweep reads goes
through memory, behind a barrier; every other value stays in registers.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from textwrap import wrap

import torch

from normc.backends.contract import Job
from normc.backends.emit import Block, Spelling
from normc.backends.tile_functions import functions
from normc.backends.tiling import Dim, Form, counted
from normc.language.axes import CHANNEL, FULL, NONE, Axis, show
from normc.language.expr import Call, Const, Expr, Var, const, rewrite, var, variables
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import COUNT, EPS, REDUCTIONS, E, count
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
_START = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}


def source(job: Job) -> str:
    """The text of a job: a Python file that imports nothing but triton."""
    kernels = [
        Printer(Form(job, kernel, resident)).kernel()
        for kernel in job.plan.kernels
        for resident in (False, True)
    ]
    body = "\n\n\n".join(kernels)
    used = [text.strip() for name, text in functions(job.wide).items()
            if re.search(rf"\b{name}\b", body)]  # fmt: skip
    return "\n\n\n".join([_header(job), *used, body]) + "\n"


def _header(job: Job) -> str:
    plan = [f"#     {line}" for line in job.plan.show().splitlines()]
    return "\n".join(
        [
            f"# {job.entry}: {' '.join(job.formula.split())}",
            "#",
            *plan,
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
        self.real = f"tl.{form.job.wide}"
        self.spelling = spelling(form.job.wide)
        self.lines: list[str] = []
        self.depth = 1
        self.known: list[Dim] = []  # the dimensions whose indices are bound here
        self.scalars: dict[str, str] = {}  # eps and counts, computed at the top
        self.waiting: set[str] = set()  # statistics stored since the last barrier
        self.temporaries = 0
        walked = FULL if form.resident else form.kernel.grid
        self.block = Block([walked], self.spelling, self.load, "{} = {}")

    def kernel(self) -> str:
        """The whole function."""
        self.signature()
        self.program()
        top = len(self.lines)
        if self.form.resident:
            for d in self.form.free:
                self.index(d, "0", d.block())
            top = len(self.lines)
            self.prepare(self.form.kernel.reads)
            self.add(*self.block.lines[0])
            self.block.leave()
        for i, sweep in enumerate(self.form.kernel.sweeps):
            self.sweep(i, sweep)
            self.block.leave()
        self.lines[top:top] = [f"    {name} = {text}" for name, text in self.scalars.items()]
        return "\n".join(self.lines)

    def add(self, *lines: str) -> None:
        """Add lines at the present depth."""
        self.lines += [("    " * self.depth + line).rstrip() for line in lines]

    def signature(self) -> None:
        """The definition's first lines."""
        form = self.form
        rows = [
            [f"{v.name}_ptr" for v in form.pointers],
            [f"{name}_{letter}" for name, letter in form.strides],
            [d.size for d in form.sizes],
            ["EPS: tl.constexpr", "INDEX: tl.constexpr"],
            [f"{d.block(i)}: tl.constexpr" for d, i in form.blocks],
        ]
        self.lines += ["@triton.jit", f"def {form.name}("]
        for row in rows:
            self.add(*wrap(f"{', '.join(row)},", 96) if row else [])
        self.lines.append("):")
        self.add(f'"""{_summary(form)}"""')

    # --- indices ---------------------------------------------------------------------------------
    def program(self) -> None:
        """The program's indices over the grid, innermost first."""
        grid = self.form.grid
        for d in reversed(grid):
            blocks = f"tl.cdiv({d.size}, {d.block()})"
            here = "program" if d is grid[0] else f"program % {blocks}"
            if d is grid[-1]:
                self.add("program = tl.program_id(0)")
            self.index(d, f"{here}*{d.block()}", d.block())
            if d is not grid[0]:
                self.add(f"program = program // {blocks}")

    def index(self, d: Dim, first: str, extent: str) -> None:
        """Bind the index of a dimension, and c where groups and channels in them make it up."""
        view = ", ".join(":" if other == d else "None" for other in self.form.dims)
        self.add(f"{d.letter} = span({first}, {extent}, INDEX)[{view}]")
        self.add(f"in_{d.letter} = {d.letter} < {d.size}")
        self.known.append(d)
        if d.letter in "gk" and {"g", "k"} <= {other.letter for other in self.known}:
            self.add("c = g*K + k")

    @contextmanager
    def loops(self, i: int, dims: Sequence[Dim], level: int) -> Generator[None, None, None]:
        """Loops over dimensions, each followed by the temporaries of its level."""
        for d in dims:
            self.add(f"for {d.letter}_from in range(0, {d.size}, {d.block(i)}):")
            self.depth += 1
            self.index(d, f"{d.letter}_from", d.block(i))
            self.add(*self.block.lines[level])
            level += 1
        yield
        self.depth -= len(dims)
        del self.known[len(self.known) - len(dims) :]

    def extents(self, i: int, axes: Axis) -> list[str]:
        """The shape of a tile over ``axes`` in a sweep."""
        grid, resident = self.form.kernel.grid, self.form.resident
        own = {d: d.block(None if resident or d.axes & grid else i) for d in self.form.dims}
        return [own[d] if d.axes & axes else "1" for d in self.form.dims]

    # --- memory ----------------------------------------------------------------------------------
    def place(self, v: Var) -> str:
        """Pointers to the elements of a tensor: strides where it is full-size, else it is dense."""
        if v.axes == FULL:
            passed = self.form.strides
            steps = [f"{a}*{v.name}_{a}" if (v.name, a) in passed else a for a in "ncs"]
            return " + ".join([f"{v.name}_ptr", *steps])
        if v.axes == CHANNEL:
            return f"{v.name}_ptr + c"
        offset = ""
        for d in sorted(self.form.along(v.axes), key=lambda d: d.axes.value):
            outer = f"({offset})" if " " in offset else offset
            offset = f"{outer}*{d.size} + {d.letter}" if outer else d.letter
        return f"{v.name}_ptr + {offset}" if offset else f"{v.name}_ptr"

    def mask(self, axes: Axis) -> str:
        """The condition under which an element over ``axes`` exists."""
        return " & ".join(f"in_{d.letter}" for d in self.form.along(axes))

    def load(self, v: Var) -> str:
        """The text that reads a tensor or names a scalar."""
        if v is EPS:
            self.scalars["eps"] = f"tl.full([], EPS, {self.real})"
            return "eps"
        if is_scalar(v.name):
            return self.count(counted(v))
        inside = f", {self.mask(v.axes)}, 0.0" if v.axes else ""
        return f"tl.load({self.place(v)}{inside}).to({self.real})"

    def store(self, v: Var, value: str) -> None:
        """Write a value over at most the axes of ``v``."""
        if v.axes:
            self.add(f"tl.store({self.place(v)}, {value}, {self.mask(v.axes)})")
        else:
            shape = ", ".join("1" for _ in self.form.dims)
            self.add(f"tl.store({self.place(v)} + tl.zeros([{shape}], tl.int32), {value})")

    def count(self, axes: Axis) -> str:
        """The name of the number of elements over ``axes``."""
        sizes = [d.size for d in self.form.sizes if d.axes & axes]
        name = f"count_{''.join(sizes)}"
        self.scalars[name] = "*".join(f"tl.cast({size}, {self.real})" for size in sizes)
        return name

    # --- values ----------------------------------------------------------------------------------
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
        self.add(*block.lines[0])
        return texts

    def named(self, name: str, text: str) -> str:
        """A name for a value: its own where it has one."""
        if text.isidentifier():
            return text
        self.add(f"{name} = {text}")
        return name

    # --- sweeps ----------------------------------------------------------------------------------
    def sweep(self, i: int, sweep: Sweep) -> None:
        """One pass: loops over rows and columns, or everything at once in the resident form."""
        self.add("", f"# {_describe(sweep)}")
        if self.waiting & {v.name for v in sweep.reads}:
            self.add("tl.debug_barrier()  # from here on, what other threads stored can be read")
            self.waiting.clear()
        walked = NONE if self.form.resident else FULL
        rows, cols = (self.form.along(axes & walked) for axes in (sweep.rows, sweep.cols))
        self.block.depths = [self.block.depths[0], *(d.axes for d in (*rows, *cols))]
        values = self.prepare(sweep.exprs)
        self.add(*self.block.lines[0])
        with self.loops(i, rows, 1):
            if cols:
                self.start(i, sweep)
            with self.loops(i, cols, 1 + len(rows)):
                self.tile(i, sweep, values)
            for fold in sweep.folds:
                self.finish(i, sweep, fold)

    def start(self, i: int, sweep: Sweep) -> None:
        """The states of a row before its first tile."""
        if any(_weighs(fold) for fold in sweep.folds):
            self.add(f"seen{i} = tl.zeros([], {self.real})")
        for fold in sweep.folds:
            across = sweep.rows if _weighs(fold) else sweep.rows | sweep.cols
            shape = ", ".join(self.extents(i, self.form.kernel.grid | across))
            for f in fold.state.folds:
                self.add(
                    f"{_label(fold)}_{f.name} = tl.full([{shape}], {_START[f.op]}, {self.real})"
                )

    def tile(self, i: int, sweep: Sweep, values: Sequence[str]) -> None:
        """What is done with one tile: it is folded, or written."""
        weighs = not self.form.resident and any(_weighs(fold) for fold in sweep.folds)
        if weighs:
            self.add(f"here = {self.elements(i, sweep)}")
        for fold, value in zip(sweep.folds, values, strict=False):
            if self.form.resident:
                self.fold(i, sweep, fold, value, "")
            elif _weighs(fold):
                self.fold(i, sweep, fold, value, "_tile")
                self.merge(i, fold)
            else:
                self.gather(sweep, fold, value)
        if weighs:
            self.add(f"seen{i} += here")
        for out, value in zip(sweep.writes, values[len(sweep.folds) :], strict=True):
            self.store(out.var, self.named(f"{out.name}_", value))

    def elements(self, i: int, sweep: Sweep) -> str:
        """The number of elements that a row has in this tile."""
        cols = self.form.along(sweep.cols)
        parts = [f"tl.minimum({d.block(i)}, {d.size} - {d.letter}_from)" for d in cols]
        return f"tl.cast({'*'.join(parts)}, {self.real})"

    def fold(self, i: int, sweep: Sweep, fold: Fold, value: str, suffix: str) -> None:
        """The state of each row of a tile."""
        label = _label(fold)
        names = {E: self.named(f"{label}_e", value)}
        if _weighs(fold):
            names[COUNT] = self.count(sweep.cols) if self.form.resident else "here"
        for f in fold.state.folds:
            (each,) = self.numbers([f.each], names)
            names[var(f.name)] = number = f"{label}_{f.name}{suffix}"
            inside = f"tl.where({self.mask(sweep.cols)}, {each}, {_START[f.op]})"
            self.add(f"{number} = {self.total(i, sweep, f.op, inside)}")

    def total(self, i: int, sweep: Sweep, op: str, text: str) -> str:
        """The fold of a tile along its columns; neighbouring dimensions are folded as one."""
        shape = self.extents(i, self.form.kernel.grid | sweep.rows | sweep.cols)
        for first, after in reversed(_runs([bool(d.axes & sweep.cols) for d in self.form.dims])):
            if after - first > 1:
                shape[first:after] = ["*".join(shape[first:after]), *["1"] * (after - first - 1)]
                text = f"tl.reshape({text}, [{', '.join(shape)}])"
            text = _FOLD[op].format(text, first)
            shape[first] = "1"
        return text

    def gather(self, sweep: Sweep, fold: Fold, value: str) -> None:
        """Add a tile to those before it, element by element; `finish` folds their sum, once."""
        (f,) = fold.state.folds
        (each,) = self.numbers([f.each], {E: self.named(f"{_label(fold)}_e", value)})
        totals = {f.name: var(f"{_label(fold)}_{f.name}")}
        inside = var(f"tl.where({self.mask(sweep.cols)}, {each}, {_START[f.op]})")
        merged = fold.state.merge(totals, {f.name: inside}, COUNT, COUNT)[f.name]
        (text,) = self.numbers([merged], {v: v.name for v in (*totals.values(), inside)})
        self.add(f"{totals[f.name].name} = {text}")

    def merge(self, i: int, fold: Fold) -> None:
        """Merge a tile's state with that of the tiles before it, of which there may be none."""
        label = _label(fold)
        totals = {f.name: var(f"{label}_{f.name}") for f in fold.state.folds}
        tiles = {f.name: var(f"{label}_{f.name}_tile") for f in fold.state.folds}
        seen, here = var(f"seen{i}"), var("here")
        merged = fold.state.merge(totals, tiles, seen, here)
        every = [*totals.values(), *tiles.values(), seen, here]
        texts = self.numbers([merged[name] for name in totals], {v: v.name for v in every})
        self.add(f"{', '.join(v.name for v in totals.values())} = (")
        for tile, text in zip(tiles.values(), texts, strict=True):
            self.add(f"    tl.where(seen{i} == 0.0, {tile.name}, {text}),")
        self.add(")")

    def finish(self, i: int, sweep: Sweep, fold: Fold) -> None:
        """Turn the state of a row into its statistics."""
        values = {f.name: var(f"{_label(fold)}_{f.name}") for f in fold.state.folds}
        if not self.form.resident and not _weighs(fold):
            for f in fold.state.folds:
                name = values[f.name].name
                self.add(f"{name} = {self.total(i, sweep, f.op, name)}")
        total = count(sweep.cols)
        for stat in fold.stats:
            rule = REDUCTIONS[stat.op].finish
            assert rule is not None, f"{stat.op} is not a core reduction"
            value = rule(values, total)
            names = {v: v.name for v in values.values()}
            if total in variables([value]):
                names[total] = self.count(sweep.cols)
            (text,) = self.numbers([value], names)
            self.keep(stat, self.named(stat.name, text))

    def keep(self, stat: Stat, name: str) -> None:
        """Keep a statistic in registers or store it, or both."""
        if self.form.registered(stat):
            self.block.bind(stat.var, name)
        else:
            self.waiting.add(stat.name)
        if self.form.stores(stat):
            self.store(stat.var, name)


_FOLD = {
    "sum": "tl.sum({}, {}, keep_dims=True)",
    "max": "tl.reduce({}, {}, larger, keep_dims=True)",
    "min": "tl.reduce({}, {}, smaller, keep_dims=True)",
}


def _label(fold: Fold) -> str:
    """What the numbers of a fold's state are called after."""
    return fold.stats[0].name


def _weighs(fold: Fold) -> bool:
    """Whether the numbers of elements matter to a state; if not, a fold's start changes nothing."""
    values = {f.name: var(f.name) for f in fold.state.folds}
    seen, here = var("seen"), var("here")
    merged = fold.state.merge(values, values, seen, here).values()
    return not {COUNT, seen, here}.isdisjoint(
        variables([*merged, *(f.each for f in fold.state.folds)])
    )


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Where True stands, as half-open ranges of neighbours."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *marks, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _summary(form: Form) -> str:
    grid = ", ".join(d.letter for d in form.grid)
    free = ", ".join(d.letter for d in form.free)
    owner = f"A program takes a block of ({grid})" if grid else "One program takes everything"
    how = f"holds all of ({free}) in one tile" if form.resident else f"loops over ({free})"
    return f"{owner} and {how}." if free else f"{owner}."


def _describe(sweep: Sweep) -> str:
    stats = [f"{s.name} = {s.op}[{show(s.over)}]" for f in sweep.folds for s in f.stats]
    written = [w.name for w in sweep.writes]
    return ", ".join(stats) or f"write {', '.join(written)}"
