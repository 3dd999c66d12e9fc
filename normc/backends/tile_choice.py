"""Tile choice: under which schedule a kernel is launched, and with tiles of what size.

No device is asked. `candidates` orders what is possible by the bytes it moves and the programs it
keeps busy; whoever
compiles them takes the first that keeps everything in registers. Numbers: what a program can hold
without spilling was read from ptxas for normalization kernels; the rest are widths of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import product
from math import prod

from normc.backends.contract import Job
from normc.backends.gpus import MACHINES, Machine, estimate
from normc.backends.tiles import forms
from normc.backends.tiling import Config, Dim, Form, ceiling
from normc.language.axes import FULL
from normc.language.geometry import Geometry
from normc.schedule.plan import Kernel

HELD = 16384  # float32 numbers of all tensors together in the registers of a program of 16 warps
MOST_HELD = 32768  # the same, of 32 warps
STREAMED = 2048  # of all tensors together that a loop reads at once
NEIGHBOURS = (32, 16, 8, 4)  # instances next to each other in memory that a program takes
SECTOR = 32  # bytes of memory that are read together at the least
RUN = 64  # elements in a row below which reading a box wastes memory
VECTOR = 16  # bytes that a thread reads at once
SMALL = 1024  # elements below which a program takes several instances
BUSY = 8  # programs per processor beyond which more do not help
MERGED = 64  # programs whose states cost as much to merge as all lanes cost to load
MOST_PARTS = 512  # programs that share an instance

Schedule = tuple[Config, ...]
"""How one kernel of a plan is launched: one form, or those of a split one after the other."""

Sizes = Mapping[str, int]  # of dimensions, by their letters


def candidates(job: Job, kernel: Kernel, geometry: Geometry, machine: Machine) -> list[Schedule]:
    """What could be launched, the most promising first; never empty."""
    known = {name: _Chooser(fs, geometry, machine) for name, fs in forms(job, kernel).items()}
    if "cluster" not in known:
        return [known["resident"].loose()]
    whole, boxes = known["resident"].whole(), known["cluster"].boxes()
    every = [whole, *boxes, known["streaming"].loose(), known["split"].loose()]
    return sorted(filter(None, every), key=lambda s: estimate(s, geometry, machine))


def choose(job: Job, kernel: Kernel, geometry: Geometry) -> Schedule:
    """The first of the `candidates`, for a GPU like those of the data centre."""
    return candidates(job, kernel, geometry, MACHINES["sm_90"])[0]


def wider(schedule: Schedule) -> Schedule:
    """The same with twice the warps, so that each thread holds half as much."""
    return tuple(replace(c, warps=min(32, 2 * c.warps)) for c in schedule)


def width(dtype: str) -> int:
    """Bytes of one number."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


