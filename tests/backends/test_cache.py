"""The cache under races, damage, strangers and full disks."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from normc import config
from normc.backends import cache
from normc.errors import CacheError, NormcError

KEY = cache.key("source", "c", "cc 1", "x86")
OTHER = cache.key("source", "c", "cc 2", "x86")
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture(autouse=True)
def root(tmp_path: Path) -> Iterator[Path]:
    with config.override(cache_dir=tmp_path / "cache", cache=True):
        yield tmp_path / "cache"


def entries(root: Path) -> list[str]:
    """What a reader can see: everything but the locks."""
    return sorted(p.name for p in root.iterdir() if p.name != "locks")


def never(folder: Path) -> None:
    raise AssertionError("built again")


def writing(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "kernel.c").write_text(text)

    return build


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_is_a_whole_sha256() -> None:
    assert len(KEY) == 64 and int(KEY, 16)
    assert KEY == cache.key("source", "c", "cc 1", "x86")


def test_fields_do_not_run_together() -> None:
    """KeOps found ('a', 'bc') in the place of ('ab', 'c')."""
    cuts = itertools.combinations_with_replacement(range(5), 3)
    fields = {("abcd"[:i], "abcd"[i:j], "abcd"[j:k], "abcd"[k:]) for i, j, k in cuts}
    assert len({cache.key(*parts) for parts in fields}) == len(fields) == 35


def test_every_field_counts_and_any_text_will_do() -> None:
    fields = ["source", "c", "cc 1", "x86"]
    changed = [cache.key(*(f + "!" * (i == j) for j, f in enumerate(fields))) for i in range(4)]
    assert len({KEY, *changed}) == 5
    assert cache.key("\0σ\ud800", "", "", "") != cache.key("\0σ", "", "", "")


@pytest.mark.parametrize("key", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 64 + "\n"])
def test_what_is_no_key_touches_nothing(root: Path, key: str) -> None:
    for call in (cache.get, lambda k: cache.put(k, {}), lambda k: cache.get_or_build(k, never)):
        with pytest.raises(CacheError, match="not a cache key"):
            call(key)
    assert entries(root) == []


# --- in and out -----------------------------------------------------------------------------------


def test_put_and_get(root: Path, tmp_path: Path) -> None:
    object_file = tmp_path / "made.so"
    object_file.write_bytes(b"\x7fELF")
    assert cache.get(KEY) is None
    folder = cache.put(KEY, {"kernel.c": b"int x;", "kernel.so": object_file})
    assert folder == cache.get(KEY) == root / KEY
    assert (folder / "kernel.c").read_bytes() == b"int x;"
    assert (folder / "kernel.so").read_bytes() == b"\x7fELF"
    assert cache.get(OTHER) is None
    assert entries(root) == [KEY]


def test_the_first_entry_stays() -> None:
    cache.put(KEY, {"kernel.c": b"first"})
    assert (cache.put(KEY, {"kernel.c": b"second"}) / "kernel.c").read_bytes() == b"first"


def test_get_or_build_builds_once(root: Path) -> None:
    folder = cache.get_or_build(KEY, writing("text"))
    assert cache.get_or_build(KEY, never) == folder == cache.get(KEY)
    assert entries(root) == [KEY]


def test_the_manifest_is_json_with_digests() -> None:
    folder = cache.put(KEY, {"b": b"", "a": b"1"})
    assert json.loads((folder / "manifest.json").read_text()) == {
        "a": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
        "b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".", "..", ".hidden", "manifest.json", "a\n"])
def test_an_odd_name_for_a_file_is_refused(root: Path, name: str) -> None:
    with pytest.raises(CacheError, match="not a name for a file"):
        cache.put(KEY, {name: b""})
    assert entries(root) == []


def test_folders_and_links_in_an_entry_are_refused(root: Path) -> None:
    for make in (lambda f: (f / "sub").mkdir(), lambda f: (f / "link").symlink_to("/etc/passwd")):
        with pytest.raises(CacheError, match="plain files only"):
            cache.get_or_build(KEY, make)
    assert entries(root) == []


def test_what_a_build_raises_goes_through_and_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise NormcError("the compiler refused")

    with pytest.raises(NormcError, match="the compiler refused"):
        cache.get_or_build(KEY, fail)
    assert entries(root) == [] and cache.get(KEY) is None
    assert cache.get_or_build(KEY, writing("now it works"))


def test_a_warm_hit_is_fast() -> None:
    cache.put(KEY, {"kernel.c": b"x" * 20_000, "kernel.so": b"y" * 50_000})
    times: list[float] = []
    for _ in range(50):
        began = time.perf_counter()
        assert cache.get(KEY)
        times.append(time.perf_counter() - began)
    assert min(times) < 2e-3


# --- damage ---------------------------------------------------------------------------------------


def _flip(folder: Path) -> None:
    (folder / "kernel.c").write_bytes(b"int evil;")


def _truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-5])


def _link(folder: Path) -> None:
    path = folder / "kernel.c"
    path.rename(folder.parent.parent / "elsewhere")
    path.symlink_to(folder.parent.parent / "elsewhere")


def _escape(folder: Path) -> None:
    (folder.parent.parent / "secret").write_bytes(b"")
    digest = hashlib.sha256(b"").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"../../secret": digest}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": _flip,
    "emptied": lambda f: (f / "kernel.c").write_bytes(b""),
    "file gone": lambda f: (f / "kernel.c").unlink(),
    "folder for a file": lambda f: ((f / "kernel.c").unlink(), (f / "kernel.c").mkdir()),
    "manifest gone": lambda f: (f / "manifest.json").unlink(),
    "manifest cut": _truncate_manifest,
    "manifest no object": lambda f: (f / "manifest.json").write_text("[]"),
    "manifest no digests": lambda f: (f / "manifest.json").write_text('{"kernel.c": null}'),
    "manifest no text": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest deep": lambda f: (f / "manifest.json").write_text("[" * 100_000),
    "manifest points out": _escape,
    "link for a file": _link,
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_a_miss_and_goes(root: Path, harm: Callable[[Path], object]) -> None:
    harm(cache.put(KEY, {"kernel.c": b"int x;"}))
    assert cache.get(KEY) is None
    assert entries(root) == []
    assert cache.put(KEY, {"kernel.c": b"int x;"}) == cache.get(KEY)


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_built_again(root: Path, harm: Callable[[Path], object]) -> None:
    harm(cache.put(KEY, {"kernel.c": b"int x;"}))
    folder = cache.get_or_build(KEY, writing("int x;"))
    assert (folder / "kernel.c").read_bytes() == b"int x;"
    assert entries(root) == [KEY]


@pytest.mark.parametrize("stranger", ["file", "link", "dangling link"])
def test_a_stranger_in_the_place_of_an_entry_goes(
    root: Path, tmp_path: Path, stranger: str
) -> None:
    elsewhere = cache.put(OTHER, {"kernel.c": b"another"})
    place = root / KEY
    if stranger == "file":
        place.write_text("not a folder")
    else:
        place.symlink_to(elsewhere if stranger == "link" else tmp_path / "nowhere")
    assert cache.get(KEY) is None
    assert entries(root) == [OTHER]
    assert (elsewhere / "kernel.c").read_bytes() == b"another"


# --- whose folder it is ---------------------------------------------------------------------------


@posix
def test_the_folder_is_made_for_the_user_alone(root: Path) -> None:
    old = os.umask(0)
    try:
        assert cache.directory() == root
    finally:
        os.umask(old)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720, 0o702])
def test_a_folder_others_can_write_is_refused(root: Path, mode: int) -> None:
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(CacheError, match="can be written by others"):
        cache.put(KEY, {})
    assert list(root.iterdir()) == []


@posix
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_others_can_only_read_will_do(root: Path, mode: int) -> None:
    root.mkdir()
    root.chmod(mode)
    assert cache.put(KEY, {})


@posix
def test_a_folder_of_another_user_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(CacheError, match="belongs to user"):
        cache.get(KEY)


@posix
@pytest.mark.parametrize("stranger", ["link", "dangling link", "file"])
def test_what_is_no_folder_is_refused(root: Path, tmp_path: Path, stranger: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    if stranger == "file":
        root.write_text("")
    else:
        root.symlink_to(tmp_path / ("real" if stranger == "link" else "nowhere"))
    with pytest.raises(CacheError, match=r"symbolic link or not a folder.*NORMC_CACHE_DIR"):
        cache.put(KEY, {})
    assert list((tmp_path / "real").iterdir()) == []


def test_a_file_above_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        config.override(cache_dir=tmp_path / "file" / "cache"),
        pytest.raises(CacheError, match="cannot be used"),
    ):
        cache.put(KEY, {})


# --- full, forbidden and switched off -------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["rename", "mkdir", "open"])
def test_a_full_or_forbidden_folder_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    cache.directory()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(CacheError, match=f"{os.strerror(number)}.*NORMC_CACHE=0"):
            cache.put(KEY, {"kernel.c": b"int x;"})
    assert entries(root) == []
    assert cache.put(KEY, {"kernel.c": b"int x;"})


def test_a_disk_that_fills_up_while_building_is_named(root: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheError, match="No space left"):
        cache.get_or_build(KEY, build)
    assert entries(root) == []


def test_other_errors_of_a_build_keep_their_name(root: Path) -> None:
    def build(folder: Path) -> None:
        raise FileNotFoundError("no compiler")

    with pytest.raises(FileNotFoundError, match="no compiler"):
        cache.get_or_build(KEY, build)
    assert entries(root) == []


def test_switched_off_it_is_private_to_the_process(root: Path, tmp_path: Path) -> None:
    with config.override(cache=False):
        folder = cache.put(KEY, {"kernel.c": b"int x;"})
        assert cache.get(KEY) == folder
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        _processes(1, _report_directory, str(tmp_path / "report"))
    there = Path((tmp_path / "report").read_text())
    assert there.parent != folder.parent and not root.exists()
    assert not there.parent.exists(), "the other process has removed its folder"
    assert folder.exists()


# --- many at once ---------------------------------------------------------------------------------

# Processes are forked from a server that has the imports done and no threads running.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["normc.backends.cache", "pytest"])


def _processes(count: int, target: Callable[..., None], *args: object) -> None:
    processes = [SERVER.Process(target=target, args=args) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def _report_directory(report: str) -> None:
    with config.override(cache=False):
        Path(report).write_text(str(cache.put(KEY, {})))


def _build_together(root: str, log: str, meeting: str) -> None:
    def build(folder: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        for i in range(20):
            (folder / f"part{i}").write_text(str(i) * 1000)
            time.sleep(0.005)

    with config.override(cache_dir=root, cache=True):
        _meet(Path(meeting), 16)
        folder = cache.get_or_build(KEY, build)
        assert [(folder / f"part{i}").read_text() for i in range(20)] == [
            str(i) * 1000 for i in range(20)
        ]


def _meet(folder: Path, count: int) -> None:
    """Go on when ``count`` processes have come here."""
    (folder / f"here{os.getpid()}").touch()
    while len(list(folder.glob("here*"))) < count:
        time.sleep(0.001)


def test_of_sixteen_processes_one_builds(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    _processes(16, _build_together, str(root), str(log), str(tmp_path))
    assert len(log.read_text().splitlines()) == 1
    assert entries(root) == [KEY]


def test_of_sixteen_threads_one_builds(root: Path) -> None:
    built: list[int] = []
    found: list[Path] = []

    def build(folder: Path) -> None:
        built.append(threading.get_ident())
        writing("text")(folder)
        time.sleep(0.05)

    def ask() -> None:
        with config.override(cache_dir=root, cache=True):
            found.append(cache.get_or_build(KEY, build))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and found == [root / KEY] * 16


def _harm_and_build(root: str) -> None:
    """Damage the entry again and again while others build it anew."""
    with config.override(cache_dir=root, cache=True):
        for i in range(20):
            folder = cache.get_or_build(KEY, writing("int x;"))
            if (i + os.getpid()) % 3 == 0:
                try:
                    (folder / "kernel.c").write_bytes(b"int")
                except FileNotFoundError:
                    continue  # another process has just taken the damaged entry away
            cache.get(KEY)


def test_damage_and_repair_at_once(root: Path) -> None:
    _processes(8, _harm_and_build, str(root))
    assert cache.get_or_build(KEY, writing("int x;")) == cache.get(KEY)
    assert entries(root) == [KEY]


def test_where_locks_do_not_work_the_first_rename_wins(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> None:
        writing("mine")(folder)
        cache.put(KEY, {"kernel.c": b"theirs"})  # someone else, meanwhile

    class NoLock:
        def __init__(self, path: Path) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(cache, "FileLock", NoLock)
    folder = cache.get_or_build(KEY, build)
    assert (folder / "kernel.c").read_text() == "theirs"
    assert entries(root) == [KEY]


def _build_forever(root: str) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        time.sleep(60)

    with config.override(cache_dir=root, cache=True):
        cache.get_or_build(KEY, build)


def test_a_killed_writer_leaves_no_entry_and_no_lock(root: Path) -> None:
    process = SERVER.Process(target=_build_forever, args=(str(root),))
    process.start()
    while not list(root.glob("tmp-*/half")):
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (left,) = root.glob("tmp-*")
    assert cache.get(KEY) is None
    os.utime(left, (0, 0))  # long ago
    assert cache.get_or_build(KEY, writing("text")) == cache.get(KEY)
    assert entries(root) == [KEY]
