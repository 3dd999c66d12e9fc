"""The C compiler: how it is found, what it is told, and the shared objects it makes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from normc import config
from normc.backends import cache
from normc.errors import BackendError

NONE = "no C compiler found: install gcc or clang, or set CC"

# No contraction: the same expression gives the same bits in every loop it is printed in, so that an
# element still equals the maximum it was when the backward pass meets it again.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-fopenmp", "-shared", "-fPIC", "-w")  # fmt: skip


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C compiler: CC, or the first of cc, gcc, clang."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]  # CC is make's own, not normc's
    return next((found for n in names if n and (found := shutil.which(n))), None)


@lru_cache(maxsize=1)
def compiler_version() -> str:
    """What the compiler calls itself, part of every cache key."""
    found = compiler()
    if found is None:
        raise BackendError(NONE)
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout


@lru_cache(maxsize=1)
def machine() -> str:
    """The processor that -march=native compiles for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = [line for line in text.splitlines() if line.startswith(("model name", "flags"))]
        return platform.machine() + "\n".join(model[:2])
    except OSError:
        return platform.machine() + platform.processor()


def compiled(text: str, name: str) -> Path:
    """The shared object of a unit, from the cache or compiled now; ``name`` is for messages."""
    key = cache.key(text, "c", compiler_version() + " ".join(FLAGS), machine())
    folder = cache.get_or_build(key, lambda where: _compile(text, name, where))
    return folder / "kernel.so"


def _compile(text: str, name: str, folder: Path) -> None:
    path = folder / "kernel.c"
    path.write_text(text)
    command = [str(compiler()), *FLAGS, "-o", str(folder / "kernel.so"), str(path), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"the C compiler refused {name}:\n{done.stderr[:2000]}")
    config.debug(1, f"compiled {name}")
