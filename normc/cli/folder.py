"""Folder: what a command writes in many files appears whole, in one rename, or not at all.

A folder that is there already is replaced if it is empty, or holds nothing but what an earlier
manifest names: a person's own files are never taken away unless that is asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from normc.errors import NormcError

MANIFEST = "manifest.json"


def check(folder: Path, kind: str, force: bool = False) -> Path:
    """The folder's real place; `NormcError` if it may not be written or replaced.

    ``kind`` is what the manifest of an earlier folder says it is; ``force`` replaces any folder.
    """
    with _named(folder):
        real = folder.resolve()
        if not real.parent.is_dir():
            raise NormcError(f"{folder}: there is no folder {str(real.parent)!r}")
        if not os.path.lexists(real):
            return real
        if not real.is_dir():
            raise NormcError(f"{folder} is a file: name a folder")
        here = {Path.home().resolve(), Path.cwd().resolve(), Path(__file__).resolve()}
        if any(place.is_relative_to(real) for place in here):
            raise NormcError(
                f"{folder} is a folder to work in, and would be replaced: name another"
            )
        found = {path.name for path in real.iterdir()}
        if not force and not found <= _ours(real / MANIFEST, kind):
            raise NormcError(
                f"{folder} holds other files than an earlier `normc compile` wrote: "
                "name another folder, or replace it with --force"
            )
    return real


def install(folder: Path, files: Mapping[str, bytes], kind: str, force: bool = False) -> None:
    """Write the files into a folder beside the place of theirs, and move it there."""
    real = check(folder, kind, force)
    with (
        _named(folder),
        tempfile.TemporaryDirectory(dir=real.parent, prefix=f".{real.name}-") as room,
    ):
        made, old = Path(room) / "new", Path(room) / "old"
        made.mkdir()  # unlike the room itself, as open to others as their umask says
        for name, content in files.items():
            (made / name).write_bytes(content)
        if os.path.lexists(real):
            os.rename(real, old)
        try:
            os.rename(made, real)
        except OSError:
            if old.exists():
                os.rename(old, real)
            raise


def _ours(manifest: Path, kind: str) -> set[str]:
    """The names of the files that an earlier manifest speaks of, its own included."""
    try:
        found: Any = json.loads(manifest.read_bytes())
        if isinstance(found, dict) and cast(dict[str, Any], found).get("format") == kind:
            return {MANIFEST, *_files(found)}
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        pass
    return set()


def _files(found: Any) -> Iterator[str]:
    """Whatever is called a file anywhere in a manifest."""
    if isinstance(found, list):
        for each in cast(list[Any], found):
            yield from _files(each)
    elif isinstance(found, dict):
        for key, each in cast(dict[str, Any], found).items():
            if key == "file" and isinstance(each, str):
                yield each
            else:
                yield from _files(each)


@contextmanager
def _named(folder: Path) -> Generator[None, None, None]:
    """Turn a full disk or a forbidden folder into an error of the user's."""
    try:
        yield
    except OSError as error:
        raise NormcError(f"{folder} cannot be written: {error}") from error
