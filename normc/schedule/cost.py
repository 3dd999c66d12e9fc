"""Cost: the bytes a plan moves, against the floor that no plan for the same program can beat.

    A          bytes of one tensor of x's shape; what kernels of this kind spend their time on
    floor      every full-size tensor is read once and written once per plan, if used at all
    once       what kernels ask for when each keeps on chip what it has read, from sweep to sweep
    streaming  what the sweeps ask for when nothing stays in cache between two of them
    split      the same, of the plan whose kernels are cut where programs have to meet

Small tensors (parameters, statistics, inputs over fewer axes) stay in cache within a sweep: each
sweep that reads or stores one counts it once. They are named beside the multiples of A, and counted
in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normc.language.axes import FULL
from normc.language.expr import Var
from normc.language.geometry import Geometry
from normc.schedule.fission import cut
from normc.schedule.plan import Kernel, Plan


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


def moved(plan: Plan, dense: Sequence[str] = ()) -> Moved:
    """Count what the sweeps of a plan read and write, and the floor of its program.

    ``dense`` are the inputs that are another plan's statistics: those which forward has saved.

    >>> from normc.language.parse import parse
    >>> from normc.program.flatten import flatten_definition
    >>> from normc.schedule.schedule import schedule
    >>> moved(schedule(flatten_definition(parse("x/layer_rms(x)")))).show()
    'floor 2A, streaming 3A (small: s0)'
    """
    return Moved(_floor(plan, dense), traffic(plan, False, dense))


@dataclass(frozen=True)
class Ways:
    """What a plan moves, by what its kernels do with what they have read."""

    floor: Traffic
    once: Traffic
    streaming: Traffic
    split: Traffic
    again: tuple[tuple[str, tuple[str, ...]], ...]  # full-size tensors that several kernels read


def ways(plan: Plan, dense: Sequence[str] = ()) -> Ways:
    """Count what a plan moves if all of its kernels keep what they read, and if none does.

    For plans that keep no single values instead (`Kernel.keeps`). What programs that share an
    instance tell each other is not counted: it depends on how many they are, and is small.

    >>> from normc.language.parse import parse
    >>> from normc.program.flatten import flatten_definition
    >>> from normc.schedule.schedule import schedule
    >>> found = ways(schedule(flatten_definition(parse("x/layer_rms(x)"))))
    >>> found.once.show(), found.streaming.show(), found.split.show()
    ('2A', '3A', '3A')
    """
    readers: dict[str, list[str]] = {}
    for kernel in plan.kernels:
        for v in kernel.reads:
            if v.axes == FULL:
                readers.setdefault(v.name, []).append(kernel.name)
    return Ways(
        _floor(plan, dense),
        traffic(plan, True, dense),
        traffic(plan, False, dense),
        traffic(cut(plan), False, dense),
        tuple((name, tuple(who)) for name, who in readers.items() if len(who) > 1),
    )


def traffic(plan: Plan, once: bool, dense: Sequence[str] = ()) -> Traffic:
    """What the kernels of a plan read and write; ``once``: each keeps on chip what it has read."""
    sweeps = [sweep for kernel in plan.kernels for sweep in kernel.sweeps]
    kept = {k.name for k in plan.keeps}  # a slice, in the cache
    if once:
        reads, writes = [k.reads for k in plan.kernels], [_leaving(plan, k) for k in plan.kernels]
    else:
        reads = [[v for v in s.reads if v.name not in kept] for s in sweeps]
        writes = [s.stores for s in sweeps]
    return Traffic(_join(reads), _join(writes), _wide(plan, dense))


def _floor(plan: Plan, dense: Sequence[str]) -> Traffic:
    """Every input that is used and every result, once."""
    program = plan.program
    saved = [s.var for s in program.stats if s.name in plan.saved]
    used = {v.name for kernel in plan.kernels for v in kernel.reads}
    given = [i for i in program.inputs if i.name in used]
    results = (*(o.var for o in program.outputs), *saved)
    return Traffic(tuple(given), results, _wide(plan, dense))


def _leaving(plan: Plan, kernel: Kernel) -> list[Var]:
    """What of a kernel's values is wanted when it is over: by the caller, or by other kernels."""
    wanted = {o.name for o in plan.program.outputs} | set(plan.saved)
    wanted |= {v.name for k in plan.kernels for v in k.reads}
    return [v for sweep in kernel.sweeps for v in sweep.stores if v.name in wanted]


def _wide(plan: Plan, dense: Sequence[str]) -> frozenset[str]:
    return frozenset([*dense, *(s.name for s in plan.program.stats)])


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
