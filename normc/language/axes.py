"""Axes: every tensor is seen as (N, G, K, S), and a set of axes is one value.

N is the sample, G the group, K the channel within its group, S all spatial positions flattened.
NCHW, channels-last, (B, L, C) tokens and plain (B, C) are strides over these four axes, never code
paths. The table `AXIS_SETS` at the end of this file is what a newcomer edits to name another set.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag
from functools import cache
from typing import Any


class Axis(Flag):
    """One axis, or (combined with ``|``) a set of axes."""

    N = 1  # sample
    G = 2  # group of channels
    K = 4  # channel within its group
    S = 8  # spatial position, all of them flattened

    # Every pass asks all the time, and Flag's own operators take ten times longer.
    def __or__(self, other: Any) -> Axis:
        return _SETS[self._value_ | other._value_]

    def __and__(self, other: Any) -> Axis:
        return _SETS[self._value_ & other._value_]


_SETS = [Axis(value) for value in range(16)]

NONE = Axis(0)
CHANNEL = Axis.G | Axis.K
FULL = Axis.N | Axis.G | Axis.K | Axis.S
ORDER = (Axis.N, Axis.G, Axis.K, Axis.S)

LETTERS = {"n": Axis.N, "c": CHANNEL, "g": Axis.G, "k": Axis.K, "s": Axis.S}
"""How axes are written in a formula: ``param v[c]``, ``mean[n,s](x)``."""


@cache
def members(axes: Axis) -> tuple[Axis, ...]:
    """The single axes in a set, in the order N, G, K, S."""
    return tuple(axis for axis in ORDER if axis & axes)


def show(axes: Axis) -> str:
    """Stable text for programs and plans: ``"K S"``; the empty set is ``""``."""
    return " ".join(str(axis.name) for axis in members(axes))


def spell(axes: Axis) -> str:
    """The spelling in a formula: ``"n,s"``; G and K together are ``c``."""
    names = ["n"] if axes & Axis.N else []
    if axes & CHANNEL == CHANNEL:
        names.append("c")
    else:
        names += [str(axis.name).lower() for axis in (Axis.G, Axis.K) if axis & axes]
    return ",".join([*names, "s"] if axes & Axis.S else names)


@dataclass(frozen=True)
class AxisSet:
    """A named set of axes to reduce over: ``group`` in ``group_std(x)``."""

    name: str
    axes: Axis
    doc: str


AXIS_SETS: dict[str, AxisSet] = {
    row.name: row
    for row in (
        AxisSet("batch", Axis.N | Axis.S, "per channel, over samples and positions (BatchNorm)"),
        AxisSet("instance", Axis.S, "per sample and channel, over positions (InstanceNorm)"),
        AxisSet("group", Axis.K | Axis.S, "per sample and group of channels (GroupNorm)"),
        AxisSet("layer", CHANNEL | Axis.S, "per sample, over everything else"),
        AxisSet("channel", CHANNEL, "per position, over channels (a transformer's LayerNorm)"),
        AxisSet("batch_group", Axis.N | Axis.K | Axis.S, "per group, over samples and positions"),
        AxisSet("all", FULL, "one value for the whole tensor"),
    )
}
