"""GPU record: the JSON of a run as it grows, and in it what the checks have found."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import USUAL, Check
from benchmarks.gpu_pool import Answer, Budget, Task, plain
from normc.analysis.agreement import TOLERANCE

LISTED = 200
"""Failures that are listed in full; all are counted."""

HANGS = 8
"""Checks without an answer after which a schedule is not tried any more."""


class Record:
    """The JSON of a run, on disk as it grows."""

    def __init__(self, path: Path, budget: Budget, **head: Any) -> None:
        self.path, self.budget = path, budget
        self.data: dict[str, Any] = {**head, "finished": False, "seconds": 0.0}
        self._saved = float("-inf")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self, every: float = 0.0) -> None:
        """Write it, if that is longer ago than so many seconds; a reader sees all of it or none."""
        spent = self.budget.spent()
        if spent - self._saved < every:
            return
        self._saved = self.data["seconds"] = spent
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(plain(self.data), indent=1, allow_nan=False) + "\n", "utf-8")
        os.replace(fresh, self.path)


class Tally:
    """Counts, worst errors and failures."""

    def __init__(self, checks: Iterable[Check]) -> None:
        self._checks = list(checks)
        self._planned = Counter(each.group for each in self._checks)
        self._done: Counter[str] = Counter()
        self._passed: Counter[str] = Counter()
        self._ran: dict[str, Counter[str]] = {}
        self._hangs: Counter[str] = Counter()
        self._worst: dict[str, dict[str, Any]] = {}
        self._excused = 0
        self.failures: list[dict[str, Any]] = []
        self.kinks: list[dict[str, Any]] = []
        self.failed = 0
        self.seconds = 0.0
        self._next = 0

    def tasks(self) -> Iterator[Task]:
        """The checks not given out yet, without those of schedules that hang."""
        while self._next < len(self._checks):
            each = self._checks[self._next]
            self._next += 1
            if self._hangs[each.schedule] < HANGS:
                yield asdict(each)

    def take(self, task: Task, answer: Answer) -> None:
        """Count one answer."""
        each = Check(**task)
        self._done[each.group] += 1
        self._excused += answer.get("excused", 0)
        case = {"formula": each.formula, "case": each.case.show(), "schedule": each.schedule}
        for name in answer.get("ran", ()):
            self._ran.setdefault(each.group, Counter())[name] += 1
        if worst := answer.get("worst"):
            self._rank(each.dtype, case | worst)
        if why := _why(answer):
            self.failed += 1
            self._hangs[each.schedule] += each.schedule != USUAL and "no answer" in why
            if len(self.failures) < LISTED:
                self.failures.append(case | {"why": why, "error": _largest(answer)})
            return
        self._passed[each.group] += 1
        if answer.get("bad"):  # but not with other numbers
            self.kinks.append(case | answer["bad"][0])

    def _rank(self, dtype: str, found: dict[str, Any]) -> None:
        known = self._worst.get(dtype)
        if known is None or float(found["error"]) > float(known["error"]):
            self._worst[dtype] = found

    def record(self) -> dict[str, Any]:
        """All of it for the JSON."""
        done = sum(self._done.values())
        return {
            "planned": len(self._checks),
            "done": done,
            "failed": self.failed,
            "excused_tensors": self._excused,
            "tolerance": TOLERANCE,
            "worst": self._worst,
            "groups": {
                group: {
                    "planned": planned,
                    "done": self._done[group],
                    "passed": self._passed[group],
                    "ran": dict(self._ran.get(group, {})),
                }
                for group, planned in self._planned.items()
            },
            "failures": self.failures,
            "kinks": self.kinks,
            "hung": {name: count for name, count in self._hangs.items() if count},
            "left_out": {
                g: n - self._done[g] for g, n in self._planned.items() if n > self._done[g]
            },
        }


def _why(answer: Answer) -> str:
    """What is wrong with an answer; empty for nothing."""
    if "error" in answer:
        return str(answer["error"])
    reasons: list[str] = []
    if answer["bad"] and not answer["kink"]:
        names = ", ".join(f"{e['tensor']} {e['error']} (limit {e['limit']})" for e in answer["bad"])
        reasons.append(f"out of tolerance: {names}")
    if answer["differing"]:
        reasons.append(f"not the same bits each time: {', '.join(answer['differing'])}")
    return "; ".join(reasons)


def _largest(answer: Answer) -> Any:
    return max((e["error"] for e in answer.get("bad", ())), key=float, default=None)
