"""GPUs: what schedules depend on, and how long one is likely to take.

The estimate orders schedules; it promises nothing. Bandwidths are those of a copy where one is
known (4.3 TB/s on an H200), else of the data sheet; what a launch and a meeting cost is a guess
from published timings of small kernels and of barriers over a grid. `NORMC_TUNE` asks the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normc.backends.tiling import Config
from normc.language.axes import FULL
from normc.language.geometry import Geometry


@dataclass(frozen=True)
class Machine:
    """A GPU, as far as schedules depend on it."""

    name: str
    processors: int  # streaming multiprocessors, or compute units
    bandwidth: float  # bytes of memory per microsecond
    cache: int  # bytes that all processors share
    waits: bool = True  # starts all programs of a launch at once or none, so that they can meet
    registers: int = 65536  # of 32 bits, per processor
    threads: int = 2048  # per processor
    shared: int = 98304  # bytes per processor, at the least

    def residents(self, registers: int, warps: int, shared: int) -> int:
        """How many programs run at the same time, given what ptxas says one needs."""
        threads = 32 * warps
        held = -(-registers // 8) * 8 * threads  # registers are given out in eights
        each = min(self.registers // max(1, held), self.threads // threads, 32)
        return self.processors * min(each, self.shared // shared if shared else 32)


MACHINES = {
    m.name: m
    for m in (
        Machine("sm_80", 108, 1.7e6, 40 << 20),
        Machine("sm_90", 132, 4.3e6, 50 << 20),
        Machine("sm_100", 148, 7.0e6, 126 << 20),
        # A wave of 64: eight of them a unit with 128 registers. Meetings were never tried there.
        Machine("gfx942", 304, 4.3e6, 4 << 20, waits=False, registers=131072, shared=65536),
    )
}

LAUNCH = 2.0  # microseconds that a kernel takes at the least
MEETING = 2.0  # microseconds from the last load of a box to the first store, all programs met
HIT = 0.4  # what reading from the shared cache costs, relative to memory
BUSY = 16  # warps per processor that keep memory busy
MOST = 48  # warps per processor that are there at the same time, where programs have few


def estimate(schedule: Sequence[Config], geometry: Geometry, machine: Machine) -> float:
    """Microseconds that the launches of a schedule may take."""
    return sum(_launch(config, geometry, machine) for config in schedule)


def _launch(config: Config, geometry: Geometry, machine: Machine) -> float:
    form = config.form
    tensor = geometry.count(FULL) * {"float64": 8, "float32": 4}.get(form.job.dtype, 2)
    blocks, parts = max(1, config.blocks_of_instances(geometry)), config.parts
    held = machine.processors * (1 if form.meets else max(1, MOST // config.warps))
    share = tensor * min(1.0, held / (blocks * parts))
    moved = tensor * _tensors(config, share, machine)
    warps = min(blocks * parts, held) * config.warps
    busy = min(1.0, warps / (BUSY * machine.processors))
    meetings = config.meets * -(-blocks // max(1, held // parts))
    launches = 2 if form.schedule == "split" and form.handed else 1
    return moved / machine.bandwidth / busy + LAUNCH * launches + MEETING * meetings


def _tensors(config: Config, share: float, machine: Machine) -> float:
    """How many full-size tensors go to and from memory; ``share``: bytes of one at work."""
    sweeps = config.form.kernel.sweeps
    written = sum(v.axes == FULL for w in sweeps for v in w.stores)
    reads = [v.name for w in sweeps for v in w.reads if v.axes == FULL]
    first = len(set(reads))
    again = 0.0 if config.form.resident else len(reads) - first
    near = share * (first + written) < machine.cache / 2
    return first + written + again * (HIT if near else 1.0)
