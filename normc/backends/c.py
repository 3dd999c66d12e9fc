"""The C backend: compiles the source of `normc.backends.c_source` and calls it on CPU tensors.

The system's C compiler, no header, no Python: a shared object in the cache, loaded with ctypes.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from normc.backends import c_compiler, c_unit
from normc.backends.c_source import arguments, copies, render, sizes, stored
from normc.backends.c_spelling import TYPES
from normc.backends.contract import Bound, Job, Run, Source
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
    """What calls with tensors of the same kind and as many threads share."""

    steps: bytes  # strides, four per tensor
    sizes: bytes  # N, G, K, S and the lanes of each kernel
    outs: tuple[tuple[str, Callable[[], Tensor]], ...]  # what is handed out, and how to allocate it
    room: int  # elements of all that is not handed out
    offsets: tuple[int, ...]  # where each of those begins, in bytes
    stream: bool  # too large for the cache to keep what is stored


def _room(like: Tensor) -> Callable[[], Tensor]:
    """What allocates a tensor like this one, whatever device is torch's default by then."""
    if like.numel() <= _LITTLE and torch.empty_like(like).stride() == like.stride():
        return partial(torch.empty_like, like)  # which has less to read than strides and dtype
    how: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return partial(torch.empty_strided, tuple(like.shape), like.stride(), **how)


class _Scratch(threading.local):
    """Memory for what is not handed out; a little of it is kept, by each thread for itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: Tensor | None = None

    def of(self, size: int) -> Tensor:
        """Room for so many elements, until the next one is asked for."""
        if self.kept is not None and self.kept.numel() >= size:
            return self.kept
        room = torch.empty(size, dtype=self.dtype, device="cpu")
        if size <= _LITTLE:
            self.kept = room
        return room


_LITTLE = 4096  # elements
_LINE = 64  # bytes; what threads store starts on a line of its own


class _Runner:
    """A loaded function: `bind` finds out once what all calls of a kind share."""

    def __init__(self, job: Job, function: Any) -> None:
        self.job = job
        self.function = function
        self.store = getattr(torch, job.dtype)
        self.real = getattr(torch, job.wide)
        self.inputs = job.plan.program.inputs
        self.pack = struct.Struct(f"{len(arguments(job))}P").pack

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        return self.bind(geometry, tensors)(tensors, eps)

    def bind(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Bound:
        given: list[Tensor] = [tensors[i.name] for i in self.inputs]
        direct = all(a is b for a, b in zip(given, self._converted(geometry, given), strict=True))
        names = [i.name for i in self.inputs]
        small = full_input(self.job.plan.program, tensors).numel() < _GRAIN
        frames: dict[int, _Frame] = {}
        function, pack, scratch = self.function, self.pack, _Scratch(self.real)

        def run(tensors: Mapping[str, Any], eps: float) -> dict[str, Any]:
            threads = 1 if small else torch.get_num_threads()
            frame = frames.get(threads)
            if frame is None:
                frame = frames[threads] = self._frame(geometry, tensors, threads)
            given: list[Tensor] = [tensors[name] for name in names]
            if not direct:
                given = self._converted(geometry, given)
            outs = {name: make() for name, make in frame.outs}
            every = [t.data_ptr() for t in given]
            every += [t.data_ptr() for t in outs.values()]
            if frame.offsets:
                room = scratch.of(frame.room)  # a name of its own keeps it until the call is over
                base = room.data_ptr()
                every += [base + offset for offset in frame.offsets]
            function(pack(*every), frame.steps, frame.sizes, eps, threads, frame.stream)
            return outs

        return run

    def _frame(self, geometry: Geometry, tensors: Mapping[str, Tensor], threads: int) -> _Frame:
        used = self._converted(geometry, [tensors[i.name] for i in self.inputs])
        x = full_input(self.job.plan.program, tensors)
        steps: list[int] = []
        for i, tensor in zip(self.inputs, used, strict=True):
            steps += self._strides(i, tensor, geometry)
        made: dict[str, Tensor] = {}
        for o in self.job.plan.program.outputs:
            made[o.name] = empty(o.axes, geometry, x, self._dtype(o.axes))
            steps += self._strides(o.var, made[o.name], geometry)
        ends = [0]
        for s in stored(self.job):
            steps += dense_strides(s.var.axes, geometry)
            if s.times == "saved":
                made[s.var.name] = torch.empty(geometry.sizes(s.var.axes), dtype=self.real)
            else:
                count = copies(self.job, s, geometry, threads)
                ends.append(ends[-1] + -(-count * self.real.itemsize // _LINE) * _LINE)
        lanes = sizes(self.job, geometry, threads)
        return _Frame(
            struct.pack(f"{len(steps)}q", *steps),
            struct.pack(f"{len(lanes)}q", *lanes),
            tuple((name, _room(t)) for name, t in made.items()),
            ends[-1] // self.real.itemsize,
            tuple(ends[:-1]),
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
