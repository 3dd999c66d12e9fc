"""GPU worker: ``python -m benchmarks.gpu_worker``, a process that has the device.

It is started by `benchmarks.gpu` and answers its tasks, see `benchmarks.gpu_pool`.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib import metadata
from typing import Any

import torch

from benchmarks import gpu_check, gpu_speed
from benchmarks.gpu_pool import Answer, Task, serve
from benchmarks.gpu_rows import FORWARD
from benchmarks.gpu_timing import Cuda, race, summary
from normc.analysis.contest import COPY
from normc.analysis.machine import environment

COPIED = 2**31
"""Bytes that the copy reads, with whose speed all times are compared."""


def copy(task: Task) -> Answer:
    """The speed of a copy of 2 GiB."""
    gpu_speed.free()
    x = torch.empty(COPIED // 2, dtype=torch.bfloat16, device="cuda").normal_()
    samples, failed = race([gpu_speed.copying(x)], Cuda(), float(task["seconds"]))
    if failed:
        return {"error": failed[COPY]}
    found = summary(samples[COPY][FORWARD])
    return found | {"gbps": 2 * COPIED / found["us"] / 1e3}


def machine(_: Task) -> Answer:
    """What the numbers depend on beside the code."""
    device = torch.cuda.get_device_properties(0)
    versions = ("normc", "torch", "triton", "liger_kernel", "quack-kernels", "hypothesis")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        **_environment(),
        "gpu": device.name,
        "processors": device.multi_processor_count,
        "memory_gib": device.total_memory / 2**30,
        "l2_mb": gpu_speed.l2() / 1e6,
        "driver": _said(query),
        "cuda": torch.version.cuda,
        "commit": _said(["git", "rev-parse", "HEAD"]),
        "versions": {name: _version(name) for name in versions},
    }


def _environment() -> dict[str, Any]:
    try:
        return environment("CUDA's caching allocator")
    except metadata.PackageNotFoundError:  # normc is run from its folder
        return {"date": date.today().isoformat(), "python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _said(command: list[str]) -> str:
    """The first line that a program prints, where there is one."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def _poisoned() -> bool:
    """Whether the device has failed in a way that it remembers for as long as the process lives."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    torch.set_num_threads(1)  # there are several workers, and what is large is on the device
    serve(
        {
            "check": gpu_check.check,
            "warm": gpu_speed.warm,
            "speed": gpu_speed.speed,
            "copy": copy,
            "machine": machine,
        },
        _poisoned,
    )
