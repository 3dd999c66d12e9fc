"""GPU timing: calls measured in turns with events of the device, and in graphs without the host.

turn       every contestant once, forward and backward, in an order that changes, see
           `normc.analysis.timing`; between two measurements a write of 256 MB empties the L2 cache
event      what is timed is the device alone: it is kept busy until the host has queued all of a
           pass, so that a slow host leaves no gaps
graph      the same kernels captured once for several sets of tensors and replayed, for sizes at
           which launches count: no two calls after each other find their tensors in the cache
host       seconds per call of many calls that nobody waits for

The write leaves the cache full of what has to be written back, as a kernel before would: what a
kernel leaves in the cache itself, it thereby pays for. Triton's `do_bench` does the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu_rows import BACKWARD, FORWARD
from normc.analysis.timing import order, quantile

Clock = Callable[[], float]


class Event(Protocol):
    """A mark in the device's queue."""

    def record(self) -> None: ...
    def elapsed_time(self, other: Any, /) -> float: ...


class Device(Protocol):
    """What timing needs of a device; a test has one of its own."""

    def event(self) -> Event: ...
    def synchronize(self) -> None: ...
    def flush(self) -> None: ...
    def hold(self, seconds: float) -> None: ...


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self._room = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MB

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._room.zero_()

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * 2e9))  # cycles of a clock of 2 GHz at the most


@dataclass(frozen=True)
class Contestant:
    """What is timed: a forward pass, and a backward pass of what it returns."""

    name: str
    forward: Callable[[], tuple[Tensor, ...]]
    backward: Callable[[tuple[Tensor, ...]], tuple[Tensor | None, ...]] | None = None


Milliseconds = dict[str, list[float]]  # of each pass, one sample per turn

LONGEST = 3e-3
"""Seconds for which the device is held at the most."""


def race(
    contestants: Sequence[Contestant], device: Device, seconds: float, clock: Clock = time.monotonic
) -> tuple[dict[str, Milliseconds], dict[str, str]]:
    """The samples of every contestant in about so many seconds, and why some did not run."""
    hosts: dict[str, Mapping[str, float]] = {}
    failed: dict[str, str] = {}
    for each in contestants:
        try:
            for _ in range(3):  # the first call compiles, the second may
                hosts[each.name] = _host(each, device, clock)
            read = _turn(each, hosts[each.name], device)
            device.synchronize()
            read()
        except Exception as error:
            failed[each.name] = reason(error)
    runners = {c.name: c for c in contestants if c.name not in failed}
    samples: dict[str, Milliseconds] = {name: {} for name in runners}
    began, turn = clock(), 0
    while runners and turn < MOST and (turn < LEAST or clock() - began < seconds):
        reads = {n: _turn(runners[n], hosts[n], device) for n in order(list(runners), turn)}
        device.synchronize()
        for name, read in reads.items():
            for part, took in read().items():
                samples[name].setdefault(part, []).append(took)
        turn += 1
    return samples, failed


LEAST, MOST = 8, 100
"""Turns, whatever the time."""


def _host(each: Contestant, device: Device, clock: Clock) -> dict[str, float]:
    """The seconds that the host needs to queue each pass."""
    device.synchronize()
    began = clock()
    value = each.forward()
    seconds = {FORWARD: clock() - began}
    device.synchronize()
    if each.backward is not None:
        began = clock()
        each.backward(value)
        seconds[BACKWARD] = clock() - began
    device.synchronize()
    return seconds


def _turn(
    each: Contestant, host: Mapping[str, float], device: Device
) -> Callable[[], dict[str, float]]:
    """Queue both passes; the function returned reads the times once the device is done."""
    marks: dict[str, tuple[Event, Event]] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        start, end = device.event(), device.event()
        device.flush()
        device.hold(min(LONGEST, 1.5 * host[part] + 20e-6))
        start.record()
        value = call()
        end.record()
        marks[part] = start, end
        return value

    value = timed(FORWARD, each.forward)
    backward = each.backward
    if backward is not None:
        timed(BACKWARD, lambda: backward(value))
    return lambda: {part: start.elapsed_time(end) for part, (start, end) in marks.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in microseconds from milliseconds."""
    low, high = quantile(values, 0.2), quantile(values, 0.8)
    return {"us": 1e3 * median(values), "p20": 1e3 * low, "p80": 1e3 * high}


def host_times(
    each: Contestant, device: Device, calls: int = 200, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Microseconds of the host per call: forward without autograd, and forward with backward."""

    def run() -> None:
        with torch.no_grad():
            each.forward()

    def both() -> None:
        value = each.forward()
        if each.backward is not None:
            each.backward(value)

    found: dict[str, float] = {}
    for name, call in (("forward", run), ("both", both)):
        call()  # `torch.compile` compiles once more without autograd
        samples: list[float] = []
        for _ in range(7):
            device.synchronize()
            began = clock()
            for _ in range(calls):
                call()
            samples.append((clock() - began) / calls)
        found[name] = 1e6 * median(samples)
    device.synchronize()
    return found


# --- graphs --------------------------------------------------------------------------------------


def replays(sets: Sequence[Contestant]) -> tuple[dict[str, dict[str, float]], bool]:
    """The times of a call in a graph that calls each set once, and whether its results are, bit for
    bit, those of a call without a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Backward runs on the stream of its forward, so both are on the one that is captured.
        for each in sets[:2]:
            value = each.forward()
            if each.backward is not None:
                each.backward(value)
            del value
        samples, made = _replay(lambda: [each.forward() for each in sets], stream)
        found = {FORWARD: summary([t / len(sets) for t in samples])}
        same = all(map(torch.equal, made, sets[0].forward()))
        if sets[0].backward is not None:
            pairs = [(each.backward, each.forward()) for each in sets]
            samples, _ = _replay(lambda: [run(value) for run, value in pairs if run], stream)
            found[BACKWARD] = summary([t / len(sets) for t in samples])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return found, same


def _replay(
    work: Callable[[], list[tuple[Tensor | None, ...]]], stream: Any, times: int = 30
) -> tuple[list[float], list[Tensor]]:
    """Milliseconds of each replay, and what the last has computed for the first set."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        made = work()  # held, so that no two calls write to the same memory
    for _ in range(3):
        graph.replay()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    copies = [t.detach().clone() for t in made[0] if t is not None]  # the graph takes its memory
    return [start.elapsed_time(end) for start, end in marks], copies


def reason(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]
