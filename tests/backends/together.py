"""Programs of a launch that run at the same time, under Triton's interpreter: a process for each.

    with recorded() as launches:           nothing runs: what would be launched is kept
        results = run(geometry, given, eps)
    play(launches, given)                  now it runs, and `results` are what comes out

The interpreter runs programs one after the other, so none of them can wait there for another. Here
each is a forked process that runs this one program of the whole grid on tensors in shared memory;
the interpreter's atomics are the processor's own, so they hold between processes as well.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import random
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normc.backends.tile_scope import WAIT

LIMIT = 30.0  # seconds that programs have to end, before they are ended
MEETINGS = 64  # of one program that are written down


class Stuck(Exception):
    """Programs that had not ended when their time was over; they have been ended."""

    def __init__(self, programs: Sequence[int]) -> None:
        super().__init__(f"programs {list(programs)} did not end")
        self.programs = list(programs)


@dataclass(frozen=True)
class Launch:
    """One launch, as the interpreter is given it."""

    function: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]

    @property
    def waits(self) -> bool:
        """Whether its programs can wait for each other."""
        return WAIT in self.constants

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self.arguments if isinstance(t, Tensor)]

    @property
    def counters(self) -> list[Tensor]:
        return [t for t in self.tensors if t.dtype == torch.int64]

    def same(self, other: Launch) -> bool:
        """Whether this is the other one again, on the same tensors."""
        return self.function is other.function and [*map(_identity, self.arguments)] == [
            *map(_identity, other.arguments)
        ]


@dataclass(frozen=True)
class Meeting:
    """One program at one meeting; times in nanoseconds, on one clock for all processes."""

    before: int  # how many programs had come before, since the counter was zero
    came: int
    went: int


def _identity(argument: Any) -> Any:
    return (argument.data_ptr(),) if isinstance(argument, Tensor) else argument


def _interpreter() -> Any:
    return importlib.import_module("triton.runtime.interpreter")


# --- recording ------------------------------------------------------------------------------------


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Keep what is launched meanwhile instead of running it.

    The interpreter is given a launch whose programs meet again and again, for none can wait there;
    it is kept once.
    """
    kept: list[Launch] = []

    def run(
        function: Any, *arguments: Any, grid: tuple[int], warmup: bool, **constants: Any
    ) -> None:
        made = Launch(function, grid[0], arguments, constants)
        if not (made.waits and kept and made.same(kept[-1])):
            kept.append(made)

    interpreted = _interpreter().InterpretedFunction
    true, interpreted.run = interpreted.run, run
    try:
        yield kept
    finally:
        interpreted.run = true


# --- playing --------------------------------------------------------------------------------------


def play(
    launches: Sequence[Launch], given: Mapping[str, Tensor] | None = None, **how: Any
) -> list[list[list[Meeting]]]:
    """Run launches, one after the other; the meetings of each program, by launch.

    What a kernel writes is NaN before, in results and in what programs hand each other: nothing is
    left of an earlier run but the counters. ``how``: see `together`.
    """
    read = {t.data_ptr() for t in (given or {}).values()}
    for tensor in (t for launch in launches for t in launch.tensors):
        if tensor.data_ptr() not in read and tensor.is_floating_point():
            tensor.fill_(float("nan"))
    return [together(launch, **how) if launch.waits else _alone(launch) for launch in launches]


def _alone(launch: Launch) -> list[list[Meeting]]:
    launch.function[(launch.programs,)](*launch.arguments, **launch.constants)
    return []


