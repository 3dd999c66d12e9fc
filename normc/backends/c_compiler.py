"""The C compiler: how it is found, what it is told, and the shared objects it makes.

What a compiler is told is tried in an order: the processor's own instructions and OpenMP first. A
compiler that refuses that (clang without libomp, an unknown ``-march=native``) is asked with a
small program what it takes, once; the answer is kept in the cache.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache as once
from functools import lru_cache
from pathlib import Path

from normc import config
from normc.backends import cache
from normc.errors import BackendError

NONE = "no C compiler found: install gcc or clang, or set CC"

# gcc -O3 takes twice as long for kernels that are no faster: what counts is that loops become
# vectors, with all that they call inside. Registers are allocated once for a whole nest of loops.
_GCC = ("-O1", "-ftree-loop-vectorize", "-fira-region=one", "--param=max-inline-insns-single=2000",
        "--param=early-inlining-insns=2000")  # fmt: skip
_OTHER = ("-O2",)

# No contraction: the same expression gives the same bits in every loop it is printed in, so that an
# element still equals the maximum it was when the backward pass meets it again.
_ALWAYS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w",
           "-pipe")  # fmt: skip

# A library that is missing (libomp) shall be missed now, not when the shared object is loaded.
_LINK = ("-lm", "-Wl,-z,defs") if sys.platform == "linux" else ("-lm",)

_CHOICES = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-mcpu=native", "-fopenmp-simd"),
    ("-fopenmp",),
    ("-fopenmp-simd",),
    (),
)
"""What to ask for, best first; simd alone is one thread."""

_TRIAL = """\
int omp_get_thread_num(void);
void trial(float *x, int n) {
#pragma omp parallel for
  for (int i = 0; i < n; i++)
#ifdef _OPENMP
    x[i] = omp_get_thread_num();
#else
    x[i] = 0;
#endif
}
"""

_trying = threading.Lock()


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


def flags() -> tuple[str, ...]:
    """What the compiler is told, but for names of files."""
    return _flags(_CHOICES[_choice()])


def key(text: str) -> str:
    """The cache key of a unit."""
    return cache.key(text, "c", compiler_version() + " ".join(flags()), machine())


def compiled(text: str, name: str) -> Path:
    """The shared object of a unit, from the cache or compiled now; ``name`` is for messages."""
    try:
        return _entry(text, name) / "kernel.so"
    except BackendError:
        if not settle():
            raise
    return _entry(text, name) / "kernel.so"  # it was the flags that were refused


def compile_into(folder: Path, text: str, name: str) -> None:
    """Write ``kernel.c`` and compile ``kernel.so``; `BackendError` if the compiler refuses."""
    path = folder / "kernel.c"
    path.write_text(text)
    done = _run(flags(), path, folder / "kernel.so")
    if done.returncode:
        raise BackendError(f"the C compiler refused {name}:\n{done.stderr[:2000]}")
    config.debug(1, f"compiled {name}")


def settle() -> bool:
    """Ask the compiler, after a refusal, what it takes: whether that is something else now."""
    with _trying:
        before = _choice()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.c"
            path.write_text(_TRIAL)
            works = (
                not _run(_flags(c), path, path.with_suffix(".so")).returncode for c in _CHOICES
            )
            found = next((i for i, fine in enumerate(works) if fine), before)
        if found == before:
            return False
        cache.put(_choice_key(), {"choice": str(found).encode()})
        _choice.cache_clear()
        if "-fopenmp" not in _CHOICES[found]:
            config.debug(1, f"{compiler()} has no OpenMP: kernels run on one thread")
        return True


def _entry(text: str, name: str) -> Path:
    return cache.get_or_build(key(text), lambda where: compile_into(where, text, name))


def _run(flags: tuple[str, ...], source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    command = [str(compiler()), *flags, "-o", str(to), str(source), *_LINK]
    return subprocess.run(command, capture_output=True, text=True)


def _flags(choice: tuple[str, ...]) -> tuple[str, ...]:
    gcc = "Free Software Foundation" in compiler_version()
    return (*(_GCC if gcc else _OTHER), *choice, *_ALWAYS)


@once
def _choice() -> int:
    """Which of the choices this compiler takes: the first, unless it was asked before."""
    folder = cache.get(_choice_key())
    return int((folder / "choice").read_text()) if folder else 0


def _choice_key() -> str:
    return cache.key("choice", "c", f"{compiler()} {compiler_version()}", machine())
