"""The benchmarks' rows, table and plot from a few numbers, and that the page is up to date."""

import importlib.util
import json
from math import prod

import pytest
import torch

from benchmarks import report
from benchmarks.rows import ROWS
from normc.analysis import contest
from normc.analysis.agreement import Case

MACHINE = {
    "date": "2026-01-02",
    "cpu": "A processor",
    "threads": 2,
    "malloc": "reuse",
    "compiler": "cc 1",
    "python": "3.11",
    "torch": "2",
    "normc": "0",
}


def entry(row, over_floor, inductor, eager, size=25, layout="contiguous", **changes):
    """What benchmarks.cpu writes for a row, with round numbers."""
    ratios = {"normc": 1.0, "eager": eager, "inductor": inductor}
    if layout == "channels_last":
        ratios[report.OTHER] = 0.5
    times = {
        who: {
            "ms": 4 * r,
            "p20": 3 * r,
            "p80": 5 * r,
            "over_floor": over_floor * r,
            "times_ours": r,
        }
        for who, r in ratios.items()
    }
    saved = {who: {"named": {"x": 100}, "rest": 50} for who in ratios}
    return {
        "row": row, "size": size, "dtype": "float32", "layout": layout, "bytes": 100,
        "native": row == "layer_norm", "saved": saved, "environment": MACHINE,
        "passes": {
            "forward": {"floor": 2, "copy_ms": 1.0, "times": times},
            "forward+backward": {"floor": 5, "copy_ms": 1.0, "times": times},
        },
    } | changes  # fmt: skip


ENTRIES = [
    entry("evonorm_s0", 1.25, 2.0, 16.0),
    entry("layer_norm", 1.125, 0.5, 4.0),
    entry("evonorm_s0", 1.0, 8.0, 16.0, layout="channels_last"),
]


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_row_with_its_targets():
    (row, _) = lines(report.page(ENTRIES), "| `evonorm_s0`")
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:7] == [
        "5A",
        "4.00",
        "4.00 (3.00-5.00)",
        "1.25 ✗ (1.15)",
        "2.00 ✗ (3)",
        "16.00 ✓ (14)",
    ]
    assert cells[7] == "0.50, 0.50, 0.50 A"


def test_torchs_own_function_has_a_star():
    (row,) = lines(report.page(ENTRIES), "| `layer_norm`")
    assert "4.00 ✓ (1.4)*" in row and "1.12 ✓ (1.15)" in row


def test_rows_are_in_order_and_a_mean_is_geometric():
    page = report.page(ENTRIES)
    assert page.index("| `layer_norm`") < page.index("| `evonorm_s0`")
    mean, other = lines(page, "| geometric mean")
    assert "1.00 ✗ (2.5)" in mean and "8.00" in mean  # sqrt(2 * 0.5), sqrt(16 * 4)
    assert "✗" not in other and "8.00" in other


def test_what_is_slower_is_named():
    page = report.page(ENTRIES)
    assert "Slower: `layer_norm` forward against inductor (0.50x); `layer_norm`" in page
    assert "No row is slower" in report.page(ENTRIES[:1])


def test_another_layout_has_no_targets_but_a_column():
    (_, row) = lines(report.page(ENTRIES), "| `evonorm_s0`")
    assert "✓" not in row and "✗" not in row
    assert row.endswith("| 0.50 |")


def test_machines_are_named_once():
    later = entry("grn", 1, 1, 1, environment=MACHINE | {"date": "2026-03-04"})
    named = lines(report.page([*ENTRIES, later]), "* A processor")
    assert len(named) == 1 and "(2026-01-02 to 2026-03-04)" in named[0]


def test_limits_belong_to_the_target():
    assert report.most(1.154, 1.15) == "1.15 ✓ (1.15)" and "✗" in report.most(1.156, 1.15)
    assert report.least(2.996, 3) == "3.00 ✓ (3)" and "✗" in report.least(2.99, 3)
    assert report.most(1.0, None) == "1.00"


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own
def test_the_plot_is_the_same_each_time(tmp_path):
    groups = report.grouped(ENTRIES)
    for name in ("a.svg", "b.svg"):
        report.draw(groups, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"evonorm_s0" in first and b"inductor" in first


def test_the_page_is_up_to_date():
    if not report.DATA.exists():
        pytest.skip("not measured yet")
    entries = json.loads(report.DATA.read_text("utf-8")).values()
    assert report.DATA.with_suffix(".md").read_text("utf-8") == report.page(entries)


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_sizes_are_as_they_are_called(row):
    for size in (25, 100):
        case = row.case(size, "float32", "contiguous")
        assert 4 * prod(case.shape) == pytest.approx(1e6 * size, rel=0.05)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_peers_are_the_same_layers(row):
    layout, shape = row.layout, {3: (2, 5, 64), 4: (2, 6, 5, 64)}[row.layout.rank]
    if layout.channel_dim == 1:
        shape = (2, 64, 6, 5)
    case = Case(layout, shape, row.groups, "float64", 1)
    given, cotangents, exact = contest.exactly(row.formula, case, row.eps)
    contest.accuracy(row.peer, given, cotangents, exact).require(row.name, "float64")
    least = contest.floors(row.formula, torch.zeros(shape), case.geometry)
    assert row.floor is None or row.floor <= least[contest.BOTH]
