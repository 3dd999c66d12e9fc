"""GPU pool: worker processes that are given tasks, under a budget of time.

What runs on the device may hang, or leave the device unusable for its process: a worker that does
not answer, or dies, is replaced by a new one, and the rest of the run goes on. The process that
asks never touches the device. Task and answer are a line of JSON each:

    -> {"kind": "check", ...}        what a worker can do is a table of functions by kind
    <- {...}                         or {"error": "..."} for what was raised
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]

Task = Mapping[str, Any]
Answer = dict[str, Any]
Clock = Callable[[], float]
Take = Callable[[Task, Answer], None]


class Budget:
    """Seconds that are left of those given."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.began = clock()
        self.end = self.began + seconds

    def left(self) -> float:
        """Seconds that remain; negative when it is over."""
        return self.end - self._clock()

    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.began

    def share(self, part: float) -> Budget:
        """A part of what is left."""
        return Budget(max(0.0, part * self.left()), self._clock)

    def before(self, seconds: float) -> Budget:
        """All of it but the last seconds."""
        return Budget(max(0.0, self.left() - seconds), self._clock)


class GoneError(Exception):
    """A worker that died or did not answer in time."""


class StartError(GoneError):
    """A worker that does not even start."""


class Worker:
    """A process that does one task at a time, started anew where the last one is gone."""

    def __init__(self, command: list[str], patience: float = 120.0) -> None:
        self._command = command
        self._patience = patience  # seconds in which it has to be ready
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None  # what it prints there
        self._ask = threading.Lock()

    def ask(self, task: Task, seconds: float) -> Answer:
        """The answer to a task; `GoneError` where none comes within so many seconds."""
        with self._ask:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
            except OSError as error:
                raise self._gone(f"could not be asked: {error}") from None
            answer = self._read(process, seconds)
            if answer.pop("poisoned", False):  # the device refuses this process from now on
                self.close()
            return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # the driver may hold on to it for a while
            process.wait(10)
        for pipe in (process.stdin, process.stdout, self._errors):
            if pipe is not None:
                with suppress(OSError):  # what it was asked may not have been read
                    pipe.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, see close
            # One compiler per worker: there are as many workers as the machine has room for.
            environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | os.environ
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            try:
                self._read(self._process, self._patience)  # "ready"
            except GoneError as error:
                raise StartError(f"does not start: {error}") from None
        return self._process

    def _read(self, process: subprocess.Popen[str], seconds: float) -> Answer:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, seconds))
        if not ready:
            raise self._gone(f"no answer in {seconds:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise self._gone(f"died: {self._last_words()}")
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise self._gone(f"answered {line[:100]!r}") from None

    def _gone(self, why: str) -> GoneError:
        self.close()
        return GoneError(why)

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return " | ".join(lines[-3:])[:500] or "without a word"


def share_out(
    tasks: Iterable[Task],
    workers: list[Worker],
    budget: Budget,
    patience: Callable[[Task], float],
    take: Take,
) -> list[Task]:
    """Give workers tasks, in order, until there are no more or no time; those that were cut off.

    ``take`` is called with each task and its answer, one at a time. What has not been begun stays
    in ``tasks``.
    """
    queue, lock = iter(tasks), threading.Lock()
    unanswered: list[Task] = []

    def work(worker: Worker) -> None:
        while True:
            with lock:
                task = next(queue, None) if budget.left() > 0 else None
            if task is None:
                return
            try:
                answer = worker.ask(task, min(patience(task), budget.left() + GRACE))
            except GoneError as error:
                hopeless = isinstance(error, StartError)
                if hopeless or budget.left() <= 0:  # it was not given the time it needs
                    with lock:
                        unanswered.append(task)
                    return
                answer = {"error": f"worker: {error}"}
            with lock:
                take(task, answer)

    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return unanswered


GRACE = 5.0
"""Seconds that a task may take beyond the end of the budget."""


# --- in the worker -------------------------------------------------------------------------------


def serve(kinds: Mapping[str, Callable[[Task], Answer]], poisoned: Callable[[], bool]) -> None:
    """Answer the tasks on standard input until it ends."""
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in _ready(answers):
        task = json.loads(line)
        try:
            answer = kinds[task["kind"]](task)
        except Exception as error:
            text = (str(error).strip() or type(error).__name__)[:1000]
            answer = {"error": f"{type(error).__name__}: {text}", "poisoned": poisoned()}
        print(json.dumps(plain(answer)), file=answers, flush=True)


def _ready(answers: Any) -> Iterator[str]:
    print("{}", file=answers, flush=True)
    yield from sys.stdin


def plain(value: Any) -> Any:
    """A value as JSON has it: floats with four digits, and those that are no number as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value
