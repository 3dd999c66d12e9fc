"""Tiling: the schedules a kernel of a plan can take, and what its text and its launch agree on.

Every axis is one dimension of a tile, and a dimension's extent is a power of two: so no index of an
element is ever taken apart by division, and layouts are strides. Groups and channels are one
dimension, ``c``, where a kernel never tells them apart. A program takes a block of indices along
each axis of the grid, an *instance* or several, and walks the other axes:

                                     one program per instance     several programs share it
    all of it in registers           resident                     cluster
    loops, and reads it once more    streaming                    split

Programs that share an instance each have a box of it, and hand each other the states of their
reductions through memory. Those of a cluster wait for each other in one launch; split ends the
launch there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from normc.backends.contract import Job
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.expr import Var, variables
from normc.language.geometry import Geometry
from normc.language.reductions import counted
from normc.program.program import Stat
from normc.schedule.plan import Fold, Kernel, Sweep

SCHEDULES = ("resident", "streaming", "cluster", "split")


@dataclass(frozen=True)
class Dim:
    """One dimension of a kernel's tiles."""

    letter: str  # its index
    axes: Axis

    @property
    def size(self) -> str:
        """What its size is called."""
        return self.letter.upper()

    @property
    def share(self) -> str:
        """What the number of indices that one of several programs walks is called."""
        return f"SHARE_{self.size}"

    @property
    def parts(self) -> str:
        """What the number of programs along it is called."""
        return f"PARTS_{self.size}"

    def block(self, sweep: int | None = None) -> str:
        """What the extent along it is called, in one sweep or in the whole kernel."""
        return f"BLOCK_{self.size}{'' if sweep is None else sweep}"


@dataclass(frozen=True)
class Form:
    """One kernel of a job under one schedule."""

    job: Job
    kernel: Kernel
    resident: bool
    shared: bool = False
    single: frozenset[str] = frozenset()  # dimensions that a tile has not: one index at a time
    exact: frozenset[str] = frozenset()  # those that tiles fill, so that no lane is masked

    @property
    def schedule(self) -> str:
        """Its name among `SCHEDULES`."""
        alone = "resident" if self.resident else "streaming"
        together = "cluster" if self.resident else "split"
        return together if self.shared else alone

    @property
    def name(self) -> str:
        """The name of the function in the source."""
        return f"{self.job.entry}_{self.kernel.name}_{self.schedule}"

    @cached_property
    def dims(self) -> tuple[Dim, ...]:
        """The dimensions that are walked, outermost in memory first."""
        return self._dims(self._walked)

    @cached_property
    def tile(self) -> tuple[Dim, ...]:
        """The dimensions of its tiles."""
        return tuple(d for d in self.dims if d.letter not in self.single)

    @property
    def grid(self) -> tuple[Dim, ...]:
        """The dimensions that are split over programs."""
        return self.along(self.kernel.grid)

    @property
    def free(self) -> tuple[Dim, ...]:
        """The dimensions that a program, or those that share an instance, walk."""
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

    @cached_property
    def handed(self) -> tuple[str, ...]:
        """The tensors in which programs hand each other the numbers of states."""
        folds = [f for w in self.kernel.sweeps for f in w.folds] if self.shared else []
        return tuple(name for fold in folds for name in handed(fold))

    @property
    def meets(self) -> int:
        """How often the programs of a cluster wait for each other."""
        waits = sum(any(w.folds for w in phase) for phase in self.kernel.phases)
        return waits if self.schedule == "cluster" else 0

    @property
    def large(self) -> bool:
        """Whether it moves any tensor of x's size, and has something to share."""
        moved = (*self.kernel.reads, *(v for w in self.kernel.sweeps for v in w.stores))
        return bool(self.free) and any(v.axes == FULL for v in moved)

    @property
    def turns(self) -> bool:
        """Whether a program takes several blocks of instances, one after the other."""
        return bool(self.kernel.carries or self.meets)

    @property
    def strides(self) -> tuple[tuple[str, str], ...]:
        """The strides passed: of full-size tensors, without the one that is known to be 1."""
        inner = "c" if self.job.plan.order[-1] & CHANNEL else "s"
        letters = [a for a in "ncs" if not (self.job.unit and a == inner)]
        return tuple((v.name, a) for v in self.pointers if v.axes == FULL for a in letters)

    @property
    def blocks(self) -> tuple[tuple[Dim, int | None], ...]:
        """The extents passed: a dimension, and the sweep if it is the extent in its loops."""
        found = [(d, None) for d in (self.dims if self.resident else self.grid)]
        if not self.resident:
            sweeps = enumerate(self.kernel.sweeps)
            found += [(d, i) for i, w in sweeps for d in self.looped(w)]
        return tuple((d, i) for d, i in found if d in self.tile)

    @property
    def shares(self) -> tuple[str, ...]:
        """The numbers passed that say how programs share an instance."""
        if not self.shared:
            return ()
        share = () if self.resident else tuple(d.share for d in self.free)
        return (*(d.parts for d in self.free), *share, *self.merges.values())

    @property
    def merges(self) -> dict[int, str]:
        """By sweep: what the extent is called in which the states of all programs are read."""
        every = range(len(self.kernel.sweeps)) if self.meets else ()
        return {i: f"MERGE{i}" for i in every if self.kernel.sweeps[i].folds}

    def looped(self, sweep: Sweep) -> tuple[Dim, ...]:
        """The dimensions over which a form that is not resident loops in a sweep."""
        return (*self.along(sweep.rows), *self.along(sweep.cols))

    def stores(self, stat: Stat) -> bool:
        """Whether a statistic goes through memory: to other kernels, or from row to row."""
        if self.schedule == "split":  # a kernel of its own finishes them
            return False
        return self.outlives(stat) or not (self.resident or self.registered(stat))

    def outlives(self, stat: Stat) -> bool:
        """Whether a statistic is read by another kernel, or after the call."""
        plan = self.job.plan
        others = (v for k in plan.kernels if k.name != self.kernel.name for v in k.reads)
        return stat.name in plan.saved or any(v.name == stat.name for v in others)

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


