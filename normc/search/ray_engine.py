"""RayEngine: candidates evaluated on the machines of a Ray cluster, or by Ray on this one.

    driver    the process that searches: this file
    keeper    an actor of Ray's, one for each worker, on whatever machine has room
    worker    the process that evaluates: a child of its keeper, as it would be of `Local`

So limits of time and memory, and what becomes of an evaluation that does not end well, are the same
as without Ray. A keeper never evaluates: if one dies, its machine has failed and not the candidate,
which is given to another.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from normc.errors import NormcError
from normc.search.engines import Local, Task
from normc.search.outcome import Outcome
from normc.search.worker import Job

MOST_LIVES = 3
"""Keepers that may die over one candidate, or in a row before they are ready."""

TICK = 60.0
"""Seconds after which a keeper looks again at its worker; of no account for what comes out."""


class Keeper:
    """Has one worker on the machine it runs on."""

    def __init__(self, job: Job) -> None:
        self.local = Local(job, 1, 0)

    def versions(self) -> dict[str, str]:
        """What it would evaluate with."""
        return versions()

    def evaluate(self, text: str) -> Outcome:
        """The outcome for a formula."""
        self.local.submit(0, text)
        while not (found := self.local.finished(TICK)):
            pass
        return found[0][1]


@dataclass
class Seat:
    """A keeper as the driver sees it."""

    keeper: Any
    call: Any  # its answer to come: its versions first, then outcomes; None: it is free
    ready: bool = False
    task: Task | None = None


class RayEngine:
    """Evaluates on a cluster; without an address, on one of this machine that ends with it."""

    def __init__(self, job: Job, workers: int, address: str | None) -> None:
        self.ray = _ray()
        _check(job)
        self.workers = self.depth = workers
        self.ours = not self.ray.is_initialized()
        if self.ours:
            self._connect(address)
        self.job = self.ray.put(job)
        share = 0 if job.setting.device == "cpu" else 1
        self.actor = self.ray.remote(num_cpus=1, num_gpus=share, max_restarts=0)(Keeper)
        self.waiting: deque[Task] = deque()
        self.deaths = 0  # of keepers that were not ready yet, in a row
        self.seats = [self._seat() for _ in range(workers)]

    def submit(self, number: int, text: str) -> None:
        self.waiting.append(Task(number, text))
        self._advance()

    def finished(self, seconds: float) -> list[tuple[int, Outcome]]:
        until = time.monotonic() + seconds
        while True:
            found = self._collected()
            self._advance()
            busy = self.waiting or any(seat.task for seat in self.seats)
            left = until - time.monotonic()
            if found or not busy or left <= 0:
                return found
            self.ray.wait(self._calls, timeout=left)

    def close(self) -> None:
        self.waiting.clear()
        seats, self.seats = self.seats, []
        if self.ray.is_initialized():  # else every call would begin a session
            for seat in seats:
                self.ray.kill(seat.keeper)
            if self.ours:
                self.ray.shutdown()

    def _connect(self, address: str | None) -> None:
        how: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a search tells nobody of itself
            how |= {"num_cpus": self.workers, "include_dashboard": False}
        try:
            _knock(address or "")
            self.ray.init(address or "local", **how)
        except Exception as error:  # of many kinds
            raise NormcError(
                f"Ray is not reached at {address or 'this machine'}: {error}"
            ) from error

    def _seat(self) -> Seat:
        keeper = self.actor.remote(self.job)
        return Seat(keeper, keeper.versions.remote())

    def _advance(self) -> None:
        """Give tasks to keepers that are free."""
        for seat in self.seats:
            if self.waiting and seat.ready and seat.call is None:
                seat.task = self.waiting.popleft()
                seat.call = seat.keeper.evaluate.remote(seat.task.text)

    @property
    def _calls(self) -> list[Any]:
        return [seat.call for seat in self.seats if seat.call is not None]

    def _collected(self) -> list[tuple[int, Outcome]]:
        """What the answers come to that are there."""
        calls = self._calls
        done, _ = self.ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        ended = [seat for seat in self.seats if seat.call in done]
        return [found for seat in ended if (found := self._ended(seat)) is not None]

    def _ended(self, seat: Seat) -> tuple[int, Outcome] | None:
        """What an answer comes to."""
        errors, task = self.ray.exceptions, seat.task
        try:
            answer = self.ray.get(seat.call)
        except errors.RayActorError as error:
            return self._died(seat, error)
        except errors.RayTaskError as error:
            raise NormcError(str(error.cause)) from error
        seat.call = seat.task = None
        self.deaths = 0
        if task is not None:
            return task.number, answer
        seat.ready = True
        _compare(answer)
        return None

    def _died(self, seat: Seat, error: Exception) -> tuple[int, Outcome] | None:
        """Put another keeper in the place of one that died, and let the candidate go to any."""
        task = seat.task
        self.ray.kill(seat.keeper)  # it may only be out of reach
        self.seats[self.seats.index(seat)] = self._seat()
        if task is None:
            self.deaths += not seat.ready
            if self.deaths >= MOST_LIVES:
                raise NormcError(f"no worker can begin on the cluster: {error}") from error
            return None
        if task.starts + 1 < MOST_LIVES:
            self.waiting.appendleft(Task(task.number, task.text, task.starts + 1))
            return None
        return task.number, Outcome(
            "crash", f"{MOST_LIVES} machines failed while they evaluated it"
        )


def _knock(address: str) -> None:
    """Raise `OSError` if nobody answers, which Ray itself finds out in five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def versions() -> dict[str, str]:
    """What outcomes depend on beside the job; for which device torch was built is left out."""
    return {"normc": version("normc"), "torch": torch.__version__.partition("+")[0]}


def _compare(theirs: dict[str, str]) -> None:
    """Raise `NormcError` for a machine that would judge by other programs."""
    for name, here in versions().items():
        if theirs[name] != here:
            raise NormcError(f"a machine of the cluster has {name} {theirs[name]}, this one {here}")


def _check(job: Job) -> None:
    """Raise `NormcError` for objectives that only this process can import."""
    for objective in job.objectives:
        if getattr(objective.measure, "__module__", "") == "__main__":
            raise NormcError(
                f"the objective `{objective.name}` is of the script itself: put it into a module, "
                "which workers on other machines can import"
            )


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise NormcError("a search on a cluster needs Ray: pip install 'normc[ray]'") from None
    return ray
