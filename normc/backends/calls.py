"""Calls: a job on tensors, once all that their kind settles has been found out.

What is left for a call: take addresses, allocate results, launch. Nothing waits for the device, and
memory comes from PyTorch's allocator, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from normc.backends.contract import Bound, Job
from normc.backends.launches import ALIGNED, Launch, Room
from normc.backends.memory import full_input, result_strides, strides_of, view, walkable
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.expr import Var
from normc.language.geometry import Geometry

Start = Callable[[Sequence[Any]], None]
"""Launches one kernel on the addresses, or tensors, that it is given."""


class Machinery(Protocol):
    """What puts launches on a machine: a GPU's driver, or Triton's interpreter."""

    def only(self) -> str:
        """The one schedule that is wanted now, if one is."""
        ...

    def settle(self, kind: Kind, eps: float, aligned: bool) -> list[tuple[Launch, Start]]:
        """The launches of a job for one kind of call, compiled."""
        ...

    def hold(self, tensor: Tensor) -> Any:
        """What a kernel is given for a tensor: its address, or the tensor itself."""
        ...

    def guard(self, tensor: Tensor) -> Any:
        """What makes a tensor's device the current one; None where it is that already."""
        ...

    def stream(self, tensor: Tensor) -> int | None:
        """The stream that launches go to; None while a graph is captured."""
        ...


@dataclass(frozen=True)
class Kind:
    """All calls whose tensors have the same shapes, strides and dtypes."""

    job: Job
    geometry: Geometry
    steps: Mapping[str, tuple[int, int, int, int]]  # of full-size tensors over (N, G, K, S)
    dtypes: Mapping[str, str]  # of the tensors that users pass
    device: torch.device
    only: str = ""  # the one schedule wanted, if one is


@dataclass(frozen=True)
class _Ready:
    """What one kind of call, one eps and one alignment settle."""

    starts: tuple[tuple[Start, tuple[int, ...]], ...]  # each with the places of its tensors
    rooms: tuple[Room, ...]
    counters: tuple[Room, ...]  # of meetings: they only grow, so each stream keeps its own
    counted: dict[int, list[Tensor]]


