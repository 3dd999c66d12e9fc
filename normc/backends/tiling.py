"""Tiling: the forms a kernel of a plan can take, what it is launched with, and its tiles' sizes.

Every axis is one dimension of a tile, and a dimension's extent is a power of two: so no index is
ever taken apart by division, and layouts are strides. Groups and channels are one dimension, ``c``,
where a kernel never tells them apart. A program takes a block of indices along each axis of the
grid and walks the others. In the *resident* form these lie in one tile, whole; in the *streaming*
form every sweep loops over them in blocks of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from normc.backends.contract import Job
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.expr import Var, variables
from normc.language.geometry import Geometry
from normc.language.reductions import counted
from normc.program.program import Stat
from normc.schedule.plan import Kernel, Sweep


@dataclass(frozen=True)
class Dim:
    """One dimension of a kernel's tiles."""

    letter: str  # its index
    axes: Axis

    @property
    def size(self) -> str:
        """What its size is called."""
        return self.letter.upper()

    def block(self, sweep: int | None = None) -> str:
        """What the extent along it is called, in one sweep or in the whole kernel."""
        return f"BLOCK_{self.size}{'' if sweep is None else sweep}"


@dataclass(frozen=True)
class Form:
    """One kernel of a job in one form: what its text and its launch have to agree on."""

    job: Job
    kernel: Kernel
    resident: bool

    @property
    def name(self) -> str:
        """The name of the function in the source."""
        return f"{self.job.entry}_{self.kernel.name}_{'resident' if self.resident else 'streaming'}"

    @cached_property
    def dims(self) -> tuple[Dim, ...]:
        """The dimensions of its tiles, outermost in memory first."""
        return self._dims(self._walked)

    @property
    def grid(self) -> tuple[Dim, ...]:
        """The dimensions that are split over programs."""
        return self.along(self.kernel.grid)

    @property
    def free(self) -> tuple[Dim, ...]:
        """The dimensions that a program walks."""
        return self.along(FULL & ~self.kernel.grid)

    def along(self, axes: Axis) -> tuple[Dim, ...]:
        """The dimensions that a value over ``axes`` has."""
        return tuple(d for d in self.dims if d.axes & axes)

    @cached_property
    def sizes(self) -> tuple[Dim, ...]:
        """The dimensions whose sizes are passed: the tiles', and those that are only counted."""
        return self._dims(self._walked | union(counted(v) for v in self._counts))

    @cached_property
    def pointers(self) -> tuple[Var, ...]:
        """The tensors passed: read, written, and statistics that are stored."""
        sweeps = self.kernel.sweeps
        stats = [s.var for w in sweeps for f in w.folds for s in f.stats if self.stores(s)]
        return (*self.kernel.reads, *(o.var for w in sweeps for o in w.writes), *stats)

    @property
    def strides(self) -> tuple[tuple[str, str], ...]:
        """The strides passed: of full-size tensors, without the one that is known to be 1."""
        inner = "c" if self.job.plan.order[-1] & CHANNEL else "s"
        letters = [a for a in "ncs" if not (self.job.unit and a == inner)]
        return tuple((v.name, a) for v in self.pointers if v.axes == FULL for a in letters)

    @property
    def blocks(self) -> tuple[tuple[Dim, int | None], ...]:
        """The extents passed: a dimension, and the sweep if it is the extent in its loops."""
        if self.resident:
            return tuple((d, None) for d in self.dims)
        looped = [(d, i) for i, w in enumerate(self.kernel.sweeps) for d in self.looped(w)]
        return (*((d, None) for d in self.grid), *looped)

    def looped(self, sweep: Sweep) -> tuple[Dim, ...]:
        """The dimensions over which the streaming form loops in a sweep, outermost first."""
        return (*self.along(sweep.rows), *self.along(sweep.cols))

    def stores(self, stat: Stat) -> bool:
        """Whether a statistic goes through memory: to other kernels, or from row to row."""
        plan = self.job.plan
        others = (v for k in plan.kernels if k.name != self.kernel.name for v in k.reads)
        outlives = stat.name in plan.saved or any(v.name == stat.name for v in others)
        return outlives or not (self.resident or self.registered(stat))

    def registered(self, stat: Stat) -> bool:
        """Whether a statistic is still in registers when its sweep is over."""
        return self.resident or not stat.kept & ~self.kernel.grid

    @cached_property
    def _counts(self) -> list[Var]:
        exprs = [e for w in self.kernel.sweeps for e in w.exprs]
        return [v for v in variables(exprs) if v.name.startswith("|")]

    @cached_property
    def _walked(self) -> Axis:
        return union([self.kernel.grid, *(w.rows | w.cols for w in self.kernel.sweeps)])

    def _dims(self, axes: Axis) -> tuple[Dim, ...]:
        single = [Dim(str(a.name).lower(), a) for a in self.job.plan.order if a & axes]
        if self._splits_channels:
            return tuple(single)
        whole = [Dim("c", CHANNEL) if d.axes == Axis.G else d for d in single]
        return tuple(d for d in whole if d.axes != Axis.K)

    @cached_property
    def _splits_channels(self) -> bool:
        """Whether the kernel tells groups from channels."""
        sweeps = self.kernel.sweeps
        walks = [axes for w in sweeps for axes in (w.rows, w.cols)]
        values = [v.axes for w in sweeps for v in (*w.reads, *w.stores)]
        every = [self.kernel.grid, *walks, *values, *(counted(v) for v in self._counts)]
        return any(axes & CHANNEL not in (CHANNEL, NONE) for axes in every)


