"""Machine: what a measured time depends on beside the code, and how it is settled."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from normc.backends.c_compiler import compiler, compiler_version


def reuse_memory() -> str:
    """Let the C library keep freed memory: "reuse", or "system" where it cannot be told.

    By default glibc gives a large tensor back to the system when it is freed, and the next one is
    new pages, each zeroed by the kernel when it is first touched: for a result of 100 MB that costs
    more than computing it, alike for all that are compared. A training process reaches the state in
    which memory is reused by itself, or by an allocator such as jemalloc.
    """
    if not sys.platform.startswith("linux"):
        return "system"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return "system"
    done = [mallopt(option, value) for option, value in _KEEP]
    return "reuse" if all(done) else "system"


_KEEP = ((-4, 0), (-1, 2**31 - 1))
"""M_MMAP_MAX: no tensor is mapped by itself; M_TRIM_THRESHOLD: the heap does not shrink."""


@contextmanager
def threads(count: int | None) -> Generator[int]:
    """Torch and the kernels on so many threads, or on as many as they have; yields the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def environment(malloc: str) -> dict[str, Any]:
    """Processor, threads, versions, and how memory is allocated, for the record."""
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "malloc": malloc,
        "compiler": compiler_version().splitlines()[0] if compiler() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "normc": version("normc"),
    }


def _cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
