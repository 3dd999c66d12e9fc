"""The cache: compiled artefacts on disk, found again by what they were made from.

An entry is a folder named by its key. It holds its files and a manifest with the sha256 of each. It
appears by one rename of a whole folder, so a reader sees all of it or nothing, and it is verified
each time it is asked for. The folder of all entries is the user's alone. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache as once
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from normc import config
from normc.errors import CacheError

_FORMAT = "normc-cache-1"  # part of every key: a new layout never meets an old entry
_MANIFEST = "manifest.json"
_LOCKS = "locks"
_SCRATCH = "scratch"
_ABANDONED = 3600.0  # seconds after which the temporary folder of a killed writer is swept away
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # forbidden
    *(errno.ENOSPC, errno.EDQUOT),  # full
    *(errno.EEXIST, errno.ENOTDIR),  # a file stands where a folder should
}


def key(source: str, backend: str, compiler: str, machine: str) -> str:
    """The name of an entry: sha256 of everything its files depend on, each field with its length.

    >>> key("a", "bc", "", "") == key("ab", "c", "", "")
    False
    """
    digest = hashlib.sha256()
    for field in (_FORMAT, source, backend, compiler, machine):
        data = field.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def directory() -> Path:
    """The folder of all entries, made if missing; `CacheError` unless it is the user's alone."""
    if not config.cache():
        return _private(os.getpid())
    root = config.cache_dir()
    with _named(root):
        if not os.path.lexists(root):
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir(mode=0o700, exist_ok=True)
        _check_owner(root)
    return root


def get(key: str) -> Path | None:
    """The folder of an entry, or None; an entry that does not verify is removed and is a miss."""
    folder = _place(directory(), key)
    with _named(folder.parent):
        if _verified(folder):
            return folder
        if os.path.lexists(folder):
            with _lock(folder):
                if _verified(folder):  # someone has just mended it
                    return folder
                _discard(folder)
    return None


def put(key: str, files: Mapping[str, bytes | Path]) -> Path:
    """Store files, given as bytes or as paths to copy; an entry that is there already stays."""

    def build(folder: Path) -> None:
        for name, content in files.items():
            _check_name(name)
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)

    return get_or_build(key, build)


def get_or_build(key: str, build: Callable[[Path], None]) -> Path:
    """The folder of an entry; a missing one is made by ``build`` in a folder it is given.

    Of many processes that ask at once, one builds and the others wait for it. Whatever ``build``
    raises leaves no entry behind.
    """
    folder = _place(directory(), key)
    with _named(folder.parent):
        if _verified(folder):
            config.debug(1, f"cache hit {key[:12]}")
            return folder
        with _lock(folder):
            if not _verified(folder):
                _discard(folder)
                _sweep(folder)
                _install(folder, build)
    return folder


@contextmanager
def scratch() -> Generator[Path, None, None]:
    """A folder for what becomes part of several entries; it is removed in the end."""
    root = directory()
    with _named(root):
        _sweep(root / _SCRATCH)
        made = Path(tempfile.mkdtemp(prefix=_temporary(root / _SCRATCH), dir=root))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _install(folder: Path, build: Callable[[Path], None]) -> None:
    made = Path(tempfile.mkdtemp(prefix=_temporary(folder), dir=folder.parent))
    try:
        build(made)
        (made / _MANIFEST).write_text(json.dumps(_manifest(made), indent=1, sort_keys=True))
        os.rename(made, folder)
    except OSError:
        # Where locks do not work (some network file systems) two may build: the first rename wins.
        if not _verified(folder):
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, str]:
    paths = sorted(folder.iterdir())
    for path in paths:
        _check_name(path.name)
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CacheError(f"a cache entry holds plain files only, not `{path.name}`")
    return {path.name: _digest(path) for path in paths}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _verified(folder: Path) -> bool:
    """Whether every file is as its manifest says; files it does not name are of no account."""
    try:
        if folder.is_symlink():
            return False
        manifest: Any = json.loads((folder / _MANIFEST).read_bytes())
        return isinstance(manifest, dict) and all(
            _plain(name) and not (folder / name).is_symlink() and _digest(folder / name) == digest
            for name, digest in cast(dict[str, object], manifest).items()
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return False


def _discard(folder: Path) -> None:
    """Take an entry away: out of sight in one rename, then its files; call it under its lock."""
    if not os.path.lexists(folder):
        return
    config.debug(1, f"cache entry {folder.name[:12]} is damaged and goes")
    grave = Path(tempfile.mkdtemp(prefix=_temporary(folder), dir=folder.parent))
    os.rename(folder, grave / "entry")
    shutil.rmtree(grave, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what writers of this entry left when they were killed."""
    for left in folder.parent.glob(_temporary(folder) + "*"):
        if time.time() - left.lstat().st_mtime > _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _temporary(folder: Path) -> str:
    return f"tmp-{folder.name[:16]}-"


@contextmanager
def _lock(folder: Path) -> Generator[None, None, None]:
    locks = folder.parent / _LOCKS
    locks.mkdir(mode=0o700, exist_ok=True)
    with FileLock(locks / f"{folder.name}.lock"):
        yield


def _place(root: Path, key: str) -> Path:
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise CacheError(f"not a cache key: {key[:80]!r}")
    return root / key


def _plain(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.+-]*", name, re.ASCII)) and name != _MANIFEST


def _check_name(name: str) -> None:
    if not _plain(name):
        raise CacheError(f"not a name for a file in the cache: {name[:80]!r}")


def _check_owner(root: Path) -> None:
    """Refuse a folder that someone else could have put code into."""
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(_refusal(root, "is a symbolic link or not a folder"))
    if sys.platform == "win32":  # its permissions are not in the mode
        return
    if found.st_uid != os.geteuid():
        raise CacheError(_refusal(root, f"belongs to user {found.st_uid}, not to you"))
    if found.st_mode & 0o022:
        raise CacheError(_refusal(root, f"can be written by others (try chmod 700 {root})"))


def _refusal(root: Path, why: str) -> str:
    return (
        f"the cache folder {root} {why}; set NORMC_CACHE_DIR to a folder of your own, "
        "or NORMC_CACHE=0 to keep nothing"
    )


@contextmanager
def _named(root: Path) -> Generator[None, None, None]:
    """Turn a full disk or a forbidden folder into an error that says what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED:
            raise CacheError(_refusal(root, f"cannot be used: {error}")) from error
        raise


@once
def _private(process: int) -> Path:
    """A folder for one process, removed at its end; a forked child makes its own."""
    folder = Path(tempfile.mkdtemp(prefix=f"normc-{process}-"))
    # Unlike atexit, it runs at the end of multiprocessing's children, and in this process only.
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0)
    return folder
