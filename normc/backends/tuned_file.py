"""Tuned, the file: entries in JSON, which a person can read and nobody has to trust.

    {"format": ..., "about": ..., "machine": ..., "entries": [entry, ...]}

It is replaced by one rename, under a lock: a reader sees all of it, and of many who write at once
nobody's entries are lost. What is no record is set aside, and what is no entry is left out: those
that come back hold the names, texts and finite numbers that `tuned` wrote, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from normc import config
from normc.language.axes import Axis

FORMAT = "normc-tuned-1"
ABOUT = (
    "Measured by normc with NORMC_TUNE=1; delete this file to measure again. us: the median time "
    "of all kernels of a part, in microseconds; error: the largest difference from the oracle, "
    "relative to its largest number."
)
LARGEST = 2**24  # bytes of a file that is read
MOST = 4096  # entries that are kept; the oldest go first
LINE = 160  # characters up to which a value is written in one line

Entry = dict[str, Any]
"""One kernel of a job for tensors of one size."""

IDENTITY = ("part", "kernel", "dtype", "order", "sizes", "plan")
"""What no two entries have in common."""


def entries(path: Path) -> Mapping[str, Entry]:
    """What is on record, by `key`; read again only when the file has become another."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return {}
    return _known(path, (found.st_ino, found.st_mtime_ns, found.st_size))


def add(path: Path, machine: str, entry: Entry) -> None:
    """Put an entry on record, in the place of one with the same identity."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    made = _entry(entry)
    assert made is not None, "what is written can be read"
    with FileLock(path.with_suffix(".lock")):
        found = _read(path)
        if found is None:
            _set_aside(path)
        known = {**(found or {}), key(made): made}
        kept = sorted(known.values(), key=lambda e: e["date"])[-MOST:]
        record = {"format": FORMAT, "about": ABOUT, "machine": machine,
                  "entries": sorted(kept, key=_rank)}  # fmt: skip
        _replace(path, f"{_text(record)}\n")


def key(entry: Entry) -> str:
    """The identity of an entry as text."""
    return json.dumps([entry[part] for part in IDENTITY], sort_keys=True)


def _rank(entry: Entry) -> tuple[Any, ...]:
    """Where an entry stands in the file."""
    texts = {**entry, "sizes": tuple(entry["sizes"].values())}
    return tuple(texts[part] for part in ("formula", *IDENTITY))


# --- reading -------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _known(path: Path, stamp: tuple[int, ...]) -> Mapping[str, Entry]:
    found = _read(path)
    if found is None:
        with FileLock(path.with_suffix(".lock")):
            if _read(path) is None:  # nobody has written another since
                _set_aside(path)
    return found or {}


def _set_aside(path: Path) -> None:
    config.debug(1, f"{path} is no record of tuning and is set aside")
    os.replace(path, path.with_suffix(".broken"))


_SHAPE = (ValueError, TypeError, KeyError, AttributeError)
"""What is raised where JSON, or a text, is not as it was written."""


def _read(path: Path) -> dict[str, Entry] | None:
    """The entries of a file, none if there is no file; None if it is no record."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            return None
        found = [e for e in map(_entry, _is(record["entries"], list)) if e]
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, *_SHAPE):
        return None
    return {key(e): e for e in found}


def _entry(value: Any) -> Entry | None:
    """An entry with all that belongs to it and nothing else; None for what is none."""
    try:
        sizes = {str(axis.name): _is(value["sizes"][axis.name], int) for axis in Axis}
        texts = {n: sizes if n == "sizes" else _is(value[n], str) for n in ("formula", *IDENTITY)}
        best, made = value["winner"], value["versions"]
        return {
            **texts,
            "winner": None if best is None else _trial(best),
            "others": [_trial(one) for one in _is(value["others"], list)],
            "date": _is(value["date"], str),
            "versions": {name: _is(made[name], str) for name in ("normc", "torch", "triton")},
        }
    except _SHAPE:
        return None


def _trial(value: Any) -> dict[str, Any]:
    """What `tuned.Trial` says of itself."""
    launches = [_launch(one) for one in _is(value["launches"], list)]
    found = {"schedule": _is(value["schedule"], str), "launches": launches}
    if "refused" in value:
        return {**found, "refused": _is(value["refused"], str)}
    numbers = {name: _is(value[name], float) for name in ("us", "error")}
    return {**found, **numbers, "tensor": _is(value["tensor"], str)}


def _launch(value: Any) -> dict[str, Any]:
    blocks = {block: _is(n, int) for block, n in value["blocks"].items()}
    return {"blocks": blocks, "warps": _is(value["warps"], int)}


def _is(value: Any, kind: type) -> Any:
    """The value, if it is of that kind; a number that is not finite is of none."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"not {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError("not finite")
    return value


# --- writing -------------------------------------------------------------------------------------


def _replace(path: Path, text: str) -> None:
    handle, made = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(made, path)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


def _text(value: Any, indent: int = 0) -> str:
    """JSON in which a line holds as much as is easily read."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or len(line) + indent <= LINE:
        return line
    inner = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        parts = [f"{json.dumps(name)}: {_text(one, indent + 1)}" for name, one in items]
    else:
        parts = [_text(one, indent + 1) for one in cast(list[Any], value)]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}{inner}{f',{inner}'.join(parts)}{inner[:-1]}{last}"