def handed(fold: Fold) -> list[str]:
    """The tensors through which the numbers of a fold's state go from program to program."""
    return [f"{fold.stats[0].name}_{f.name}_parts" for f in fold.state.folds]


def sums_of(kernel: Kernel) -> list[tuple[Stat, ...]]:
    """The sums that a kernel carries, together where they are kept over the same axes."""
    groups: dict[Axis, tuple[Stat, ...]] = {}
    for stat in kernel.carries:
        groups[stat.kept] = (*groups.get(stat.kept, ()), stat)
    return list(groups.values())


def sum_name(job: Job, stats: Sequence[Stat]) -> str:
    """The name of the kernel that adds up the parts of carried sums."""
    return f"{job.entry}_{stats[0].name}_parts"


def finish_name(form: Form, sweep: int) -> str:
    """The name of the kernel that merges what the programs of a split sweep have handed over."""
    return f"{form.name}_finish{sweep}"


def union(sets: Iterable[Axis]) -> Axis:
    """All axes of several sets."""
    axes = NONE
    for more in sets:
        axes |= more
    return axes


def ceiling(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class Config:
    """How one form is launched: the extents of its tiles and shares by name, and its warps."""

    form: Form
    blocks: tuple[tuple[str, int], ...]
    warps: int

    @staticmethod
    def of(form: Form, blocks: Mapping[str, int], warps: int, sizes: Mapping[str, int]) -> Config:
        """The configuration; a dimension whose extents are all 1 is none of the tile's."""
        extents = [(d.letter, blocks[d.block(i)]) for d, i in form.blocks]
        letters = {d.letter for d in form.dims}
        single = letters.difference(letter for letter, extent in extents if extent > 1)
        exact = letters.difference(letter for letter, n in extents if sizes[letter] % n)
        found = replace(form, single=frozenset(single), exact=frozenset(exact - single))
        return Config(found, tuple(blocks.items()), warps)

    @property
    def constants(self) -> dict[str, int]:
        """The numbers that are passed to be folded into the code."""
        passed = {*(d.block(i) for d, i in self.form.blocks), *self.form.shares}
        return {name: value for name, value in self.blocks if name in passed}

    def blocks_of_instances(self, geometry: Geometry) -> int:
        """How many blocks of instances there are, for programs to take in turn."""
        blocks = dict(self.blocks)
        return prod(-(-geometry.count(d.axes) // blocks[d.block()]) for d in self.form.grid)

    @property
    def parts(self) -> int:
        """How many programs share an instance."""
        return self.parts_along(FULL) if self.form.shared else 1

    def parts_along(self, axes: Axis) -> int:
        """How many programs there are along ``axes``."""
        blocks = dict(self.blocks)
        return prod(blocks[d.parts] for d in self.form.free if d.axes & axes)

    @property
    def meets(self) -> int:
        """How often programs really wait for each other: where an instance's rows are shared."""
        if not self.form.meets:
            return 0
        phases = [union(w.cols for w in p if w.folds) for p in self.form.kernel.phases]
        return sum(self.parts_along(axes) > 1 for axes in phases)

    def programs(self, geometry: Geometry) -> int:
        """How many programs there are, if none takes several blocks."""
        return self.parts * self.blocks_of_instances(geometry)
