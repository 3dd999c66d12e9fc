"""Print the page of the GPU benchmark: ``python -m benchmarks.gpu_report``.

It follows from the JSON that `benchmarks.gpu` writes, byte for byte, whatever a run that was cut
short has left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu_rows import COMPILE, EAGER, GEOMETRIC, LIGER, PASSES, QUACK, ROWS
from benchmarks.pages import table
from benchmarks.report import geometric, least
from normc.analysis.contest import COPY
from normc.analysis.providers import OURS

DATA = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.json"
OTHERS = (COMPILE, EAGER, LIGER, QUACK)

Found = Mapping[str, Any]

PAGE = """\
# Benchmarks on the GPU

Printed by `python -m benchmarks.gpu` from [{data}]({data}), which holds every number in full.

{machine}

## Is it right

{check}

## Is it fast

Each row is judged by the oracle in float64 first, then all providers take turns, each pass after a
write of 256 MB that empties the cache, timed by events of the device alone; forward is that of
training. Times are medians, in brackets the 20th and 80th percentile.

* **floor**: the time in which the copy above would move the bytes that have to move. **of floor**
  is the floor over the time, beside it what is aimed at. **copy** is one of x, in the same turns.
* **GB/s** counts parameters and saved statistics too, but no partial sums.
* **x compile**, **x eager**, **x liger**, **x quack** say how many times as long these take, beside
  it what is aimed at: `torch.compile` in its default mode, the layer as one writes it in torch
  ([peers.py](../../benchmarks/peers.py)), and two libraries.

