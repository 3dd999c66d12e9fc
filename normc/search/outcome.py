"""Outcome: what the evaluation of a candidate comes to; a number, a rejection, or a fault.

    ok            scores, the larger the better
    quality       an accuracy below the threshold after the first steps of training
    stability     weights can be found for which gradients explode
    diverged      a loss or a score that is not finite, later on
    failed        an error of ours or of torch's, with its message
    time          took longer than the limit
    memory        wanted more memory than the limit
    crash         the worker died, with its signal

Whichever it is, it is recorded and the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "quality", "stability", "diverged", "failed", "time", "memory", "crash"]

STATUSES: tuple[Status, ...] = (
    "ok", "quality", "stability", "diverged", "failed", "time", "memory", "crash",
)  # fmt: skip
"""In the order in which a candidate may meet them."""


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate."""

    status: Status
    reason: str = ""  # in words, for all but those that are ok
    scores: tuple[
        float, ...
    ] = ()  # in the order of the setting's objectives; the larger the better
    measures: Mapping[str, float] = field(default_factory=dict[str, float])  # by the way, by name
    seconds: float = 0.0  # of evaluation

    @property
    def told(self) -> tuple[float, ...] | None:
        """What evolution is told: the scores, or None for one without."""
        return self.scores if self.status == "ok" else None
