"""Launches: what a configuration means for tensors of one geometry, ready but for their addresses.

Config -> Launch of its kernel, then of the kernels that finish what programs have handed over
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

from normc.backends.contract import Job
from normc.backends.gpus import Machine
from normc.backends.memory import Strides
from normc.backends.tile_scope import ARRIVED, WAIT
from normc.backends.tile_shares import finish_sizes
from normc.backends.tiling import Config, ceiling, finish_name, handed, sum_name, sums_of
from normc.errors import BackendError
from normc.language.geometry import Geometry
from normc.program.program import Stat

MOST = 2**31 - 1  # programs of a launch, and what a 32-bit index can hold
CARRYING = 2  # programs per processor, at most, that carry a sum: each stores a part of it
ALIGNED = 16  # bytes: what addresses that PyTorch makes are multiples of, and a vector load wants

Steps = Mapping[str, Strides]


@dataclass(frozen=True)
class Room:
    """Memory that only kernels see."""

    name: str
    count: int
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One launch, but for its tensors."""

    name: str  # of the function in the source
    schedule: str  # of `tiling.SCHEDULES`; "finish" or "sum"
    programs: int
    tensors: tuple[str, ...]
    numbers: tuple[int, ...]  # strides and sizes
    constants: Mapping[str, Any]  # EPS, INDEX, the extents of tiles and shares
    warps: int
    parts: int = 1  # programs that share an instance
    meets: int = 0  # how often these wait for each other
    turns: bool = False  # whether programs take block after block of instances
    rooms: tuple[Room, ...] = ()  # what is allocated for it

    @property
    def instances(self) -> int:
        """How many blocks of instances are at work at the same time."""
        return self.programs // self.parts

    def options(self, hip: bool) -> dict[str, Any]:
        """What Triton is told beside the arguments; a warp of an AMD GPU is twice as wide.

        Products and sums are not contracted: what two kernels compute is the same number in both,
        so that a tie of max or min in forward is a tie again in backward. A launch whose programs
        wait for each other has to start whole, or not at all.
        """
        warps = max(1, self.warps // 2) if hip else self.warps
        options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
        return options | ({"launch_cooperative_grid": True} if self.meets else {})


def divisor(value: int) -> int:
    """The largest power of two up to `ALIGNED` that divides a number which a kernel is given."""
    return gcd(value, ALIGNED)


def main_launch(config: Config, geometry: Geometry, steps: Steps, eps: float) -> Launch:
    """How a form is launched on full-size tensors of these strides over (N, G, K, S)."""
    form, programs = config.form, config.programs(geometry)
    if programs > MOST:
        raise BackendError(f"{form.name} would need {programs} programs, and a GPU runs {MOST}")
    at = {"n": 0, "c": 2, "s": 3}
    tensors = (
        *(v.name for v in form.pointers),
        *(carried_parts(stat) for stat in form.kernel.carries),
        *map(scratch, form.handed),
        *([scratch(f"{form.name}_{ARRIVED}")] if form.meets else []),
    )
    numbers = (
        *(steps[name][at[letter]] for name, letter in form.strides),
        *(geometry.count(d.axes) for d in form.sizes),
    )
    index = "int64" if _reach(geometry, steps) > MOST else "int32"
    constants = {"EPS": eps, "INDEX": index, **config.constants}
    if form.meets:
        constants[WAIT] = True
    return Launch(
        form.name, form.schedule, programs, tensors, numbers, constants, config.warps,
        config.parts, config.meets, form.turns, _handed_rooms(config, geometry),
    )  # fmt: skip


def sized(launch: Launch, machine: Machine, residents: int) -> Launch | None:
    """The launch with as many programs as can run at once, where they take turns or meet.

    None if not even those of one instance could run at the same time.
    """
    if not launch.turns:
        return launch
    most = launch.programs // launch.parts
    if launch.meets:
        most = min(most, residents // launch.parts)
        if launch.programs and not most:
            return None
    else:
        most = min(most, max(1, CARRYING * machine.processors // launch.parts))
    rooms = launch.rooms
    if WAIT in launch.constants:
        rooms = (*rooms, Room(launch.tensors[-1], most, "int64"))
    return replace(launch, programs=most * launch.parts, rooms=rooms)


def followers(config: Config, launch: Launch, geometry: Geometry) -> list[Launch]:
    """The launches that follow: of what programs handed over, and of sums that they carried."""
    finishes = _finishes(config, geometry, str(launch.constants["INDEX"]))
    job = config.form.job
    sums = [_sum(job, stats, launch.instances, geometry) for stats in sums_of(config.form.kernel)]
    return [one for one in (*finishes, *sums) if one.programs]


def _finishes(config: Config, geometry: Geometry, index: str) -> list[Launch]:
    """The launches that merge what the programs of a split form have handed over."""
    form, blocks = config.form, dict(config.blocks)
    if form.schedule != "split":
        return []
    made: list[Launch] = []
    for i, sweep in enumerate(form.kernel.sweeps):
        if not sweep.folds:
            continue
        kept = geometry.count(form.kernel.grid | sweep.rows)
        merge = ceiling(config.parts_along(sweep.cols))
        block = min(ceiling(max(1, kept)), max(1, 512 // merge))
        named = {n: blocks[n] for d in form.along(sweep.cols) for n in (d.parts, d.share)}
        numbers = (kept, *(geometry.count(d.axes) for d in finish_sizes(form, sweep)))
        tensors = [scratch(t) for fold in sweep.folds for t in handed(fold)]
        tensors += [s.name for fold in sweep.folds for s in fold.stats]
        constants = {**named, "INDEX": index, "MERGE": merge, "BLOCK": block}
        made.append(
            Launch(finish_name(form, i), "finish", -(-kept // block), tuple(tensors), numbers,
                   constants, max(1, min(8, merge * block // 128)))
        )  # fmt: skip
    return made


def _sum(job: Job, stats: Sequence[Stat], parts: int, geometry: Geometry) -> Launch:
    """The launch that adds up the parts of carried sums."""
    size = geometry.count(stats[0].kept)
    tile = {"BLOCK_PARTS": 32, "BLOCK": 64}
    numbers = (parts, size, geometry.count(stats[0].over))
    tensors = (*map(carried_parts, stats), *(stat.name for stat in stats))
    rooms = tuple(Room(carried_parts(stat), parts * size, job.wide) for stat in stats)
    programs = -(-size // tile["BLOCK"])
    return Launch(sum_name(job, stats), "sum", programs, tensors, numbers, tile, 8, rooms=rooms)


def carried_parts(stat: Stat) -> str:
    """What the parts of a carried sum are called."""
    return scratch(f"{stat.name}_parts")


def scratch(name: str) -> str:
    """What a tensor of normc's own is called: like no tensor of a user."""
    return f"{name} (scratch)"


def _handed_rooms(config: Config, geometry: Geometry) -> tuple[Room, ...]:
    """The room for the numbers that programs hand each other."""
    form = config.form
    return tuple(
        Room(scratch(name), geometry.count(form.kernel.grid | w.rows) * config.parts_along(w.cols),
             form.job.wide)
        for w in (form.kernel.sweeps if form.shared else ())
        for fold in w.folds
        for name in handed(fold)
    )  # fmt: skip


def _reach(geometry: Geometry, steps: Steps) -> int:
    """The largest offset into any tensor."""
    sizes = geometry.sizes()
    ends = (
        sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        for strides in steps.values()
    )
    return max([prod(sizes), *ends])