class _Chooser:
    """The extents of tiles of one kernel's forms under one schedule."""

    def __init__(self, forms: tuple[Form, ...], geometry: Geometry, machine: Machine) -> None:
        self.forms, self.form = forms, forms[0]
        self.geometry, self.machine = geometry, machine
        self.job = self.form.job
        reads = sum(v.axes == FULL for v in self.form.kernel.reads)
        wide = width(self.job.wide) // 4
        carried = len(self.form.kernel.carries) if self.form.resident else 0
        self.weight = max(1, reads + carried) * wide  # registers per element
        self.sizes = self.sizes_of(self.form)

    def sizes_of(self, form: Form) -> Sizes:
        return {d.letter: max(1, self.geometry.count(d.axes)) for d in form.sizes}

    # --- on chip ---------------------------------------------------------------------------------
    def whole(self) -> Schedule:
        """All of an instance in registers; nothing if it does not fit."""
        whole = {d.letter: ceiling(self.sizes[d.letter]) for d in self.form.free}
        for limit in (HELD, MOST_HELD):
            fitting = [
                lanes
                for lanes in self.lanes(self.form)
                if prod((whole | lanes).values()) * self.weight <= limit
            ]
            if fitting:
                extents = self.several(whole | self.busy(self.form, fitting))
                return (self.held(self.form, extents),)
        return ()

    def boxes(self) -> list[Schedule]:
        """A box of an instance in registers, if all of its boxes are on chip at the same time."""
        if self.form.meets and not self.machine.waits:
            return []
        made = [self.box(limit // self.weight) for limit in (HELD // 2, HELD, MOST_HELD)]
        most = self.machine.processors
        fitting = [s for s in made if s and (1 < s[0].parts <= most or not s[0].meets)]
        return list(dict.fromkeys(fitting))  # a small instance has the same box at every limit

    def box(self, most: int) -> Schedule:
        """Boxes of up to ``most`` elements: as few as possible, with runs as long as possible."""
        free = self.form.free
        for lanes in self.lanes(self.form):
            room = max(1, most // prod(lanes.values()))
            fitting = [extents for elements, extents in self.shapes if elements <= room]
            if fitting:
                best = min(fitting, key=self.cost)
                return (self.held(self.form, lanes | _by_letter(free, best)),)
        return ()

    @cached_property
    def shapes(self) -> list[tuple[int, tuple[int, ...]]]:
        """The extents that a box can have, each with the number of its elements."""
        every = product(*(self.halves(d) for d in self.form.free))
        sized = ((prod(extents), extents) for extents in every)
        most = MOST_HELD // self.weight
        return [one for one in sized if one[0] <= most and not self.short(self.form.free, one[1])]

    def cost(self, extents: tuple[int, ...]) -> tuple[float, ...]:
        """What boxes of these extents cost: lanes that hold nothing, and states to merge."""
        both = list(zip(self.form.free, extents, strict=True))
        counts = [-(-self.sizes[d.letter] // extent) for d, extent in both]
        padded = prod(n * extent for n, (_, extent) in zip(counts, both, strict=True))
        parts = prod(counts)
        return (padded * (1 + parts / MERGED), parts, *(-extent for extent in extents[::-1]))

    def halves(self, d: Dim) -> Iterator[int]:
        extent = ceiling(self.sizes[d.letter])
        while extent:
            if -(-self.sizes[d.letter] // extent) <= MOST_PARTS:
                yield extent
            extent //= 2

    def short(self, free: tuple[Dim, ...], extents: tuple[int, ...]) -> bool:
        """Whether a box has only short runs along what lies together in memory."""
        inner = self.form.dims[-1]
        if inner not in free:
            return False
        size, extent = self.sizes[inner.letter], _by_letter(free, extents)[inner.letter]
        return extent < min(RUN, size)

    def held(self, form: Form, extents: Sizes) -> Config:
        """A tile of these extents, with the warps that hold it."""
        blocks = {d.block(): extents[d.letter] for d in form.dims}
        if form.shared:
            parts = {d.parts: -(-self.sizes[d.letter] // extents[d.letter]) for d in form.free}
            blocks |= parts | self.merges(form, parts)
        elements = prod(extents[d.letter] for d in form.dims)
        warps = 32 if elements * self.weight > HELD else _warps(elements)
        return Config.of(form, blocks, warps, self.sizes_of(form))

    def merges(self, form: Form, parts: Mapping[str, int]) -> dict[str, int]:
        """In what extents the states of all programs are read."""
        sweeps = form.kernel.sweeps
        return {
            name: ceiling(prod(parts[d.parts] for d in form.along(sweeps[i].cols)))
            for i, name in form.merges.items()
        }

    # --- loops -----------------------------------------------------------------------------------
    def loose(self) -> Schedule:
        """The configuration of every form, in order; loops take any size."""
        return tuple(self.one(form) for form in self.forms)

    def one(self, form: Form) -> Config:
        if not form.resident:
            return self.looping(form)
        whole = self.whole()
        return whole[0] if whole else self.held(form, self.lanes(form)[-1])

    def looping(self, form: Form) -> Config:
        """Each sweep has tiles of its own, long along what lies together in memory."""
        sizes = self.sizes_of(form)
        lanes = self.busy(form, self.lanes(form))
        blocks = {d.block(): lanes[d.letter] for d in form.grid}
        shares = self.shares(form, lanes) if form.shared else {}
        most, largest = max(1, STREAMED // self.weight), 1
        for i, sweep in enumerate(form.kernel.sweeps):
            tile = prod(lanes.values())
            for d in sorted(form.looped(sweep), key=form.dims.index, reverse=True):
                size = min(sizes[d.letter], shares.get(d.letter, sizes[d.letter]))
                extent = _tight(size, max(1, most // tile))
                blocks[d.block(i)] = extent
                tile *= extent
            largest = max(largest, tile)
        if form.shared:
            blocks |= {d.parts: -(-sizes[d.letter] // shares[d.letter]) for d in form.free}
            blocks |= {d.share: shares[d.letter] for d in form.free}
        vectors = max(1, largest * width(self.job.dtype) // (32 * VECTOR))
        warps = min(_warps(largest * _crowd(form)), vectors)
        return Config.of(form, blocks, warps, sizes)

    def shares(self, form: Form, lanes: Sizes) -> dict[str, int]:
        """How many indices of each dimension a program walks: a power of two, outermost first."""
        sizes = self.sizes_of(form)
        blocks = prod(-(-sizes[d.letter] // lanes[d.letter]) for d in form.grid)
        elements = prod(sizes[d.letter] for d in form.free) * prod(lanes.values())
        wanted = min(-(-BUSY * self.machine.processors // blocks), -(-elements // STREAMED))
        wanted = max(1, min(wanted, MOST_PARTS))
        shares: dict[str, int] = {}
        for d in form.free:
            size = sizes[d.letter]
            shares[d.letter] = max(ceiling(-(-size // wanted)), 1)
            wanted = -(-wanted // -(-size // shares[d.letter]))
        return shares

    # --- instances -------------------------------------------------------------------------------
    def lanes(self, form: Form) -> list[dict[str, int]]:
        """Instances per program: several where neighbours in memory are other instances."""
        lanes = {d.letter: 1 for d in form.grid}
        if not form.grid or form.dims[-1] not in form.grid:
            return [lanes]
        inner = form.dims[-1].letter
        size = ceiling(self.sizes_of(form)[inner])
        widths = [n for n in NEIGHBOURS if n * width(self.job.dtype) >= SECTOR]
        return [lanes | {inner: min(size, n)} for n in widths]

    def busy(self, form: Form, choices: list[dict[str, int]]) -> dict[str, int]:
        """The widest that leaves enough programs, or else the narrowest."""
        enough = BUSY * self.machine.processors
        return next((c for c in choices if self.programs(form, c) >= enough), choices[-1])

    def programs(self, form: Form, extents: Sizes) -> int:
        sizes = self.sizes_of(form)
        return prod(-(-sizes[d.letter] // extents[d.letter]) for d in form.grid)

    def several(self, extents: dict[str, int]) -> dict[str, int]:
        """Of small instances several, while enough programs are left."""
        for d in reversed(self.form.grid):
            while extents[d.letter] < self.sizes[d.letter] and prod(extents.values()) < SMALL:
                if self.programs(self.form, extents) < 2 * BUSY * self.machine.processors:
                    break
                extents[d.letter] *= 2
        return extents


def _by_letter(dims: tuple[Dim, ...], extents: tuple[int, ...]) -> dict[str, int]:
    return {d.letter: extent for d, extent in zip(dims, extents, strict=True)}


def _tight(size: int, most: int) -> int:
    """The largest power of two up to ``most`` whose last block is not mostly empty."""
    block = min(ceiling(size), ceiling(most + 1) // 2)
    while block > 256 and -(-size // block) * block > 1.125 * size:
        block //= 2
    return block


def _crowd(form: Form) -> int:
    """2 where many values per element have to be in registers at once, else 1."""
    tensors = sum(v.axes == FULL for v in form.kernel.reads)
    return 2 if tensors + max(len(w.folds) for w in form.kernel.sweeps) > 4 else 1


def _warps(elements: int) -> int:
    """Eight elements of a tensor per thread, more where a tile is large."""
    return max(1, min(16, elements // 256))