def sum_name(job: Job, stat: Stat) -> str:
    """The name of the kernel that adds up the parts of a carried sum."""
    return f"{job.entry}_{stat.name}_parts"


def union(sets: Iterable[Axis]) -> Axis:
    """All axes of several sets."""
    axes = NONE
    for more in sets:
        axes |= more
    return axes


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: its form, the extents of its tiles by name, its warps."""

    form: Form
    blocks: tuple[tuple[str, int], ...]
    warps: int

    def programs(self, geometry: Geometry) -> int:
        """How many programs there are, or blocks for programs to take in turn."""
        blocks = dict(self.blocks)
        return prod(-(-geometry.count(d.axes) // blocks[d.block()]) for d in self.form.grid)


ON_CHIP = 16384  # float32 numbers of all tensors together that a program keeps in registers
STREAMED = 2048  # of all tensors together that a loop reads at once
NEIGHBOURS = (32, 16, 8, 4)  # instances next to each other in memory that a program takes
SECTOR = 32  # bytes of memory that are read together at the least
SMALL = 1024  # elements below which a program takes several instances
PROGRAMS = 1024  # that keep a large GPU busy
PARTS = 256  # programs, at most, that carry a sum over the grid


def choose(job: Job, kernel: Kernel, geometry: Geometry) -> Config:
    """The configuration without a device to try it on: resident if everything fits on chip."""
    form = Form(job, kernel, True)
    sizes = {d.letter: geometry.count(d.axes) for d in form.sizes}
    weight = max(1, sum(v.axes == FULL for v in kernel.reads)) * _bytes(job.wide) // 4
    whole = {d.letter: ceiling(sizes[d.letter]) for d in form.free}
    widths = [n for n in NEIGHBOURS if n * _bytes(job.dtype) >= SECTOR]
    choices = [_lanes(form, sizes, width) for width in widths]
    fitting = [c for c in choices if prod((whole | c).values()) * weight <= ON_CHIP]
    busy = [c for c in fitting or choices if _programs(form, sizes, c) >= PROGRAMS]
    lanes = (busy or (fitting or choices)[-1:])[0]
    if fitting:
        return _resident(form, sizes, whole | lanes)
    return _streaming(Form(job, kernel, False), sizes, lanes, max(1, STREAMED // weight))


def ceiling(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, size - 1).bit_length()


def _bytes(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


Extents = Mapping[str, int]  # of dimensions, by their letters


def _lanes(form: Form, sizes: Extents, width: int) -> dict[str, int]:
    """Instances per program: several where neighbours in memory are other instances."""
    lanes = {d.letter: 1 for d in form.grid}
    if form.grid and form.dims[-1] in form.grid:
        inner = form.dims[-1].letter
        lanes[inner] = min(ceiling(sizes[inner]), width)
    return lanes


def _programs(form: Form, sizes: Extents, extents: Extents) -> int:
    return prod(-(-sizes[d.letter] // extents[d.letter]) for d in form.grid)


def _resident(form: Form, sizes: Extents, extents: dict[str, int]) -> Config:
    """Everything in one tile; of small instances several, while enough programs are left."""
    for d in reversed(form.grid):
        while extents[d.letter] < sizes[d.letter] and prod(extents.values()) < SMALL:
            if _programs(form, sizes, extents) < 2 * PROGRAMS:
                break
            extents[d.letter] *= 2
    blocks = tuple((d.block(), extents[d.letter]) for d in form.dims)
    return Config(form, blocks, _warps(prod(extents.values())))


def _streaming(form: Form, sizes: Extents, lanes: Extents, most: int) -> Config:
    """Each sweep has tiles of its own, long along what lies together in memory."""
    blocks = {d.block(): lanes[d.letter] for d in form.grid}
    largest = 1
    for i, sweep in enumerate(form.kernel.sweeps):
        tile = prod(lanes.values())
        for d in sorted(form.looped(sweep), key=form.dims.index, reverse=True):
            extent = _tight(sizes[d.letter], max(1, most // tile))
            blocks[d.block(i)] = extent
            tile *= extent
        largest = max(largest, tile)
    return Config(form, tuple(blocks.items()), _warps(largest * _crowd(form)))


def _tight(size: int, most: int) -> int:
    """The largest power of two up to ``most`` whose last block is not mostly empty."""
    block = min(ceiling(size), ceiling(most + 1) // 2)
    while block > 64 and -(-size // block) * block > 1.125 * size:
        block //= 2
    return block


def _crowd(form: Form) -> int:
    """2 where many values per element have to be in registers at once, else 1."""
    tensors = sum(v.axes == FULL for v in form.kernel.reads)
    return 2 if tensors + max(len(w.folds) for w in form.kernel.sweeps) > 4 else 1


def _warps(elements: int) -> int:
    """Eight elements of a tensor per thread, more where a tile is large."""
    return max(1, min(16, elements // 256))
