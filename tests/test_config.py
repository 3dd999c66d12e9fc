"""The table of environment variables: its three faces, its page, and that it is the only one."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import platformdirs
import pytest

from normc import config
from normc.errors import NormcError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in config.TABLE:
        monkeypatch.delenv(row.name, raising=False)


def test_defaults() -> None:
    assert (config.backend(), config.cache(), config.debug_level()) == ("auto", True, 0)
    assert config.tune() is False
    assert config.cache_dir() == Path(platformdirs.user_cache_dir("normc"))


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMC_BACKEND", " Torch ")
    monkeypatch.setenv("NORMC_CACHE", "0")
    monkeypatch.setenv("NORMC_CACHE_DIR", "~/kernels")
    monkeypatch.setenv("NORMC_DEBUG", "5")
    monkeypatch.setenv("NORMC_TUNE", "1")
    assert (config.backend(), config.cache(), config.debug_level()) == ("torch", False, 5)
    assert config.tune() is True
    assert config.cache_dir() == Path.home() / "kernels"


def test_a_relative_folder_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMC_CACHE_DIR", "kernels")
    assert config.cache_dir() == tmp_path / "kernels"


@pytest.mark.parametrize("row", config.TABLE, ids=lambda row: row.name)
def test_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch, row: config.Variable) -> None:
    before = config.backend(), config.cache(), config.cache_dir(), config.debug_level()
    monkeypatch.setenv(row.name, "")
    assert (config.backend(), config.cache(), config.cache_dir(), config.debug_level()) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("NORMC_CACHE", "yes"), ("NORMC_TUNE", "2")),
        *(("NORMC_DEBUG", "6"), ("NORMC_DEBUG", "-1"), ("NORMC_DEBUG", "all")),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    asked = {"NORMC_CACHE": config.cache, "NORMC_DEBUG": config.debug_level}
    ask = {**asked, "NORMC_TUNE": config.tune}[name]
    with pytest.raises(NormcError, match=f"{name} is '{text}': expected"):
        ask()


def test_override_is_a_scope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NORMC_DEBUG", "1")
    with config.override(debug=4, cache=False):
        assert (config.debug_level(), config.cache()) == (4, False)
        with config.override(debug=0, backend="c", cache_dir=tmp_path, tune=True):
            assert (config.debug_level(), config.cache(), config.tune()) == (0, False, True)
            assert (config.backend(), config.cache_dir()) == ("c", tmp_path)
        assert (config.debug_level(), config.backend()) == (4, "auto")
    assert (config.debug_level(), config.cache()) == (1, True)


def test_override_decorates_and_ends_with_an_error() -> None:
    @config.override(debug=3)
    def fail() -> None:
        assert config.debug_level() == 3
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert config.debug_level() == 0


def test_override_is_checked_like_the_environment() -> None:
    with pytest.raises(NormcError, match="NORMC_DEBUG"), config.override(debug=9):
        pass


def test_override_stays_in_its_thread() -> None:
    seen: list[int] = []
    with config.override(debug=4):
        thread = threading.Thread(target=lambda: seen.append(config.debug_level()))
        thread.start()
        thread.join()
    assert seen == [0]


def test_debug_prints_from_its_level_on(capsys: pytest.CaptureFixture[str]) -> None:
    def costly() -> str:
        raise AssertionError("a text nobody reads is not made")

    with config.override(debug=2):
        config.debug(2, "two")
        config.debug(1, lambda: "one")
        config.debug(3, costly)
        config.debug(2, "many\nlines")
    assert capsys.readouterr() == ("", "normc: two\nnormc: one\nmany\nlines\n")


def test_the_table_is_small_and_has_good_rows() -> None:
    assert len(config.TABLE) <= 8
    assert [row.name for row in config.TABLE] == sorted({row.name for row in config.TABLE})
    for row in config.TABLE:
        assert row.name.startswith("NORMC_") and row.doc.endswith(".")
        row.read(row.default)


def test_the_page_is_printed_from_the_table() -> None:
    page = (ROOT / "docs" / "environment.md").read_text("utf-8")
    assert page == config.markdown(), "docs/environment.md is out of date: run make docs"
    assert all(f"| `{row.name}` |" in page for row in config.TABLE)


def test_nothing_else_reads_the_environment() -> None:
    """Outside config.py: only variables of other tools that the table names, on one line."""
    foreign = "|".join(config.FOREIGN)
    for path in sorted((ROOT / "normc").rglob("*.py")):
        if path == ROOT / "normc" / "config.py":
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if re.search(r"\benviron\b|\bgetenv\b", line):
                assert re.search(rf"[\"']({foreign})[\"']", line), f"{path}:{number}: {line}"


def test_every_variable_named_in_the_code_is_in_the_table() -> None:
    known = {row.name for row in config.TABLE}
    for path in sorted((ROOT / "normc").rglob("*.py")):
        named = set(re.findall(r"NORMC_[A-Z][A-Z_]*", path.read_text("utf-8")))
        assert named <= known, f"{path}: {named - known}"
