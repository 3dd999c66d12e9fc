"""Cost: the bytes a plan moves, against the floor that no plan for the same program can beat.

    A          bytes of one tensor of x's shape; what kernels of this kind spend their time on
    floor      every full-size tensor is read once and written once per plan, if used at all
    streaming  what the sweeps ask for when nothing stays in cache between two of them

Small tensors (parameters, statistics, inputs over fewer axes) stay in cache within a sweep: each
sweep that reads or stores one counts it once. They are named beside the multiples of A, and counted
in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from normc.language.axes import FULL
from normc.language.expr import Var
from normc.language.geometry import Geometry
from normc.schedule.plan import Plan


@dataclass(frozen=True)
class Traffic:
    """Tensors crossing between memory and chip, each as often as it does."""

    reads: tuple[Var, ...]
    writes: tuple[Var, ...]
    stats: frozenset[str] = frozenset()  # those kept in the wide type

    @property
    def tensors(self) -> tuple[Var, ...]:
        """All that is moved, reads first."""
        return (*self.reads, *self.writes)

    @property
    def full(self) -> int:
        """Full-size tensors moved: the traffic in units of A."""
        return sum(v.axes == FULL for v in self.tensors)

    @property
    def small(self) -> tuple[str, ...]:
        """The names of the smaller tensors moved, in order of first use."""
        return tuple(dict.fromkeys(v.name for v in self.tensors if v.axes != FULL))

    def show(self) -> str:
        """The traffic in units of A: ``3A``."""
        return f"{self.full}A"

    def bytes(self, geometry: Geometry, itemsize: int) -> int:
        """The traffic in bytes, small tensors included; statistics are at least float32."""
        wide = max(itemsize, 4)
        return sum(
            geometry.count(v.axes) * (wide if v.name in self.stats else itemsize)
            for v in self.tensors
        )


@dataclass(frozen=True)
class Moved:
    """What a plan moves, and the least that any plan for its program could."""

    floor: Traffic
    streaming: Traffic

    def show(self) -> str:
        """Symbolic text: ``floor 2A, streaming 3A (small: s0, gamma)``."""
        small = self.streaming.small
        named = f" (small: {', '.join(small)})" if small else ""
        return f"floor {self.floor.show()}, streaming {self.streaming.show()}{named}"

    def show_bytes(self, geometry: Geometry, itemsize: int) -> str:
        """Concrete text: ``floor 2.0 MiB, streaming 3.0 MiB (1.50x)``."""
        least, most = (t.bytes(geometry, itemsize) for t in (self.floor, self.streaming))
        times = f" ({most / least:.2f}x)" if least else ""
        return f"floor {show_bytes(least)}, streaming {show_bytes(most)}{times}"


def moved(plan: Plan, dense: Iterable[str] = ()) -> Moved:
    """Count what the sweeps of a plan read and write, and the floor of its program.

    ``dense`` are the inputs that are another plan's statistics: those which forward has saved.

    >>> from normc.language.parse import parse
    >>> from normc.program.flatten import flatten_definition
    >>> from normc.schedule.schedule import schedule
    >>> moved(schedule(flatten_definition(parse("x/layer_rms(x)")))).show()
    'floor 2A, streaming 3A (small: s0)'
    """
    program = plan.program
    stats = frozenset([*dense, *(s.name for s in program.stats)])
    kept = [s.var for s in program.stats if s.name in plan.saved]
    produced = [*(o.var for o in program.outputs), *kept]
    used = {v.name for kernel in plan.kernels for v in kernel.reads}
    given = [i for i in program.inputs if i.name in used]
    sweeps = [sweep for kernel in plan.kernels for sweep in kernel.sweeps]
    kept = {k.name for k in plan.keeps}  # a slice, in the cache
    return Moved(
        Traffic(tuple(given), tuple(produced), stats),
        Traffic(
            _join([v for v in s.reads if v.name not in kept] for s in sweeps),
            _join(s.stores for s in sweeps),
            stats,
        ),
    )


def _join(groups: Iterable[Iterable[Var]]) -> tuple[Var, ...]:
    return tuple(v for group in groups for v in group)


def show_bytes(count: float) -> str:
    """A number of bytes for people: ``640 B``, ``12.0 KiB``, ``1.5 GiB``."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
