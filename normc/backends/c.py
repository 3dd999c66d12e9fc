"""The C backend: compiles the source of `normc.backends.c_source` and calls it on CPU tensors.

The system's C compiler, no header, no Python: a shared object in the cache, loaded with ctypes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normc import config
from normc.backends import cache
from normc.backends.c_source import PARTS, arguments, render
from normc.backends.contract import Job, Run, Source
from normc.backends.memory import Strides, dense_strides, empty, full_input, strides_of, walkable
from normc.errors import BackendError
from normc.language.expr import Var
from normc.language.geometry import Geometry
from normc.program.program import Stat


class CBackend:
    """Prints, compiles and loads C."""

    name = "c"
    carries = True

    def why_not(self, dtype: str, device: str) -> str:
        if device != "cpu":
            return f"the C backend runs on the CPU, not on {device}"
        if dtype not in ("float32", "float64"):
            return f"the C backend stores float32 and float64, not {dtype}"
        return "" if compiler() else "no C compiler found: install gcc or clang, or set CC"

    def render(self, job: Job) -> Source:
        return render(job)

    def load(self, job: Job, source: Source) -> Run:
        path = compiled(source)
        function = getattr(ctypes.CDLL(str(path)), source.entry)
        function.restype = None
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_double, ctypes.c_int]
        return _Runner(job, function)


backend = CBackend()


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C compiler: CC, or the first of cc, gcc, clang."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]  # CC is make's own, not normc's
    return next((found for n in names if n and (found := shutil.which(n))), None)


# No contraction: the same expression gives the same bits in every loop it is printed in, so that an
# element still equals the maximum it was when the backward pass meets it again.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
          "-fopenmp", "-shared", "-fPIC", "-w")  # fmt: skip


@lru_cache(maxsize=1)
def compiler_version() -> str:
    """What the compiler calls itself, part of every cache key."""
    found = compiler()
    if found is None:
        raise BackendError("no C compiler found: install gcc or clang, or set CC")
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout


def _machine() -> str:
    """The processor that -march=native compiles for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = [line for line in text.splitlines() if line.startswith(("model name", "flags"))]
        return platform.machine() + "\n".join(model[:2])
    except OSError:
        return platform.machine() + platform.processor()


def compiled(source: Source) -> Path:
    """The shared object of a source, from the cache or compiled now."""
    key = cache.key(source.text, "c", compiler_version() + " ".join(_FLAGS), _machine())
    folder = cache.get_or_build(key, lambda where: _compile(source, where))
    return folder / "kernel.so"


def _compile(source: Source, folder: Path) -> None:
    path = folder / "kernel.c"
    path.write_text(source.text)
    command = [str(compiler()), *_FLAGS, "-o", str(folder / "kernel.so"), str(path), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"the C compiler refused {source.entry}:\n{done.stderr[:2000]}")
    config.debug(1, f"compiled {source.entry}")


class _Runner:
    """Calls a loaded function: pointers, strides and sizes, nothing else per call."""

    def __init__(self, job: Job, function: Any) -> None:
        self.job = job
        self.function = function
        self.real = getattr(torch, job.dtype)
        self.count = len(arguments(job))
        self.pointers = ctypes.c_void_p * self.count
        self.steps = ctypes.c_int64 * (4 * self.count)

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        program = self.job.plan.program
        x = full_input(program, tensors)
        given = {i.name: self._input(i, tensors[i.name], geometry) for i in program.inputs}
        outs = {o.name: empty(o.axes, geometry, x, self.real) for o in program.outputs}
        stats = {s.name: self._room(s, geometry) for s in program.stats}
        strides: list[int] = []
        for v in (*program.inputs, *(o.var for o in program.outputs)):
            strides += self._strides(v, (given | outs)[v.name], geometry)
        for s in program.stats:
            strides += dense_strides(s.kept, geometry)
        parts = [self._room(s, geometry, PARTS) for s in self.job.plan.carries]
        for s in self.job.plan.carries:
            strides += dense_strides(s.kept, geometry)
        every = [*given.values(), *outs.values(), *stats.values(), *parts]
        self.function(
            self.pointers(*(t.data_ptr() for t in every)),
            self.steps(*strides),
            (ctypes.c_int64 * 4)(*geometry.sizes()),
            eps,
            torch.get_num_threads(),
        )
        return outs | {name: stats[name] for name in self.job.plan.saved}

    def _input(self, i: Var, tensor: Tensor, geometry: Geometry) -> Tensor:
        if i.name in self.job.dense:
            return tensor.to(self.real).contiguous()
        return walkable(tensor.to(self.real), i.axes, geometry)

    def _strides(self, v: Var, tensor: Tensor, geometry: Geometry) -> Strides:
        if v.name in self.job.dense:
            return dense_strides(v.axes, geometry)
        found = strides_of(tensor, v.axes, geometry)
        assert found is not None, "walkable tensors have strides"
        return found

    def _room(self, stat: Stat, geometry: Geometry, times: int = 1) -> Tensor:
        n, *rest = geometry.sizes(stat.kept)
        return torch.empty((times * n, *rest), dtype=self.real)
