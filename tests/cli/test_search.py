"""`normc search`, `resume`, `rerank` and `report`, as somebody types them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normc.cli.main import app
from normc.search import runs
from tests.search.killed import TINY, facts

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
NORMC = (sys.executable, "-c", "from normc.cli.main import main; main()")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    path = tmp_path_factory.mktemp("setting") / "tiny.json"
    path.write_text(TINY.to_json())
    return path


@pytest.fixture(scope="module")
def folder(setting, tmp_path_factory):
    """A run of a few candidates on one worker."""
    where = tmp_path_factory.mktemp("cli") / "first"
    done = run("search", where, "--setting", setting, "--evaluations", 8, "--workers", 1)
    assert done.exit_code == 0, done.output
    assert "8 candidates" in done.output and "normc resume" in done.output
    return where


def test_a_search_goes_on_and_is_ranked_again(folder):
    assert "formula," in (folder / "hall_of_fame.csv").read_text()
    done = run("resume", folder, "--evaluations", 10, "--workers", 1)
    assert done.exit_code == 0 and "10 candidates" in done.output
    ranked = run("rerank", folder, "--top", 2, "--times", 2, "--workers", 1)
    assert ranked.exit_code == 0 and "before" in ranked.output
    assert len(runs.read(folder)[0].reranked) == 2


def test_a_report_is_a_page_of_its_own(folder, tmp_path):
    page = tmp_path / "report.html"
    done = run("report", folder, "-o", page, "--against", folder)
    assert done.exit_code == 0
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "http://" not in text.replace("http://www.w3.org", "")  # MathML's name
    assert run("report", folder).exit_code == 0 and (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "new"], "how long? --minutes 10"),
        (["search", "new", "--minutes", "1", "--data", "digit"], "no data are called 'digit'"),
        (["search", "new", "--minutes", "1", "--objective", "speed"], "no objective is called"),
        (["search", "new", "--minutes", "1", "--setting", "none.json"], "cannot read none.json"),
        (["search", "new", "--minutes", "1", "--workers", "99"], "expected 1 to 8"),
        (["resume", "none"], "there is no run in none"),
        (["report", "none"], "there is no run in none"),
    ],
)
def test_a_mistake_is_a_clean_message(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_a_setting_that_is_none_names_its_place(tmp_path):
    path = tmp_path / "setting.json"
    path.write_text(json.dumps({"recipe": {"stpes": 3}}))
    done = run("search", tmp_path / "new", "--minutes", "1", "--setting", path)
    assert done.exit_code == 2 and "$.recipe.stpes" in done.stderr


def test_the_first_interrupt_finishes_what_runs(setting, tmp_path):
    where = tmp_path / "stopped"
    words = ["search", where, "--setting", setting, "--evaluations", 100_000, "--workers", 1]
    process = subprocess.Popen(
        [*NORMC, *map(str, words)], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    until(lambda: (where / "search.sqlite").exists() and len(runs.read(where)[0].records) > 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "finishing what runs" in output
    archive = runs.read(where)[0]
    assert all(r.outcome for r in archive.records)


def test_the_screen_of_a_terminal_shows_how_far_it_is(setting, tmp_path):
    where = tmp_path / "seen"
    master, slave = pty.openpty()
    words = ["search", where, "--setting", setting, "--evaluations", 12, "--workers", 1]
    process = subprocess.Popen(
        [*NORMC, *map(str, words)], cwd=ROOT, stdout=slave, stderr=slave,
        env={**os.environ, "COLUMNS": "140", "LINES": "50", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = drained(master, process)
    assert process.returncode == 0
    for words in ("graphs screened", "candidates decided", "a minute", "under evaluation", "blind"):
        assert words in shown, words


def drained(master, process):
    found = b""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        ready, _, _ = select.select([master], [], [], 0.2)
        if ready:
            try:
                found += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    process.wait(timeout=60)
    return found.decode(errors="replace")


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.05)


@pytest.mark.thorough
def test_a_stopped_run_goes_on_to_the_same_archive(folder, setting, tmp_path):
    where = tmp_path / "again"
    run("search", where, "--setting", setting, "--evaluations", 5, "--workers", 1)
    run("resume", where, "--evaluations", 10, "--workers", 1)
    run("resume", folder, "--evaluations", 10, "--workers", 1)
    assert facts(runs.read(where)[0]) == facts(runs.read(folder)[0])
