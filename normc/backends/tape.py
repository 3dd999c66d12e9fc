"""The tape backend: no compiler is run for a formula; one machine, compiled once, runs its plan.

A formula becomes a list of instructions in a few milliseconds. They work on blocks of elements, so
that reading them costs little: kernels take about twice as long as those of the C backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from normc.backends import c_compiler
from normc.backends.contract import Bound, Job, Run, Source, joined
from normc.backends.memory import dense_strides, empty, full_input, strides_of, walkable
from normc.backends.tape_assembler import assemble
from normc.backends.tape_code import tape
from normc.backends.tape_machine import machine
from normc.language.axes import FULL
from normc.language.expr import var
from normc.language.geometry import Geometry
from normc.language.reductions import EPS, counted
from normc.schedule.plan import PLAIN


class TapeBackend:
    """Writes tapes and runs them."""

    name = "tape"
    able = PLAIN

    def why_not(self, dtype: str, device: str) -> str:
        if device != "cpu":
            return f"the tape backend runs on the CPU, not on {device}"
        if dtype not in ("float32", "float64"):
            return f"the tape backend stores float32 and float64, not {dtype}"
        return "" if c_compiler.compiler() else c_compiler.NONE

    def render(self, job: Job) -> Source:
        heading = f"# {job.entry}: {' '.join(job.formula.split())}"
        return Source(f"{heading}\n{tape(job)}\n", job.entry, ".txt", job.dtype)

    def unit(self, jobs: Sequence[Job], sources: Sequence[Source]) -> str:
        return joined(sources)

    def load(self, jobs: Sequence[Job], sources: Sequence[Source]) -> list[Run]:
        return [_Runner(job, source.text) for job, source in zip(jobs, sources, strict=True)]


backend = TapeBackend()

_GRAIN = 32768
"""Elements below which a second thread costs more than it saves."""


@cache
def _machine(dtype: str) -> Any:
    library = ctypes.CDLL(str(c_compiler.compiled(machine(dtype), f"the machine for {dtype}")))
    pointer = ctypes.c_void_p
    library.tape.restype = None
    library.tape.argtypes = [pointer, pointer, ctypes.c_int, ctypes.c_int, *[pointer] * 3,
                             ctypes.c_int]  # fmt: skip
    return library.tape


class _Runner:
    """Calls the machine with a tape and tensors."""

    def __init__(self, job: Job, text: str) -> None:
        program = job.plan.program
        outs = [o.var for o in program.outputs]
        self.all = [v.name for v in (*program.inputs, *outs, *(s.var for s in program.stats))]
        self.job = job
        self.tape = assemble(text, {name: i for i, name in enumerate(self.all)}, job.dtype)
        self.code = (ctypes.c_int * len(self.tape.code))(*self.tape.code)
        self.function = _machine(job.dtype)
        self.real = getattr(torch, job.dtype)

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        return self.bind(geometry, tensors)(tensors, eps)

    def bind(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Bound:
        program, real = self.job.plan.program, self.real
        scalars, vectors = len(self.tape.scalars), self.tape.vectors
        function, pointers = self.function, ctypes.c_void_p * len(self.all)
        numbers = lru_cache(maxsize=16)(partial(self._numbers, geometry))
        steps, sizes = self._steps(geometry, tensors), (ctypes.c_int64 * 4)(*geometry.sizes())
        room = {s.name: geometry.sizes(s.kept) for s in program.stats}
        large = geometry.count(FULL) >= _GRAIN

        def run(tensors: Mapping[str, Any], eps: float) -> dict[str, Any]:
            given = self._given(geometry, tensors)
            x = full_input(program, tensors)
            outs = {o.name: empty(o.axes, geometry, x, real) for o in program.outputs}
            stats = {name: torch.empty(shape, dtype=real) for name, shape in room.items()}
            every = [t.data_ptr() for t in (*given, *outs.values(), *stats.values())]
            threads = torch.get_num_threads() if large else 1
            function(self.code, numbers(eps), scalars, vectors, pointers(*every),
                     steps, sizes, threads)  # fmt: skip
            return outs | {name: stats[name] for name in self.job.plan.saved}

        return run

    def _given(self, geometry: Geometry, tensors: Mapping[str, Any]) -> list[Tensor]:
        """The inputs in the storage type, copied where their strides cannot be walked."""
        given = [(i, tensors[i.name].to(self.real)) for i in self.job.plan.program.inputs]
        return [
            t.contiguous() if i.name in self.job.dense else walkable(t, i.axes, geometry)
            for i, t in given
        ]

    def _steps(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Any:
        """The strides of every tensor over N, G, K and S."""
        program = self.job.plan.program
        x = full_input(program, tensors)
        known = dict(zip(program.inputs, self._given(geometry, tensors), strict=True))
        known |= {o.var: empty(o.axes, geometry, x, self.real) for o in program.outputs}
        steps: list[int] = []
        for v, tensor in known.items():
            dense = v.name in self.job.dense
            found = dense_strides(v.axes, geometry) if dense else None
            found = found or strides_of(tensor, v.axes, geometry)
            assert found is not None, "walkable tensors have strides"
            steps += found
        for s in program.stats:
            steps += dense_strides(s.kept, geometry)
        return (ctypes.c_int64 * len(steps))(*steps)

    def _numbers(self, geometry: Geometry, eps: float) -> Any:
        """What the scalar registers hold at the start."""

        def start(value: float | str) -> float:
            if isinstance(value, str):
                return eps if value == EPS.name else geometry.count(counted(var(value)))
            return value

        values = [start(value) for value in self.tape.scalars]
        return (ctypes.c_double * len(values))(*values)