def together(
    launch: Launch,
    *,
    wait: bool = True,
    seed: int | None = None,
    absent: Collection[int] = (),
    limit: float = LIMIT,
    meet: Any = None,
) -> list[list[Meeting]]:
    """Run all programs of a launch at once, and return the meetings of each.

    With a ``seed`` each starts late, and is held up before it reads, writes or counts. Those that
    are ``absent`` never start. ``meet`` takes the place of the kernel's own. Raises `Stuck` if any
    have not ended after ``limit`` seconds; whatever happens, no process is left behind.
    """
    shared = [t.share_memory_() for t in launch.tensors]
    assert all(t.is_shared() for t in shared)
    launch = replace(launch, constants={**launch.constants, WAIT: wait})
    context = multiprocessing.get_context("fork")
    logs = [context.RawArray(ctypes.c_int64, 1 + 3 * MEETINGS) for _ in range(launch.programs)]
    gate, started = context.Event(), dict[int, Any]()
    try:
        for p in range(launch.programs):
            if p not in absent:
                known = launch, p, _chance(seed, p), meet, logs[p], gate, limit
                child = context.Process(target=_program, args=known, daemon=True)
                child.start()
                started[p] = child
        gate.set()
        late = _late(started, limit)
    finally:
        for child in started.values():
            child.kill()  # which has no effect on one that has ended
            child.join()
    if late:
        raise Stuck(late)
    failed = [p for p, child in started.items() if child.exitcode]
    assert not failed, f"programs {failed} failed: see stderr"
    return [_meetings(log) for log in logs]


def _late(children: Mapping[int, Any], limit: float) -> list[int]:
    """The children that are still there after ``limit`` seconds."""
    end = time.monotonic() + limit
    for child in children.values():
        child.join(max(0.0, end - time.monotonic()))
    return [p for p, child in children.items() if child.is_alive()]


def _chance(seed: int | None, program: int) -> random.Random | None:
    return None if seed is None else random.Random(1000 * seed + program)


def _meetings(log: Sequence[int]) -> list[Meeting]:
    return [Meeting(*log[1 + 3 * i : 4 + 3 * i]) for i in range(log[0])]


# --- in a process of its own ----------------------------------------------------------------------


def _program(
    launch: Launch,
    program: int,
    chance: random.Random | None,
    meet: Any,
    log: Any,
    gate: Any,
    limit: float,
) -> None:
    """Run one program of a launch: in a child, where nothing that is patched has to be put back."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(limit) + 10)  # it ends itself if nobody is left to end it
    _one_of(launch.programs, program)
    builder = _interpreter().interpreter_builder
    _write_down(builder, log)
    if meet is not None:
        launch.function.fn.__globals__["meet"] = meet
    gate.wait(limit)
    if chance is not None:
        _hold_up(builder, chance)
        time.sleep(chance.uniform(0, 0.03))
    launch.function[(1,)](*launch.arguments, **launch.constants)


def _one_of(programs: int, program: int) -> None:
    """Let a grid of one be this program of so many."""
    interpreter = _interpreter()
    builder = interpreter.interpreter_builder
    dims, index = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda *_: dims(programs, 1, 1)
    builder.set_grid_idx = lambda *_: index(program, 0, 0)
    # It would copy each tensor onto itself, and undo what other programs have stored meanwhile.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


def _write_down(builder: Any, log: Any) -> None:
    """Write down every meeting: `meet` counts, by 1 and then by 0, between two barriers."""
    count, barrier = builder.create_atomic_rmw, builder.create_barrier
    here: list[tuple[int, int]] = []

    def counting(op: Any, place: Any, value: Any, *rest: Any) -> Any:
        now = time.monotonic_ns()
        found = count(op, place, value, *rest)
        if value.data.item():
            here.append((found.data.item(), now))
        return found

    def bar() -> None:
        barrier()
        if here:
            first = 1 + 3 * log[0]
            log[first : first + 3] = [*here.pop(), time.monotonic_ns()]
            log[0] += 1

    builder.create_atomic_rmw, builder.create_barrier = counting, bar


def _hold_up(builder: Any, chance: random.Random) -> None:
    """Sleep for up to 2 ms before anything that other programs may notice."""

    def held(act: Any) -> Any:
        def later(*given: Any) -> Any:
            time.sleep(chance.uniform(0, 0.002))
            return act(*given)

        return later

    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
        setattr(builder, name, held(getattr(builder, name)))
