"""C batches: many units through few runs of the compiler.

A run of the compiler costs a fixed part, which units share when they are compiled as one. Each unit
still becomes a cache entry of its own, found by its own text: the shared object is one file, linked
into the entries of all units that were compiled together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

from normc.backends import c_compiler, c_unit, cache
from normc.backends.contract import Job, Source
from normc.errors import NormcError

MOST = 16
"""Units in a batch: where more would save little of the fixed part."""


@dataclass(frozen=True)
class Unit:
    """The jobs of one formula, printed."""

    jobs: Sequence[Job]
    sources: Sequence[Source]

    @property
    def name(self) -> str:
        return self.jobs[0].name

    @property
    def text(self) -> str:
        return c_unit.unit(self.sources, self.jobs[0].dtype)


class Batches:
    """Compiles units into the cache, ``workers`` batches at a time, while more are printed.

    Leaving its ``with`` waits for all of them. What fails here is for the one who loads the unit
    to find: it is then compiled on its own, and the error is about that unit alone.
    """

    def __init__(self, workers: int, size: int) -> None:
        self._size = max(1, min(size, MOST))
        self._pool = ThreadPoolExecutor(workers, "normc-cc")
        self._waiting: dict[str, tuple[str, Unit]] = {}  # by name: cache key and unit
        self._running: list[Future[None]] = []
        self._known: set[str] = set()

    def add(self, unit: Unit) -> None:
        """Compile a unit soon, unless the cache has it."""
        key = c_compiler.key(unit.text)
        if key in self._known or cache.get(key) is not None:
            return
        self._known.add(key)
        if unit.name in self._waiting:  # another formula that is called the same
            self._start()
        self._waiting[unit.name] = key, unit
        if len(self._waiting) == self._size:
            self._start()

    def _start(self) -> None:
        batch, self._waiting = list(self._waiting.values()), {}
        if batch:
            context = copy_context()  # config.override holds in threads, too
            self._running.append(self._pool.submit(context.run, _compile, batch))

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._start()
        self._pool.shutdown()
        for done in self._running:
            error = done.exception()
            if error is not None and not isinstance(error, NormcError):
                raise error


def _compile(batch: Sequence[tuple[str, Unit]]) -> None:
    """Compile some units as one and give each its cache entry."""
    sources = [source for _, unit in batch for source in unit.sources]
    text = c_unit.unit(sources, batch[0][1].jobs[0].dtype)
    with cache.scratch() as folder:
        c_compiler.compile_into(folder, text, ", ".join(unit.name for _, unit in batch))
        for key, unit in batch:
            cache.get_or_build(key, lambda where, u=unit: _share(u, folder / "kernel.so", where))


def _share(unit: Unit, made: Path, where: Path) -> None:
    (where / "kernel.c").write_text(unit.text)
    try:
        os.link(made, where / "kernel.so")
    except OSError:  # some file systems have no links
        shutil.copyfile(made, where / "kernel.so")
