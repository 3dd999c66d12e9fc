"""The C backend: compiles the source of `normc.backends.c_source` and calls it on CPU tensors.

The system's C compiler, no header, no Python: a shared object in the cache, loaded with ctypes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normc.backends import c_compiler, c_unit
from normc.backends.c_source import arguments, copies, render, sizes, stored
from normc.backends.c_spelling import TYPES
from normc.backends.contract import Job, Run, Source
from normc.backends.memory import Strides, dense_strides, empty, full_input, strides_of, walkable
from normc.language.axes import FULL, Axis
from normc.language.expr import Var
from normc.language.geometry import Geometry
from normc.schedule.plan import Able


class CBackend:
    """Prints, compiles and loads C."""

    name = "c"
    able = Able(carry=True, keep=True)

    def why_not(self, dtype: str, device: str) -> str:
        if device != "cpu":
            return f"the C backend runs on the CPU, not on {device}"
        if dtype not in TYPES:
            return f"the C backend stores {', '.join(TYPES)}, not {dtype}"
        return "" if c_compiler.compiler() else c_compiler.NONE

    def render(self, job: Job) -> Source:
        return render(job)

    def unit(self, jobs: Sequence[Job], sources: Sequence[Source]) -> str:
        return c_unit.unit(sources, jobs[0].dtype)

    def load(self, jobs: Sequence[Job], sources: Sequence[Source]) -> list[Run]:
        path = c_compiler.compiled(self.unit(jobs, sources), jobs[0].name)
        library = ctypes.CDLL(str(path))
        return [_Runner(job, _function(library, job.entry)) for job in jobs]


def _function(library: ctypes.CDLL, entry: str) -> Any:
    function = getattr(library, entry)
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_double, ctypes.c_int, ctypes.c_int]
    return function


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
    sizes: Any  # ctypes array of N, G, K, S and the lanes of each kernel
    direct: bool  # the inputs are read where they lie: none is converted or copied
    saved: tuple[tuple[int, ...], ...]  # shapes of the statistics that are handed out
    room: int  # elements of all that is not
    offsets: tuple[int, ...]  # where each of those begins, in bytes
    threads: int
    stream: bool  # too large for the cache to keep what is stored


_LINE = 64  # bytes; what threads store starts on a line of its own


class _Runner:
    """Calls a loaded function: allocates what it stores and passes pointers, nothing else."""

    def __init__(self, job: Job, function: Any) -> None:
        program = job.plan.program
        self.job = job
        self.function = function
        self.store = getattr(torch, job.dtype)
        self.real = getattr(torch, job.wide)
        self.inputs = program.inputs
        self.outputs = [(o.name, o.axes, self._dtype(o.axes)) for o in program.outputs]
        self.pointers = ctypes.c_void_p * len(arguments(job))
        self.saved = [s.name for s in program.stats if s.name in job.plan.saved]
        self.frames: dict[Any, _Frame] = {}

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        given: list[Tensor] = [tensors[i.name] for i in self.inputs]
        key = (geometry, torch.get_num_threads(), *[(t.stride(), t.dtype) for t in given])
        frame = self.frames.get(key)
        if frame is None:
            frame = self.frames[key] = self._frame(geometry, tensors)
        if not frame.direct:
            given = self._converted(geometry, given)
        x = full_input(self.job.plan.program, tensors)
        outs = {name: empty(axes, geometry, x, dtype) for name, axes, dtype in self.outputs}
        for name, shape in zip(self.saved, frame.saved, strict=True):
            outs[name] = torch.empty(shape, dtype=self.real)
        room = torch.empty(frame.room, dtype=self.real)
        base = room.data_ptr()
        every = [t.data_ptr() for t in (*given, *outs.values())]
        every += [base + offset for offset in frame.offsets]
        self.function(
            self.pointers(*every), frame.steps, frame.sizes, eps, frame.threads, frame.stream
        )
        return outs

    def _frame(self, geometry: Geometry, tensors: Mapping[str, Tensor]) -> _Frame:
        given: list[Tensor] = [tensors[i.name] for i in self.inputs]
        used = self._converted(geometry, given)
        x = full_input(self.job.plan.program, tensors)
        steps: list[int] = []
        for i, tensor in zip(self.inputs, used, strict=True):
            steps += self._strides(i, tensor, geometry)
        for o in self.job.plan.program.outputs:
            steps += self._strides(o.var, empty(o.axes, geometry, x, self.store), geometry)
        threads = torch.get_num_threads() if x.numel() >= _GRAIN else 1
        saved, ends = [], [0]
        for s in stored(self.job):
            steps += dense_strides(s.var.axes, geometry)
            if s.times == "saved":
                saved.append(geometry.sizes(s.var.axes))
            else:
                count = copies(self.job, s, geometry, threads)
                lines = -(-count * self.real.itemsize // _LINE)
                ends.append(ends[-1] + lines * _LINE)
        lanes = sizes(self.job, geometry, threads)
        return _Frame(
            (ctypes.c_int64 * len(steps))(*steps),
            (ctypes.c_int64 * len(lanes))(*lanes),
            all(a is b for a, b in zip(given, used, strict=True)),
            tuple(saved),
            ends[-1] // self.real.itemsize,
            tuple(ends[:-1]),
            threads,
            2 * x.numel() * x.element_size() > _last_cache(),
        )

    def _dtype(self, axes: Axis) -> torch.dtype:
        """Full-size tensors are in the storage type, smaller ones as wide as the statistics."""
        return self.store if axes == FULL else self.real

    def _converted(self, geometry: Geometry, given: list[Tensor]) -> list[Tensor]:
        """The inputs in the types of the kernel, copied where their strides cannot be walked."""
        every = zip(self.inputs, given, strict=True)
        return [self._input(i, t.to(self._dtype(i.axes)), geometry) for i, t in every]

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
