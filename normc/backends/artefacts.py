"""Artefacts: what compiling ahead of time gives, and how it is described; nothing here compiles."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from normc.backends.contract import Job
from normc.backends.launches import Launch
from normc.backends.memory import Strides
from normc.backends.settle import Report
from normc.errors import BackendError
from normc.language.axes import CHANNEL, FULL
from normc.language.geometry import Geometry


@dataclass(frozen=True)
class Argument:
    """One argument of a compiled kernel, in order."""

    name: str
    kind: str  # "pointer", "number", or "constant" for what was folded in
    type: str  # as Triton spells it: "*bf16", "i32"
    value: Any  # of numbers and constants
    aligned: bool  # a pointer to a multiple of 16 bytes


@dataclass(frozen=True)
class Artefact:
    """One kernel compiled for a GPU: its assembly, its binary, and what it asks of the machine."""

    launch: Launch
    text: str  # PTX or AMD assembly
    binary: bytes
    registers: int  # per thread
    spills: int  # bytes per thread, of registers written to memory
    shared: int  # bytes per program
    source: str  # the readable text that it comes from
    file: str  # the name of the file with that text
    symbol: str  # the entry point in the binary
    arguments: tuple[Argument, ...]


def cubin_report(binary: bytes, shared: int, cuobjdump: str) -> Report:
    """What a kernel for CUDA asks for, as the tool that reads its binary says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise BackendError(f"cuobjdump cannot read a kernel:\n{done.stderr[:2000]}")
    return Report(int(found[1]), int(found[2]), shared)


def amd_report(text: str, shared: int) -> Report:
    """Vector registers and bytes spilled, from the metadata that ends the assembly."""
    (registers,) = re.findall(r"\.vgpr_count: *(\d+)", text)
    (spilled,) = re.findall(r"\.vgpr_spill_count: *(\d+)", text)
    return Report(int(registers), 4 * int(spilled), shared)


def full(job: Job) -> list[str]:
    """The names of the tensors of x's shape."""
    program = job.plan.program
    every = (*program.inputs, *(o.var for o in program.outputs))
    return [v.name for v in every if v.axes == FULL]


def contiguous(job: Job, geometry: Geometry) -> Strides:
    """The strides of a contiguous tensor whose axes lie in the order of the job."""
    c, s = geometry.channels, geometry.s
    n, c, s = (c * s, 1, c) if job.plan.order[-1] & CHANNEL else (c * s, s, 1)
    return n, c * geometry.k, c, s
