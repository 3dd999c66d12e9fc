"""The C backend: compiles the source of `normc.backends.c_source` and calls it on CPU tensors.

The system's C compiler, no header, no Python: a shared object in the cache, loaded with ctypes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normc.backends import c_compiler
from normc.backends.c_source import PARTS, arguments, render
from normc.backends.contract import Job, Run, Source
from normc.backends.memory import Strides, dense_strides, empty, full_input, strides_of, walkable
from normc.language.axes import FULL
from normc.language.expr import Var
from normc.language.geometry import Geometry


class CBackend:
    """Prints, compiles and loads C."""

    name = "c"
    carries = True

    def why_not(self, dtype: str, device: str) -> str:
        if device != "cpu":
            return f"the C backend runs on the CPU, not on {device}"
        if dtype not in ("float32", "float64"):
            return f"the C backend stores float32 and float64, not {dtype}"
        return "" if c_compiler.compiler() else c_compiler.NONE

    def render(self, job: Job) -> Source:
        return render(job)

    def load(self, job: Job, source: Source) -> Run:
        path = c_compiler.compiled(source)
        function = getattr(ctypes.CDLL(str(path)), source.entry)
        function.restype = None
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_double, ctypes.c_int, ctypes.c_int]
        return _Runner(job, function)


backend = CBackend()

_GRAIN = 32768
"""Elements below which a second thread costs more than it saves; torch's own figure."""


@lru_cache(maxsize=1)
def _last_cache() -> int:
    """The bytes of the last level of cache, 32 MiB where the system does not say."""
    name = "SC_LEVEL3_CACHE_SIZE"
    return (os.sysconf(name) if name in os.sysconf_names else 0) or 32 * 2**20


@dataclass(frozen=True)
class _Frame:
    """What calls with tensors of the same shapes, strides and dtypes share."""

    steps: Any  # ctypes array of strides, four per tensor
    sizes: Any  # ctypes array of N, G, K, S
    direct: bool  # the inputs are read where they lie: none is converted or copied
    room: tuple[tuple[int, ...], ...]  # shapes of the statistics and parts
    threads: bool  # large enough for more than one
    stream: bool  # too large for the cache to keep what is stored


class _Runner:
    """Calls a loaded function: allocates what it stores and passes pointers, nothing else."""

    def __init__(self, job: Job, function: Any) -> None:
        program = job.plan.program
        self.job = job
        self.function = function
        self.real = getattr(torch, job.dtype)
        self.inputs = program.inputs
        self.outputs = program.outputs
        self.pointers = ctypes.c_void_p * len(arguments(job))
        self.saved = [(i, s.name) for i, s in enumerate(program.stats) if s.name in job.plan.saved]
        self.frames: dict[Any, _Frame] = {}

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        given: list[Tensor] = [tensors[i.name] for i in self.inputs]
        key = (geometry, *[(t.stride(), t.dtype) for t in given])
        frame = self.frames.get(key)
        if frame is None:
            frame = self._frame(geometry, tensors)
            self.frames[key] = frame
        if not frame.direct:
            given = self._converted(geometry, given)
        x = full_input(self.job.plan.program, tensors)
        outs = {o.name: empty(o.axes, geometry, x, self.real) for o in self.outputs}
        room = [torch.empty(shape, dtype=self.real) for shape in frame.room]
        every = [t.data_ptr() for t in (*given, *outs.values(), *room)]
        threads = torch.get_num_threads() if frame.threads else 1
        self.function(self.pointers(*every), frame.steps, frame.sizes, eps, threads, frame.stream)
        for i, name in self.saved:
            outs[name] = room[i]
        return outs

    def _frame(self, geometry: Geometry, tensors: Mapping[str, Tensor]) -> _Frame:
        given: list[Tensor] = [tensors[i.name] for i in self.inputs]
        used = self._converted(geometry, given)
        x = full_input(self.job.plan.program, tensors)
        steps: list[int] = []
        for i, tensor in zip(self.inputs, used, strict=True):
            steps += self._strides(i, tensor, geometry)
        for o in self.outputs:
            steps += self._strides(o.var, empty(o.axes, geometry, x, self.real), geometry)
        stats = [*self.job.plan.program.stats, *self.job.plan.carries]
        for s in stats:
            steps += dense_strides(s.kept, geometry)
        times = [1] * len(self.job.plan.program.stats) + [PARTS] * len(self.job.plan.carries)
        room = [(n, *geometry.sizes(s.kept)) for n, s in zip(times, stats, strict=True)]
        return _Frame(
            (ctypes.c_int64 * len(steps))(*steps),
            (ctypes.c_int64 * 4)(*geometry.sizes()),
            all(a is b for a, b in zip(given, used, strict=True)),
            tuple(shape if shape[0] > 1 else shape[1:] for shape in room),
            x.numel() >= _GRAIN,
            2 * x.numel() * x.element_size() > _last_cache(),
        )

    def _converted(self, geometry: Geometry, given: list[Tensor]) -> list[Tensor]:
        """The inputs in the storage type, copied where their strides cannot be walked."""
        every = zip(self.inputs, given, strict=True)
        return [self._input(i, t.to(self.real), geometry) for i, t in every]

    def _input(self, i: Var, tensor: Tensor, geometry: Geometry) -> Tensor:
        if i.axes != FULL:  # small, and its innermost axis is known to be contiguous
            return tensor.contiguous()
        return walkable(tensor, i.axes, geometry)

    def _strides(self, v: Var, tensor: Tensor, geometry: Geometry) -> Strides:
        if v.name in self.job.dense:
            return dense_strides(v.axes, geometry)
        found = strides_of(tensor, v.axes, geometry)
        assert found is not None, "walkable tensors have strides"
        return found
