"""Tuned: the record of the schedules that were the fastest on a machine, and what comes of it.

    <cache folder>/tuned/<machine>-triton-<version>.json        see `tuned_file`

An entry is about one kernel of a plan for tensors of one size, dtype and order. It names the
fastest of the schedules that normc offers by itself, which then comes first; names and numbers are
only compared, and what fits none of those on offer changes nothing. Whoever wants to know more
reads how long each of the others took, and how far each was from the oracle.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from normc import config
from normc.backends import tuned_file
from normc.backends.cache import directory
from normc.backends.contract import Job
from normc.backends.gpus import Machine
from normc.backends.settle import Choose, Measured
from normc.backends.tile_choice import Schedule, wider
from normc.errors import CacheError
from normc.language.axes import Axis
from normc.language.geometry import Geometry
from normc.schedule.plan import Kernel


@dataclass(frozen=True)
class Trial:
    """One schedule of a kernel: how long it took, or why it is refused."""

    schedule: Schedule
    us: float = math.inf  # microseconds of its whole job, the median
    error: float = math.inf  # the worst, relative to the oracle's largest number
    tensor: str = ""  # where that is
    refused: str = ""

    def told(self) -> dict[str, Any]:
        """What stands in the record."""
        if self.refused:
            return {**told(self.schedule), "refused": self.refused}
        numbers = {"us": round(self.us, 2), "error": float(f"{self.error:.2e}")}
        return {**told(self.schedule), **numbers, "tensor": self.tensor}


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that is not refused."""
    return min((t for t in trials if not t.refused), key=lambda t: t.us, default=None)


# --- what is launched because of it --------------------------------------------------------------


def preferred(choose: Choose) -> Choose:
    """A choice in which the schedule on record, if it is one of those on offer, comes first."""

    def chosen(job: Job, kernel: Kernel, geometry: Geometry, machine: Machine) -> list[Schedule]:
        offered = choose(job, kernel, geometry, machine)
        if isinstance(offered[0], Measured):
            return offered
        wanted = winner(job, kernel, geometry, machine)
        for schedule in (*offered, *map(wider, offered)) if wanted else ():
            if told(schedule) == wanted:
                return [Measured(schedule), *(s for s in offered if s != schedule)]
        return offered

    return chosen


def winner(job: Job, kernel: Kernel, geometry: Geometry, machine: Machine) -> dict[str, Any] | None:
    """What is on record as the fastest, as `told`; None if this normc has not measured it."""
    try:
        known = tuned_file.entries(place(machine))
    except (CacheError, OSError):
        return None
    entry = known.get(tuned_file.key(identity(job, kernel, geometry))) if known else None
    if not entry or not entry["winner"] or entry["versions"]["normc"] != versions()["normc"]:
        return None
    return {key: entry["winner"][key] for key in ("schedule", "launches")}


# --- what is on record ---------------------------------------------------------------------------


def remember(
    job: Job, kernel: Kernel, geometry: Geometry, machine: Machine, trials: Sequence[Trial]
) -> None:
    """Put what was measured on record; where that cannot be written, it is forgotten."""
    best = fastest(trials)
    rest = sorted((t for t in trials if t is not best), key=lambda t: (t.us, show(t.schedule)))
    entry: tuned_file.Entry = {
        "formula": " ".join(job.formula.split()),
        **identity(job, kernel, geometry),
        "winner": best.told() if best else None,
        "others": [t.told() for t in rest],
        "date": date.today().isoformat(),
        "versions": versions(),
    }
    about = f"{machine.name}, {machine.processors} processors"
    try:
        tuned_file.add(place(machine), about, entry)
    except (CacheError, OSError) as error:
        config.debug(1, f"what was measured cannot be put on record: {error}")


def place(machine: Machine) -> Path:
    """Where the record of a machine is, whether or not there is one."""
    label = re.sub(r"[^\w.]+", "-", machine.name, flags=re.ASCII)[:80]
    file = f"{label}-{machine.processors}-triton-{versions()['triton']}.json"
    return directory() / "tuned" / file


def identity(job: Job, kernel: Kernel, geometry: Geometry) -> tuned_file.Entry:
    """What an entry is about."""
    sizes = zip(Axis, geometry.sizes(), strict=True)
    return {
        "part": job.part,
        "kernel": kernel.name,
        "dtype": job.dtype,
        "order": "".join(str(axis.name) for axis in job.plan.order),
        "sizes": {str(axis.name): size for axis, size in sizes},
        "plan": digest(job),
    }


def digest(job: Job) -> str:
    """A name for a job's plan, and for all that its kernels depend on beside sizes and dtype."""
    plan = job.plan
    rest = f"saved {plan.saved} dense {job.dense} unit {job.unit}"
    text = "\n".join([plan.program.show(), plan.show(), rest])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@once
def versions() -> dict[str, str]:
    """What a time was measured with."""
    return {"normc": _own(), "torch": str(torch.__version__), "triton": _triton()}


def _triton() -> str:
    """The version of Triton, under whatever name it was installed."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


# --- what is said of a schedule ------------------------------------------------------------------


def told(schedule: Schedule) -> dict[str, Any]:
    """A schedule in names and numbers."""
    launches = [{"blocks": dict(c.blocks), "warps": c.warps} for c in schedule]
    return {"schedule": named(schedule), "launches": launches}


def named(schedule: Schedule) -> str:
    """Its name among `tiling.SCHEDULES`."""
    return next((c.form.schedule for c in schedule if c.form.shared), schedule[0].form.schedule)


def show(schedule: Schedule) -> str:
    """The same in a line: ``cluster BLOCK_N=1 BLOCK_C=64 PARTS_C=2 x 16 warps``."""
    each = (
        f"{' '.join(f'{name}={n}' for name, n in c.blocks)} x {c.warps} warps" for c in schedule
    )
    return f"{named(schedule)} {', '.join(each)}"


def _own() -> str:
    """normc's version; a source tree that nothing has installed has none."""
    try:
        return version("normc")
    except PackageNotFoundError:
        return "source"