{speed}
"""


def write(data: Path) -> Path:
    """Write the page beside the JSON."""
    place = data.with_suffix(".md")
    place.write_text(page(json.loads(data.read_text("utf-8")), data.name), encoding="utf-8")
    return place


def page(record: Found, name: str = DATA.name) -> str:
    """The Markdown page."""
    found = {
        "machine": _machine(record),
        "check": _check(record["check"]) if "check" in record else "Not checked in this run.",
        "speed": _speed(record["speed"]) if "speed" in record else "Not measured in this run.",
    }
    return PAGE.format(data=name, **found)


def brief(record: Found) -> str:
    """The result in a few lines."""
    check, rows = record.get("check", {}), record.get("speed", {}).get("rows", {})
    lines = [f"{record['seconds']:.0f} s{'' if record['finished'] else ', not finished'}"]
    if check:
        lines.append(f"checks: {check['done']} of {check['planned']}, {check['failed']} failed")
    for name, aim in zip(PASSES, GEOMETRIC, strict=True):
        if values := _efficiencies(rows.values(), name):
            mean = f"{geometric(values):.2f} of the floor (aimed at {aim})"
            lines.append(f"{name}: {mean} in {len(values)} rows")
    return "\n".join(lines)


def line(id: str, answer: Found) -> str:
    """One row, so that one can watch."""
    told = [
        f"{who} {' + '.join(_us(each) for each in parts.values())} us"
        for who, parts in answer.get("times", {}).items()
    ]
    notes = [f"{who}: {why}" for who, why in answer.get("notes", {}).items() if who == OURS]
    return f"{id:28} {', '.join(told) or answer.get('error') or '; '.join(notes)}"


# --- the machine and the checks ------------------------------------------------------------------


def _machine(record: Found) -> str:
    of, copied = record.get("machine", {}), record.get("copy", {})
    versions = [f"{k} {v}" for k, v in of.get("versions", {}).items() if v != "none"]
    speeds = [f"{copied[k]['gbps']:.0f}" for k in ("first", "last") if "gbps" in copied.get(k, {})]
    known = [f"{k} {of[k]}" for k in ("driver", "cuda", "python", "commit") if k in of]
    lines = [
        f"* {', '.join([of.get('gpu', 'machine unknown'), *known, *versions])}",
        f"* {record['started']}, {record['seconds']:.0f} s of {60 * record['minutes']:.0f} s",
    ]
    if speeds:
        lines.append(f"* a copy of 2 GiB moves {', at the end '.join(speeds)} GB/s")
    if not record["finished"]:
        lines.append(f"* **the run did not finish**: {record.get('error', 'it was cut short')}")
    return "\n".join(lines)


def _check(found: Found) -> str:
    groups = [
        [group, each["planned"], each["done"], each["passed"],
         ", ".join(f"{name} {count}" for name, count in each["ran"].items())]
        for group, each in found["groups"].items()
    ]  # fmt: skip
    worst = [
        [d, f"{float(e['error']):.1e}", f"{found['tolerance'][d]:.0e}", e["tensor"],
         f"`{e['formula']}`", e["case"], e["schedule"]]
        for d, e in found["worst"].items()
    ]  # fmt: skip
    parts = [
        f"{found['done']} of {found['planned']} checks were done, {found['failed']} failed. Each "
        "compares results and all gradients with float64, and repeated runs bit by bit.",
        table(["formulas, schedule", "planned", "done", "passed", "kernels that ran"], groups),
        "The largest error of each dtype, without what a formula's own noise excuses "
        f"({found['excused_tensors']} tensors):",
        table(["dtype", "error", "tolerance", "tensor", "of", "case", "schedule"], worst),
        *_listed("Failed", [f"{_where(e)}: {e['why']}" for e in found["failures"]]),
        *_listed("Passed with other numbers only", [_where(e) for e in found["kinks"]]),
        *_listed("Not tried any more, for lack of answers", list(found["hung"])),
    ]
    return "\n\n".join(parts)


def _where(each: Found) -> str:
    return f"`{each['formula']}`, {each['case']}, {each['schedule']}"


def _listed(title: str, lines: list[str]) -> list[str]:
    return [f"{title}:", "\n".join(f"* {each}" for each in lines)] if lines else []


# --- speed ---------------------------------------------------------------------------------------


def _speed(found: Found) -> str:
    rows = {id: found["rows"][id] for id in ROWS if id in found["rows"]}
    timed = {id: row for id, row in rows.items() if OURS in row["times"]}
    notes = [f"`{i}` {who}: {why}" for i, row in rows.items() for who, why in row["notes"].items()]
    notes += [f"`{id}`: {why}" for id, why in found["left_out"].items()]
    differing = [f"`{id}`" for id, row in timed.items() if row.get("graph_same") is False]
    parts = [part for name in PASSES for part in _pass(name, timed)] + _graphs(timed)
    parts += _listed("Other results in a graph than without one", differing)
    parts += _listed("Left out", [note for note in notes if "no such layer" not in note])
    return "\n\n".join(parts)


def _pass(name: str, rows: Mapping[str, Found]) -> list[str]:
    head = ["row", "copy us", "floor us", "us", "of floor", "GB/s"]
    head += [f"x {who}" for who in OTHERS]
    sized = {id: row for id, row in rows.items() if any(row["aims"].values())}
    cells = [_cells(id, row, name) for id, row in sized.items() if name in row["times"][OURS]]
    mean = ""
    if values := _efficiencies(rows.values(), name):
        aim = GEOMETRIC[PASSES.index(name)]
        mean = f"Geometric mean of floor: {least(geometric(values), aim)}. "
    return [f"### {name}", table(head, cells), mean + _slower(name, sized)]


def _cells(id: str, row: Found, name: str) -> list[str]:
    ours = row["times"][OURS][name]
    at = PASSES.index(name)
    return [
        f"`{id}`",
        _us(row["times"].get(COPY, {}).get(PASSES[0])),
        _number(row["floor_us"].get(name)),
        "{us:.1f} ({p20:.1f}-{p80:.1f})".format(**ours),
        least(ours["efficiency"], row["aims"][name]) if "efficiency" in ours else "",
        f"{ours['gbps']:.0f}",
        *(_ratio(row, who, name, row["beats"].get(who, (None, None))[at]) for who in OTHERS),
    ]


def _ratio(row: Found, who: str, name: str, aim: float | None = None) -> str:
    theirs = row["times"].get(who, {}).get(name)
    return least(theirs["us"] / row["times"][OURS][name]["us"], aim) if theirs else ""


def _efficiencies(rows: Iterable[Found], name: str) -> list[float]:
    """What the rows with an aim reach of their floor."""
    ours = [row["times"][OURS] for row in rows if OURS in row["times"] and row["aims"][name]]
    return [each[name]["efficiency"] for each in ours if "efficiency" in each.get(name, {})]


def _slower(name: str, rows: Mapping[str, Found]) -> str:
    """Which rows lose against torch.compile."""
    compared = {id: _ratio(row, COMPILE, name) for id, row in rows.items()}
    lost = [f"`{id}` ({times}x)" for id, times in compared.items() if times and float(times) < 1]
    count = sum(map(bool, compared.values()))
    return f"Slower than torch.compile: {', '.join(lost) or 'no row'}, of {count} compared."


def _graphs(rows: Mapping[str, Found]) -> list[str]:
    """What small tensors take in replayed graphs, and the host's time where launches count."""
    who = (OURS, *OTHERS)
    graphs = [
        [f"`{id}`", name, _number(row["floor_us"].get(name)),
         *(_us(row["graphs"].get(each, {}).get(name)) for each in who)]
        for id, row in rows.items() for name in PASSES if row.get("graphs")
    ]  # fmt: skip
    hosts = [
        [f"`{id}`", name, *(_number(row["host"].get(each, {}).get(name)) for each in who)]
        for id, row in rows.items() for name in ("forward", "both") if row.get("host")
    ]  # fmt: skip
    parts: list[str] = []
    if graphs:
        parts += ["### small tensors, in a replayed graph, us"]
        parts += [table(["row", "pass", "floor us", *who], graphs)]
    if hosts:
        parts += ["### the host's time per call, us; aimed at: forward 5, both 25"]
        parts += [table(["row", "pass", *who], hosts)]
    return parts


def _us(found: Found | None) -> str:
    return _number(found["us"] if found else None)


def _number(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}"


def main(
    data: Annotated[Path, typer.Argument(help="What benchmarks.gpu has written.")] = DATA,
) -> None:
    """Write the page beside the JSON."""
    typer.echo(f"wrote {write(data)}")


if __name__ == "__main__":
    typer.run(main)
