"""Stopwatch: how long calls take on a device, in turns, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

Thunk = Callable[[], object]
Timer = Callable[[Mapping[str, Thunk], torch.device], Mapping[str, float]]
"""From calls by name, the microseconds that each takes on a device."""

WARM_UP, ROUNDS = 3, 15
FLUSHED = 2**28  # bytes that are written between two calls, more than any cache holds
LONGEST = 3e-3  # seconds for which a device is held up at the most


def events(calls: Mapping[str, Thunk], device: torch.device) -> dict[str, float]:
    """The median time of each call by events of a CUDA device, all of them in turns.

    The cache is emptied before each, and the device held up until the host has queued all of it.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        room = torch.empty(FLUSHED // 4, dtype=torch.int32, device=device)
        hosts = {name: min(_host(call) for _ in range(WARM_UP)) for name, call in calls.items()}
        for turn in range(ROUNDS):
            marks: dict[str, tuple[Any, Any]] = {}
            for name in turns(list(calls), turn):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                room.zero_()
                hold = min(LONGEST, 1.5 * hosts[name] + 20e-6)
                torch.cuda._sleep(int(hold * 2e9))  # pyright: ignore[reportPrivateUsage]
                start.record()
                calls[name]()
                end.record()
                marks[name] = start, end
            torch.cuda.synchronize()
            for name, (start, end) in marks.items():
                samples[name].append(1e3 * start.elapsed_time(end))
    return {name: median(values) for name, values in samples.items()}


def _host(call: Thunk) -> float:
    """The seconds that the host needs to queue a call."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def turns(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: none comes always first, or always after the same other one.

    >>> [turns("abc", turn) for turn in range(3)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a']]
    """
    start = turn // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order


TIMERS: dict[str, Timer] = {"cuda": events}
"""What measures, by the kind of device; where there is none, nothing is tuned."""
