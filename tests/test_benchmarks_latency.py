"""The table of compile times from a few numbers, and how these are measured."""

import json
import os

import pytest

pytest.importorskip("triton")

from types import SimpleNamespace

from benchmarks import latency, latency_page
from normc import config
from normc.formula import parse

MACHINE = {
    "date": "2026-01-02",
    "cpu": "A processor",
    "threads": 2,
    "python": "3.11",
    "torch": "2",
    "normc": "0",
}


def entry(name, total, legal=8.0, torch=None, **changes):
    """What benchmarks.latency writes for a formula, with round numbers."""
    stages = {"front": 1.0, "ast": 2.0, "ttgir": 3.0, "llvm": 40.0, "ptxas": 5.0, "rest": 6.0}
    ours = {"total": total, "kernels": 3.0, "compiled": 4.0} | stages
    found = {"name": name, "formula": f"{name}(x)", "note": "", "ours": ours}
    return found | {"legal": {"total": legal}, "torch": {"total": torch or 8 * total}} | changes


def record(*entries):
    about = {"target": "sm_90", "dtype": "float32", "shape": [2, 8], "rounds": 3, "triton": "3.7"}
    return about | {"environment": MACHINE, "candidates": list(entries)}


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


ENTRIES = [
    entry("dyt", 100.0, legal=20.0),
    entry("grn", 200.0, legal=30.0),
    entry("random_1", 400.0, legal=50.4, torch=800.0),
]


def test_a_row_has_every_stage():
    found = row(latency_page.table(record(*ENTRIES)), "`dyt`")
    assert found == [
        *("`dyt`", "3 (4)", "1.0", "2.0", "3.0", "40", "5.0", "6.0", "100", "20", "800", "8.0"),
    ]


def test_the_median_is_judged_as_printed():
    table = latency_page.table(record(*ENTRIES))
    middle = row(table, "median")
    assert middle[8:] == ["200 ✓ (250)", "30 ✓ (30)", "800", "8.0"]
    late = row(latency_page.table(record(*ENTRIES[1:])), "median")
    assert late[8:10] == ["300 ✗ (250)", "40 ✗ (30)"]


def test_the_90th_percentile_has_no_target():
    last = row(latency_page.table(record(*ENTRIES)), "90th")
    assert last[8:] == ["360", "46", "1440", ""]


def test_what_failed_has_no_numbers_and_a_note():
    broken = entry("grn", 1.0, note="torch: no compiler")
    del broken["torch"]
    text = latency_page.page(record(ENTRIES[0], broken))
    assert row(text, "`grn`")[-2:] == ["", ""]
    assert "* `grn`: torch: no compiler" in text
    assert row(text, "median")[-1] == "8.0"


def test_the_page_says_what_was_measured():
    text = latency_page.page(record(*ENTRIES))
    assert "x of shape (2, 8) on sm_90" in text
    assert "A processor, 2 threads, torch 2, triton 3.7, normc 0, Python 3.11 (2026-01-02)" in text
    assert "`random_1`: `random_1(x)`" in text


def test_the_page_is_up_to_date():
    if not latency_page.DATA.exists():
        pytest.skip("not measured yet")
    found = json.loads(latency_page.DATA.read_text("utf-8"))
    page = latency_page.DATA.with_suffix(".md").read_text("utf-8")
    assert page == latency_page.page(found)


# --- what is measured ----------------------------------------------------------------------------


def test_there_are_enough_candidates():
    found = latency.candidates()
    assert len({f.digest for f in found}) == len({f.label for f in found}) >= 20


def test_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    before = config.cache_dir()
    seen = set()
    for _ in range(2):
        with latency.nothing_kept():
            seen |= {str(config.cache_dir()), os.environ["TRITON_CACHE_DIR"]}
    assert len(seen) == 4 and "mine" not in seen and str(before) not in seen
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert config.cache_dir() == before


def test_stages_are_summed_over_kernels():
    stages = [("ttir", 1000), ("ttgir", 2000), ("llir", 3000), ("ptx", 500), ("cubin", 4000)]
    times = SimpleNamespace(ir_initialization=250, lowering_stages=stages)
    knobs = latency.triton.knobs.compilation
    with latency.heard() as total:
        for _ in range(2):
            knobs.listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=False)
        # what was compiled a moment ago, side by side with others, is not counted again
        knobs.listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=True)
    assert knobs.listener is None
    assert total == {"compiled": 2, "ast": 2.5, "ttgir": 4, "llvm": 7, "ptxas": 8}


def test_all_take_turns_and_a_failure_is_noted(monkeypatch):
    turns = []

    def fake(name):
        def measure(formula, setting):
            turns.append((name, formula.label))
            if name == "torch" and formula.text == "x":
                raise RuntimeError("no compiler\nand a long story")
            return {"total": float(len(turns))}

        return measure

    monkeypatch.setattr(latency, "MEASURES", {name: fake(name) for name in ("ours", "torch")})
    formulas = [parse("x"), parse("2*x")]
    found = latency.measure(formulas, ["ours", "torch"], 2, latency.Setting())
    assert turns[:2] == [("ours", "pixel_norm"), ("torch", "pixel_norm")]
    assert [name for name, _ in turns[2:6]] == ["ours", "torch"] * 2
    assert [name for name, _ in turns[6:]] == ["torch", "ours"] * 2
    first, second = found
    assert first["ours"] == {"total": 5.5} and "torch" not in first  # of 3 and 8
    assert first["note"] == "torch: no compiler"
    assert second["torch"] == {"total": 7.5} and not second["note"]


@pytest.mark.aot
def test_a_formula_is_compiled_and_checked():
    setting = latency.Setting(shape=(2, 8, 4, 4))
    found = latency.ours(parse("x*gamma"), setting)
    assert found["kernels"] == found["compiled"] >= 2
    parts = [found[name] for name in ("front", "ast", "ttgir", "llvm", "ptxas")]
    assert all(parts) and found["total"] > found["ptxas"]
    assert latency.legal(parse("x*gamma"), setting)["total"] > 0
