"""Scope: the lines of a Triton kernel, and what they can see: indices, masks, scalars, memory.

User's tensors come with a suffix: ``x_ptr`` the pointer, ``x_n`` a stride, ``x_`` the tile that was
loaded. No name of normc's own ends like these, so none can collide, whatever a parameter is called.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from textwrap import wrap

from normc.backends.tiling import Dim, Form
from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.expr import Var
from normc.language.reductions import EPS

START = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
"""What changes no fold: the value of masked lanes, and of totals before the first tile."""

ARRIVED, WAIT = "arrived", "WAIT"
"""How often programs of a cluster have come to a meeting; whether they wait there."""

FOLD = {
    "sum": "tl.sum({}, {}{})",
    "max": "tl.reduce({}, {}, larger{})",
    "min": "tl.reduce({}, {}, smaller{})",
}


class Scope:
    """Collects the text of one kernel."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.real = f"tl.{form.job.wide}"
        self._lines: list[str] = []
        self._depth = 1
        self._known: list[Dim] = []  # the dimensions whose indices are bound here
        self._scalars: dict[str, str] = {}  # eps and counts, computed at the top
        self._top = 0

    # --- lines -----------------------------------------------------------------------------------
    def add(self, *lines: str) -> None:
        """Add lines at the present depth."""
        self._lines += [("    " * self._depth + line).rstrip() for line in lines]

    def named(self, name: str, text: str) -> str:
        """A name for a value: the one it has, or ``name``."""
        if text.isidentifier():
            return text
        self.add(f"{name} = {text}")
        return name

    @contextmanager
    def loop(self, head: str) -> Generator[None, None, None]:
        """The body of a loop; the indices bound in it are forgotten after it."""
        known = list(self._known)
        self.add(f"for {head}:")
        self._depth += 1
        yield
        self._depth -= 1
        self._known = known

    @contextmanager
    def branch(self, head: str) -> Generator[None, None, None]:
        """The body of a branch that is chosen when the kernel is compiled."""
        self.add(f"{head}:")
        self._depth += 1
        yield
        self._depth -= 1

    def signature(self, summary: str) -> None:
        """The definition's first lines."""
        form = self.form
        rows = [
            [pointer(v) for v in form.pointers],
            [f"{stat.name}_parts" for stat in form.kernel.carries],
            [*form.handed, *([ARRIVED] if form.meets else [])],
            [f"{name}_{letter}" for name, letter in form.strides],
            [d.size for d in form.sizes],
            [f"{name}: tl.constexpr" for name in ("EPS", "INDEX", *([WAIT] if form.meets else []))],
            [f"{d.block(i)}: tl.constexpr" for d, i in form.blocks],
            [f"{name}: tl.constexpr" for name in form.shares],
        ]
        self._lines += ["@triton.jit", f"def {form.name}("]
        for row in rows:
            self.add(*wrap(f"{', '.join(row)},", 96) if row else [])
        self._lines.append("):")
        self.add(f'"""{summary}"""')
        self._top = len(self._lines)

    def text(self) -> str:
        """The whole function, with the scalars that it turned out to need."""
        scalars = [f"    {name} = {text}" for name, text in self._scalars.items()]
        return "\n".join([*self._lines[: self._top], *scalars, *self._lines[self._top :]])

    # --- indices ---------------------------------------------------------------------------------
    def parts(self) -> None:
        """Which of the programs that share an instance this one is, innermost dimension first."""
        self.add("program = tl.program_id(0)")
        for d in reversed(self.form.free):
            self.add(f"{d.letter}_part = program % {d.parts}", f"program = program // {d.parts}")

    def instances(self, program: str) -> None:
        """The indices of a program over the grid, innermost first."""
        grid = self.form.grid
        for d in reversed(grid):
            blocks = self.blocks(d)
            here = "program" if d is grid[0] else f"program % {blocks}"
            if d is grid[-1] and program != "program":
                self.add(f"program = {program}")
            self.index(d, here if self.one(d) else f"{here}*{d.block()}", d.block())
            if d is not grid[0]:
                self.add(f"program = program // {blocks}")

    def one(self, d: Dim) -> bool:
        """Whether a tile has only one index along a dimension."""
        return d.letter in self.form.single

    def blocks(self, d: Dim) -> str:
        """The number of tiles along a dimension."""
        return d.size if self.one(d) else f"tl.cdiv({d.size}, {d.block()})"

    def index(self, d: Dim, first: str, extent: str) -> None:
        """Bind the index of a dimension, and c where groups and channels in them make it up."""
        if self.one(d):
            self.add(f"{d.letter} = tl.cast({first}, INDEX)")
        else:
            view = expanded([d], self.form.tile)
            self.add(f"{d.letter}_i = {span(first, extent)}")
            self.add(f"{d.letter} = {d.letter}_i{view}")
            if d.letter not in self.form.exact:
                self.add(f"{d.letter}_in = {d.letter} < {d.size}")
        self._known.append(d)
        if d.letter in "gk" and {"g", "k"} <= {other.letter for other in self._known}:
            self.add("c = g*K + k")

    def mask(self, axes: Axis) -> str:
        """The condition under which an element over ``axes`` exists."""
        return " & ".join(f"{d.letter}_in" for d in self.form.along(axes) if self.ragged(d))

    def ragged(self, d: Dim) -> bool:
        """Whether tiles may reach beyond the end of a dimension."""
        return not self.one(d) and d.letter not in self.form.exact

    def masked(self, axes: Axis, value: str, other: str) -> str:
        """A value where an element over ``axes`` exists, else another."""
        inside = self.mask(axes)
        return f"tl.where({inside}, {value}, {other})" if inside else value

    def owned(self, axes: Axis) -> str:
        """The condition under which this program is the one that stores an element."""
        others = [d for d in self.form.free if not d.axes & axes] if self.form.shared else []
        first = [f"({d.letter}_part == 0)" for d in others]
        return " & ".join([*filter(None, [self.mask(axes)]), *first])

    def here(self, axes: Axis, share: Callable[[Dim], str]) -> str:
        """How many elements over ``axes`` this program has, who walks ``share(d)`` indices of d."""
        terms = [
            f"tl.minimum({share(d)}, {d.size} - {d.letter}_part*{share(d)})"
            for d in self.form.along(axes)
            if not (self.one(d) and self.form.resident)
        ]
        return f"tl.cast({'*'.join(terms) or '1'}, {self.real})"

    def extents(self, i: int, axes: Axis) -> list[str]:
        """The shape of a tile over ``axes`` in a sweep."""
        grid, resident = self.form.kernel.grid, self.form.resident
        own = {d: d.block(None if resident or d.axes & grid else i) for d in self.form.tile}
        return [own[d] if d.axes & axes else "1" for d in self.form.tile]

    def full(self, i: int, axes: Axis, op: str) -> str:
        """A tile of a fold's start."""
        shape = self.extents(i, axes) if any(d.axes & axes for d in self.form.tile) else []
        return f"tl.full([{', '.join(shape)}], {START[op]}, {self.real})"

    def fold(self, i: int, axes: Axis, along: Axis, op: str, text: str) -> str:
        """The fold of a tile over ``axes``; neighbouring dimensions are folded as one.

        What keeps no dimension of the tile is a scalar, which every thread has.
        """
        shape, own = self.extents(i, axes), [d for d in self.form.tile if d.axes & axes]
        if not own:
            return text
        if not any(d.axes & ~along for d in own):
            flat = "*".join(size for size in shape if size != "1")
            text = f"tl.reshape({text}, [{flat}])" if len(shape) > 1 else text
            return FOLD[op].format(text, 0, "")
        for first, after in reversed(_runs([bool(d.axes & along) for d in self.form.tile])):
            if after - first > 1:
                shape[first:after] = ["*".join(shape[first:after]), *["1"] * (after - first - 1)]
                text = f"tl.reshape({text}, [{', '.join(shape)}])"
            text = FOLD[op].format(text, first, ", keep_dims=True")
            shape[first] = "1"
        return text

    # --- scalars and memory ----------------------------------------------------------------------
    def eps(self) -> str:
        """The name of epsilon."""
        self._scalars[EPS.name] = f"tl.full([], EPS, {self.real})"
        return EPS.name

    def count(self, axes: Axis) -> str:
        """The name of the number of elements over ``axes``."""
        sizes = [d.size for d in self.form.sizes if d.axes & axes]
        name = f"count_{''.join(sizes)}"
        self._scalars[name] = "*".join(f"tl.cast({size}, {self.real})" for size in sizes)
        return name

    def place(self, v: Var) -> str:
        """Pointers to a tensor's elements: strides where it is full-size, else it is dense."""
        if v.axes == FULL:
            passed = self.form.strides
            steps = [f"{a}*{v.name}_{a}" if (v.name, a) in passed else a for a in "ncs"]
            return " + ".join([pointer(v), *steps])
        return " + ".join([pointer(v), *self.offset(v.axes)])

    def offset(self, axes: Axis) -> list[str]:
        """The terms of an index into a dense tensor over ``axes``."""
        if axes == CHANNEL:
            return ["c"]
        text = ""
        for d in sorted(self.form.along(axes), key=lambda d: d.axes.value):
            outer = f"({text})" if " " in text else text
            text = f"{outer}*{d.size} + {d.letter}" if outer else d.letter
        return [text or "0"]

    def load(self, v: Var) -> str:
        """The text that reads a tile of a tensor, or a parameter that is one number.

        What lacks an axis is read as a tile of fewer dimensions: a thread that holds neighbours
        along the missing one would read it again for each.
        """
        if not v.axes:
            return f"tl.load({pointer(v)}).to({self.real})"
        if v.axes == FULL:
            return f"tl.load({self.place(v)}{_guard(self.mask(v.axes))}).to({self.real})"
        inner = self.small(v.axes)
        guard = _guard(self.exists(inner))
        text = f"tl.load({pointer(v)} + {self.dense(inner)}{guard}).to({self.real})"
        return text + expanded(list(inner), self.form.tile)

    def exists(self, indices: Mapping[Dim, str]) -> str:
        """The condition under which an element at these indices exists."""
        return " & ".join(f"({indices[d]} < {d.size})" for d in indices if self.ragged(d))

    def small(self, axes: Axis, *after: str) -> dict[Dim, str]:
        """The indices of a tile that has only the dimensions of ``axes``, and others after them."""
        dims = self.form.along(axes)
        wide = [d for d in dims if not self.one(d)]
        rank = len(wide) + len(after)
        views = [", ".join(":" if i == j else "None" for i in range(rank)) for j in range(rank)]
        found = {
            d: f"{d.letter}_i[{view}]" if rank > 1 else f"{d.letter}_i"
            for d, view in zip(wide, views, strict=False)
        }
        return {d: found.get(d, d.letter) for d in dims}

    def dense(self, indices: Mapping[Dim, str]) -> str:
        """The place of an element in a dense tensor over the dimensions of these indices."""
        text = ""
        for d in sorted(indices, key=lambda d: d.axes.value):
            outer = f"({text})" if " " in text else text
            text = f"{outer}*{d.size} + {indices[d]}" if outer else indices[d]
        return text

    def store(self, v: Var, value: str) -> None:
        """Write a value over at most the axes of ``v``."""
        self.store_at(self.place(v), v.axes, value)

    def store_at(self, place: str, axes: Axis, value: str) -> None:
        """Write a value over ``axes``."""
        owned = self.owned(axes)
        inside = f", {owned}" if owned else ""
        self.add(f"tl.store({place}, {value}{inside})")


def span(first: str, extent: str) -> str:
    """The indices ``first``, ``first + 1``, ..., as many as ``extent`` says."""
    here = f"tl.arange(0, {extent})"
    return f"{here}.to(INDEX)" if first == "0" else f"({first} + {here}).to(INDEX)"


def expanded(own: Sequence[Dim], dims: Sequence[Dim]) -> str:
    """The subscript that gives a tile of some dimensions the others, of extent 1."""
    view = ", ".join(":" if d in own else "None" for d in dims)
    return f"[{view}]" if "None" in view and ":" in view else ""


def _guard(inside: str) -> str:
    """The arguments of a load that say where there is nothing to read."""
    return f", {inside}, 0.0" if inside else ""


def pointer(v: Var) -> str:
    """What the pointer to a tensor is called."""
    return f"{v.name}_ptr"


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Where True stands, as half-open ranges of neighbours."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *marks, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