class Runner:
    """Runs the kernels of a job, one after the other."""

    def __init__(self, job: Job, machinery: Machinery) -> None:
        self.job = job
        self.machinery = machinery
        self.wide, self.storage = getattr(torch, job.wide), getattr(torch, job.dtype)
        self.bound = lru_cache(maxsize=256)(self._bound)

    def bind(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Bound:
        program = self.job.plan.program
        x = full_input(program, tensors)
        given = tuple(
            (i, tensors[i.name].stride(), str(tensors[i.name].dtype).removeprefix("torch."))
            for i in program.inputs
        )
        return self.bound(geometry, given, x.stride(), x.device, self.machinery.only())

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        return self.bind(geometry, tensors)(tensors, eps)

    def _bound(
        self,
        geometry: Geometry,
        given: tuple[tuple[Var, tuple[int, ...], str], ...],
        like: tuple[int, ...],
        device: torch.device,
        only: str,
    ) -> Bound:
        def held(stride: tuple[int, ...]) -> Tensor:
            return torch.empty_strided(geometry.shape_of(), stride, device="meta")

        whole = {i.name: held(stride) for i, stride, _ in given if i.axes == FULL}
        walked = {name: walkable(t, FULL, geometry) for name, t in whole.items()}
        copied = {name for name, t in whole.items() if walked[name] is not t}
        written = [o.name for o in self.job.plan.program.outputs if o.axes == FULL]
        walked |= dict.fromkeys(written, held(result_strides(like, geometry)))
        steps = {name: strides_of(t, FULL, geometry) for name, t in walked.items()}
        known = {name: step for name, step in steps.items() if step is not None}
        dtypes = {i.name: dtype for i, _, dtype in given}
        kind = Kind(self.job, geometry, known, dtypes, device, only)
        prepare = [_prepare(self.job, i, stride, geometry, i.name in copied)
                   for i, stride, _ in given]  # fmt: skip
        stride = result_strides(like, geometry) if written else ()
        return _Call(kind, self.machinery, prepare, stride, (self.storage, self.wide))


Prepare = Callable[[Tensor], Tensor]
_NOTHING = nullcontext()


def _prepare(
    job: Job, i: Var, stride: tuple[int, ...], geometry: Geometry, copied: bool
) -> Prepare | None:
    """How an input becomes what kernels can walk; None if it is that already."""
    if i.axes == FULL:
        return partial(walkable, axes=FULL, geometry=geometry) if copied else None
    if i.name in job.dense:
        return Tensor.contiguous
    shape = geometry.shape_of(i.axes)
    dense = torch.empty(shape, device="meta").stride() == stride
    if dense and (i.axes in (CHANNEL, NONE) or _in_order(geometry, i.axes)):
        return None
    if i.axes in (CHANNEL, NONE):
        return Tensor.contiguous
    return lambda tensor: view(tensor, i.axes, geometry).contiguous()


def _in_order(geometry: Geometry, axes: Axis) -> bool:
    """Whether a user's tensor over ``axes`` lies in memory as one over (N, G, K, S) does."""
    order = geometry.from_unfolded(axes)
    return order == tuple(range(len(order)))


class _Call:
    """A job for one kind of call."""

    def __init__(
        self,
        kind: Kind,
        machinery: Machinery,
        prepare: Sequence[Prepare | None],
        stride: tuple[int, ...],  # of results of x's size
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.kind, self.machinery, self.stride = kind, machinery, stride
        job, geometry = kind.job, kind.geometry
        plan, program = job.plan, job.plan.program
        self.storage, self.wide = dtypes
        self.inputs = tuple(i.name for i in program.inputs)
        self.prepare = tuple((k, one) for k, one in enumerate(prepare) if one)
        self.written = tuple(o.name for o in program.outputs if o.axes == FULL)
        self.reduced = tuple(
            (o.name, geometry.unfolded(o.axes), geometry.from_unfolded(o.axes), o.axes)
            for o in program.outputs if o.axes != FULL
        )  # fmt: skip
        self.turned = tuple((n, back) for n, _, back, axes in self.reduced
                            if not _in_order(geometry, axes))  # fmt: skip
        self.kept = [s for s in program.stats if s.name in plan.saved]
        self.ready: dict[tuple[float, bool], _Ready] = {}
        self.passed = tuple((s.name, geometry.sizes(s.kept)) for s in self.kept)
        self.zero = geometry.count(FULL) == 0

    def __call__(self, tensors: Mapping[str, Any], eps: float) -> dict[str, Any]:
        given = [tensors[name] for name in self.inputs]
        for k, prepare in self.prepare:
            given[k] = prepare(given[k])
        x = tensors["x"] if "x" in tensors else full_input(self.kind.job.plan.program, tensors)
        device, wide = x.device, self.wide
        shape, stride, storage = x.shape, self.stride, self.storage
        done = {
            name: torch.empty_strided(shape, stride, dtype=storage, device=device)
            for name in self.written
        }
        room = torch.zeros if self.zero else torch.empty  # of no elements, all sums are zero
        for name, shape, _, _ in self.reduced:
            done[name] = room(shape, dtype=wide, device=device)
        for name, shape in self.passed:
            done[name] = room(shape, dtype=wide, device=device)
        if not self.zero:
            self.launch([*given, *done.values()], x, eps)
        for name, back in self.turned:
            done[name] = done[name].permute(back)
        return done

    def launch(self, tensors: list[Tensor], x: Tensor, eps: float) -> None:
        """Put the launches on the device, in order."""
        hold = self.machinery.hold
        places = [hold(t) for t in tensors]
        aligned = True
        if isinstance(places[0], int):
            low = 0
            for place in places:
                low |= place
            aligned = low % ALIGNED == 0
        ready = self.ready.get((eps, aligned)) or self.settle(eps, aligned)
        scratch = [torch.empty(one.count, dtype=self.wide, device=x.device) for one in ready.rooms]
        if ready.counters:
            scratch += self.counters(ready, x)
        places += [hold(t) for t in scratch]
        with self.machinery.guard(x) or _NOTHING:
            for start, wanted in ready.starts:
                start([places[k] for k in wanted])

    def counters(self, ready: _Ready, x: Tensor) -> list[Tensor]:
        """The counters of this stream; a captured graph has its own, and zeroes them."""
        stream = self.machinery.stream(x)
        known = ready.counted.get(stream) if stream is not None else None
        if known is None:
            known = [torch.zeros(one.count, dtype=torch.int64, device=x.device)
                     for one in ready.counters]  # fmt: skip
            if stream is not None:
                ready.counted[stream] = known
        return known

    def settle(self, eps: float, aligned: bool) -> _Ready:
        """Compile what is launched, and find out the places of its tensors."""
        launches = self.machinery.settle(self.kind, eps, aligned)
        every = self.rooms([launch for launch, _ in launches])
        counters = tuple(room for room in every if room.dtype == "int64")
        rooms = tuple(room for room in every if room.dtype != "int64")
        names = [
            *self.inputs, *self.written, *(name for name, *_ in self.reduced),
            *(name for name, _ in self.passed), *(room.name for room in (*rooms, *counters)),
        ]  # fmt: skip
        places = {name: k for k, name in enumerate(names)}
        starts = tuple((start, tuple(places[t] for t in one.tensors)) for one, start in launches)
        self.ready[eps, aligned] = ready = _Ready(starts, rooms, counters, {})
        return ready

    def rooms(self, launches: Sequence[Launch]) -> tuple[Room, ...]:
        """Scratch memory, and statistics that only go from one kernel to another."""
        own = {room.name: room for launch in launches for room in launch.rooms}
        known = {*self.inputs, *self.written, *(n for n, *_ in self.reduced), *own}
        known |= {name for name, _ in self.passed}
        passed = {name for launch in launches for name in launch.tensors} - known
        stats = self.kind.job.plan.program.stats
        sizes = {s.name: self.kind.geometry.count(s.kept) for s in stats}
        return (*own.values(), *(Room(n, sizes[n], self.kind.job.wide) for n in sorted(passed)))
