"""Timing: calls measured in turns in one process, so that all of them meet the same machine.

round      every call once, or as often as the fastest needs to last a millisecond; all as
           often, so that none finds more of its tensors in the cache than another
order      another in each round: none always comes first, or always after the same other, whose
           tensors it would find in the cache
median     of all rounds; the spread is from the 20th to the 80th percentile
ratio      the median of the ratios within each round: a drifting clock frequency cancels
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Thunk = Callable[[], object]

LEAST = 1e-3
"""Seconds that a sample should last; much shorter ones would measure the clock."""

MOST = 0.1
"""Seconds above which no call is repeated."""

WARM_UP = 2
"""Rounds that are not counted: they fault in memory, and compile what is compiled late."""


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one sample per round, by name."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """The median time of a call in seconds."""
        return median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The 20th and the 80th percentile in seconds."""
        return quantile(self.seconds[name], 0.2), quantile(self.seconds[name], 0.8)

    def ratio(self, name: str, to: str) -> float:
        """How many times as long a call takes as another: the median over the rounds."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return median(a / b for a, b in pairs)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated.

    >>> quantile([3.0, 1.0, 2.0], 0.75)
    2.5
    """
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def order(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: rotated once in two rounds, the second of them backwards.

    >>> [order("abc", turn) for turn in range(3)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a']]
    """
    start = turn // 2 % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if turn % 2 else rotated


def interleave(
    calls: Mapping[str, Thunk],
    rounds: int,
    *,
    least: float = LEAST,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Time the calls in turns; a call returns when its work is done, as those on the CPU do."""

    def sample(name: str, repeats: int) -> float:
        call = calls[name]
        began = clock()
        for _ in range(repeats):
            call()
        return (clock() - began) / repeats

    names = list(calls)
    warm: dict[str, float] = {}
    for turn in range(WARM_UP):
        warm = {name: sample(name, 1) for name in order(names, turn)}
    repeats = _repeats(list(warm.values()), least)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in order(names, turn):
            seconds[name].append(sample(name, repeats))
    return Samples(seconds)


def _repeats(warm: Sequence[float], least: float) -> int:
    """How often a sample repeats its call, so that it is long for the fastest and not for ever
    for the slowest."""
    wanted = math.ceil(least / max(min(warm), 1e-9))
    return max(1, min(wanted, int(MOST / max(*warm, 1e-9))))
