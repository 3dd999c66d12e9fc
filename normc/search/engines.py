"""Engines: who evaluates candidates, and what ends an evaluation that does not end well.

    Inline       this process, without limits: to debug, and for objects that cannot travel
    Local        processes of this machine, each with limits of time and memory
    RayEngine    the same on the machines of a cluster, see `normc.search.ray_engine`

An engine is given candidates and gives back one outcome for each, in whatever order they end. An
evaluation that hangs, takes too much memory or brings its process down is an outcome like others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch

from normc.errors import NormcError
from normc.search.evaluate import failure, one_thread
from normc.search.outcome import Outcome
from normc.search.setting import Limits
from normc.search.worker import Job, Unready, begin, begin_preparing, prepare, work


class Engine(Protocol):
    """Evaluates candidates, several at a time."""

    workers: int
    depth: int  # candidates that it should have at a time, so that no worker waits

    def submit(self, number: int, text: str) -> None:
        """Take a candidate, by the text of its formula; no two have the same number."""
        ...

    def finished(self, seconds: float) -> list[tuple[int, Outcome]]:
        """What has ended; if nothing has, wait so long for the next."""
        ...

    def close(self) -> None:
        """End at once what still runs."""
        ...


class Inline:
    """Evaluates in this process, one candidate whenever it is asked for what has ended."""

    workers = depth = 1

    def __init__(self, job: Job) -> None:
        self.evaluation = job.evaluation()
        self.waiting: deque[tuple[int, str]] = deque()

    def submit(self, number: int, text: str) -> None:
        self.waiting.append((number, text))

    def finished(self, seconds: float) -> list[tuple[int, Outcome]]:
        if not self.waiting:
            return []
        number, text = self.waiting.popleft()
        threads = torch.get_num_threads()
        one_thread()
        try:
            return [(number, self.evaluation(text))]
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        self.waiting.clear()


# --- workers, from outside ------------------------------------------------------------------------

MOST_STARTS = 2
"""Times that a task is given to a worker which ends before it has begun with it."""


@dataclass(frozen=True)
class Task:
    """A candidate on its way."""

    number: int
    text: str
    starts: int = 0


class Lane:
    """A process with one task at a time: whatever ends it ends that task and no other."""

    def __init__(self, job: Job, begin: Callable[[Job], None], run: Callable[[str], Any]) -> None:
        pebble = _pebble()
        context = multiprocessing.get_context("spawn")
        self.open = partial(pebble.ProcessPool, 1, 0, begin, [job], context)
        self.run, self.seconds = run, job.setting.limits.seconds
        self.pool: Any = None
        self.task: Task | None = None
        self.future: futures.Future[Any] | None = None

    def start(self, task: Task) -> None:
        """Begin with a task; `NormcError` if there can be no process."""
        try:
            if self.pool is None or not self.pool.active:
                self.close()
                self.pool = self.open()
            with _undisturbed():
                self.future = self.pool.schedule(self.run, [task.text], timeout=self.seconds)
        except Exception as error:  # of the system, or of what pickles the job
            raise NormcError(f"a worker cannot be started: {error}") from error
        self.task = replace(task, starts=task.starts + 1)

    def taken(self) -> tuple[Task, futures.Future[Any]] | None:
        """The task if it has ended; the lane is free then."""
        task, future = self.task, self.future
        if task is None or future is None or not future.done():
            return None
        self.task = self.future = None
        return task, future

    def stop(self) -> None:
        """Tell the process to end."""
        if self.pool is not None:
            self.pool.stop()

    def close(self) -> None:
        """End the process."""
        self.stop()
        if self.pool is not None:
            self.pool.join()
        self.pool = self.task = self.future = None


@contextmanager
def _undisturbed() -> Generator[None]:
    """Keep Ctrl-C from processes, and from threads that start more of them, while they begin."""
    resource_tracker.ensure_running()  # or it is begun meanwhile, and lets Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Local:
    """Evaluates in processes of this machine.

    With a GPU there are ``preparers``: processes that compile the kernels of the next candidates
    while others train; by default as many as processors are left, and candidates that may be next.
    """

    def __init__(self, job: Job, workers: int, preparers: int | None = None) -> None:
        self.workers, self.limits = workers, job.setting.limits
        self.gpu = job.setting.device != "cpu"
        if preparers is None:
            most = min(os.cpu_count() or 1, job.setting.evolution.lag) if self.gpu else 0
            preparers = max(0, most - workers)
        self.depth = workers + preparers
        self.training = [Lane(job, begin, work) for _ in range(workers)]
        self.preparing = [Lane(job, begin_preparing, prepare) for _ in range(preparers)]
        self.fresh: deque[Task] = deque()
        self.prepared: deque[Task] = deque()

    def submit(self, number: int, text: str) -> None:
        (self.fresh if self.preparing else self.prepared).append(Task(number, text))
        self._advance()

    def finished(self, seconds: float) -> list[tuple[int, Outcome]]:
        until = time.monotonic() + seconds
        while True:
            found = self._collected()
            self._advance()
            lanes = [*self.training, *self.preparing]
            running = [lane.future for lane in lanes if lane.future is not None]
            left = until - time.monotonic()
            if found or not running or left <= 0:
                return found
            futures.wait(running, left, futures.FIRST_COMPLETED)

    def close(self) -> None:
        self.fresh.clear()
        self.prepared.clear()
        for lane in (*self.training, *self.preparing):
            lane.stop()
        for lane in (*self.training, *self.preparing):
            lane.close()

    def _advance(self) -> None:
        """Give tasks to whoever is free."""
        for lane in self.preparing:
            if (ended := lane.taken()) is not None:  # or not: training shows what is wrong
                self.prepared.append(replace(ended[0], starts=0))
        for lanes, waiting in ((self.training, self.prepared), (self.preparing, self.fresh)):
            for lane in lanes:
                if waiting and lane.task is None:
                    lane.start(waiting.popleft())

    def _collected(self) -> list[tuple[int, Outcome]]:
        found: list[tuple[int, Outcome]] = []
        for lane in self.training:
            ended = lane.taken()
            if ended is None:
                continue
            task, future = ended
            outcome = ending(future, self.limits)
            if outcome is not None:
                found.append((task.number, outcome))
                if outcome.status == "crash" or (self.gpu and outcome.status == "failed"):
                    lane.close()  # a pipe may be left locked, a GPU in error: both end with it
            elif task.starts < MOST_STARTS:
                self.prepared.appendleft(task)
            else:
                raise NormcError(_STILLBORN)
        return found


def ending(future: futures.Future[Any], limits: Limits) -> Outcome | None:
    """The outcome that the end of a task is; None if no worker had begun with it."""
    error: Any = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Unready):
        raise NormcError(f"a worker cannot begin: {error}") from error
    if isinstance(error, BrokenProcessPool):
        return None
    if isinstance(error, futures.TimeoutError):
        reason = f"took longer than {limits.seconds:g} s"
        return Outcome("time", reason, seconds=limits.seconds)
    if isinstance(error, _pebble().ProcessExpired):
        return Outcome("crash", f"the worker died: {_death(error.exitcode)}")
    return failure(error)


def _death(status: int) -> str:
    """How a process has ended, by what the system says of it."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"{name}, perhaps as the system was out of memory" if name == "SIGKILL" else name


def _pebble() -> Any:
    try:
        import pebble
    except ImportError:
        raise NormcError("a search needs pebble: pip install 'normc[search]'") from None
    return pebble


_STILLBORN = (
    "workers end before they begin, see what they printed: a script that starts a search has to do "
    'so under `if __name__ == "__main__":`, and objectives have to be functions of modules that a '
    "worker can import"
)
