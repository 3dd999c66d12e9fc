"""Configuration: every environment variable of normc in one table, read when asked for.

Each variable has three faces: ``NORMC_DEBUG=4`` in the environment, ``with override(debug=4):``
around a piece of code (per thread and task), and the default of its row. The table is capped at
eight rows; docs/environment.md is printed from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs

from normc.errors import NormcError


@dataclass(frozen=True, slots=True)
class Variable:
    """One row: the name in the environment, the default as a person would type it, what it does."""

    name: str
    default: str
    type: str
    doc: str
    read: Callable[[str], Any]

    @property
    def key(self) -> str:
        """What `override` calls it: ``debug`` for ``NORMC_DEBUG``."""
        return self.name.removeprefix("NORMC_").lower()


def _switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _level(text: str) -> int:
    if text not in DEBUG_LEVELS and text != "0":
        raise ValueError(text)
    return int(text)


def _folder(text: str) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


DEBUG_LEVELS = {
    "1": "compiles and cache hits",
    "2": "timings and bytes per second",
    "3": "programs",
    "4": "sources",
    "5": "plans with reasons",
}
"""What each level adds to the ones below it."""

TABLE = (
    Variable(
        "NORMC_BACKEND",
        "auto",
        "auto, c, triton, tape or torch",
        "The backend that `auto` means.",
        str.lower,
    ),
    Variable(
        "NORMC_CACHE",
        "1",
        "0 or 1",
        "Keep compiled kernels between processes; 0 gives each process a folder that ends with it.",
        _switch,
    ),
    Variable(
        "NORMC_CACHE_DIR",
        "",
        "a folder",
        "Where compiled kernels are kept; when empty, the user's cache folder of the system.",
        _folder,
    ),
    Variable(
        "NORMC_DEBUG",
        "0",
        "0 to 5",
        "What to print to stderr; each level adds to the ones below it: "
        + ", ".join(f"{level} {what}" for level, what in DEBUG_LEVELS.items())
        + ".",
        _level,
    ),
    Variable(
        "NORMC_TUNE",
        "0",
        "0 or 1",
        "At the first call of a kind, measure on the GPU under which schedule each kernel is "
        "fastest, and keep what agrees with the oracle on record; 0 measures nothing and uses the "
        "record.",
        _switch,
    ),
)

FOREIGN = {
    "CC": "The C compiler; when unset, the first of cc, gcc and clang.",
    "TRITON_INTERPRET": "Triton's own: 1 runs its kernels in Python, without a GPU.",
    "RAY_USAGE_STATS_ENABLED": "Ray's own: a search sets it to 0 where it is not set.",
}
"""Variables that belong to other tools and that normc reads where they are needed."""

_ROWS: Mapping[str, Variable] = {row.key: row for row in TABLE}
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_scope: ContextVar[Mapping[str, Any]] = ContextVar("normc.config", default=_NOTHING)


def backend() -> str:
    """The backend that "auto" means: "auto" itself leaves the choice to normc."""
    return _value("backend")


def scope() -> Mapping[str, Any]:
    """What `override` has set here: cheap to ask for, where a call depends on it."""
    return _scope.get()


def cache() -> bool:
    """Whether compiled kernels are kept between processes."""
    return _value("cache")


def cache_dir() -> Path:
    """Where compiled kernels are kept."""
    return _value("cache_dir") or Path(platformdirs.user_cache_dir("normc"))


def tune() -> bool:
    """Whether schedules are measured on the GPU."""
    return _value("tune")


def debug_level() -> int:
    """How much to print, from 0 to 5."""
    return _value("debug")


def debug(level: int, message: str | Callable[[], str]) -> None:
    """Print to stderr from ``level`` on; a function is called only if its text is printed."""
    if debug_level() < level:
        return
    text = message if isinstance(message, str) else message()
    # A text of many lines is a program or a source, and wants to be copied as it is.
    print(text if "\n" in text else f"normc: {text}", file=sys.stderr, flush=True)


@contextmanager
def override(
    *,
    backend: str | None = None,
    cache: bool | None = None,
    cache_dir: str | Path | None = None,
    debug: int | None = None,
    tune: bool | None = None,
) -> Generator[None, None, None]:
    """Give variables other values within a ``with``, or a decorated function.

    >>> with override(debug=4):
    ...     debug_level()
    4
    """
    folder = None if cache_dir is None else str(cache_dir)
    keeps, tunes = (None if switch is None else str(int(switch)) for switch in (cache, tune))
    level = None if debug is None else str(debug)
    given = {"backend": backend, "cache": keeps, "cache_dir": folder, "debug": level, "tune": tunes}
    read = {key: _read(_ROWS[key], text) for key, text in given.items() if text is not None}
    token = _scope.set({**_scope.get(), **read})
    try:
        yield
    finally:
        _scope.reset(token)


def markdown() -> str:
    """The page docs/environment.md."""
    rows = [f"| `{v.name}` | {_default(v)} | {v.type} | {v.doc} |" for v in TABLE]
    foreign = [f"| `{name}` | {doc} |" for name, doc in FOREIGN.items()]
    return "\n".join([*_HEAD, *rows, *_FOREIGN_HEAD, *foreign, ""])


def _default(row: Variable) -> str:
    return f"`{row.default}`" if row.default else "empty"


def _value(key: str) -> Any:
    scope = _scope.get()
    if key in scope:
        return scope[key]
    row = _ROWS[key]
    return _read(row, os.environ.get(row.name) or row.default)


def _read(row: Variable, text: str) -> Any:
    try:
        return row.read(text.strip())
    except (KeyError, ValueError):
        raise NormcError(f"{row.name} is {text!r}: expected {row.type}") from None


_HEAD = [
    "# Environment variables",
    "",
    "Printed from the table in `normc/config.py` by `make docs`; edit it there.",
    "",
    "| variable | default | value | what it does |",
    "|---|---|---|---|",
]

_FOREIGN_HEAD = [
    "",
    "`with normc.config.override(debug=4):` does the same for the code inside it, in one thread.",
    "An empty variable counts as unset.",
    "",
    "Variables of other tools that normc reads:",
    "",
    "| variable | what it does |",
    "|---|---|",
]
