"""The CPU benchmark: ``python -m benchmarks.cpu``, from the root of the repository.

Every row is measured in a process of its own; what is compared is measured in turns within it, see
`normc.analysis.timing`. Results go into a JSON file by row, size, dtype and layout, so that a row
can be measured again; `benchmarks.report` prints the table and the plot from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.rows import IMAGES, OTHER, ROWS, Row
from normc.analysis import contest
from normc.analysis.agreement import Case, draw
from normc.analysis.contest import BOTH, Entrant
from normc.analysis.machine import environment, reuse_memory
from normc.analysis.providers import OURS, Call, compiled, ours
from normc.errors import NormcError

OUTPUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "cpu.json"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Order(str, Enum):
    contiguous = "contiguous"
    channels_last = "channels_last"


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Names with commas between; all if absent.")] = "",
    size: Annotated[str, typer.Option(help="MB of one float32 tensor, with commas.")] = "25,100",
    dtype: Annotated[DType, typer.Option()] = DType.float32,
    layout: Annotated[Order, typer.Option()] = Order.contiguous,
    rounds: Annotated[int, typer.Option(min=1)] = 30,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path, typer.Option(help="The JSON to add to.")] = OUTPUT,
    here: Annotated[bool, typer.Option("--here", help="In this process.")] = False,
) -> None:
    """Measure rows of the table."""
    chosen = [_row(name) for name in (rows.split(",") if rows else ROWS)]
    failed: list[str] = []
    for row in (row for row in chosen if layout.value in row.layouts()):
        for megabytes in map(int, size.split(",")):
            if here:
                torch.set_num_threads(threads)
                _add(output, measure(row, megabytes, dtype.value, layout.value, rounds))
                continue
            how = ["--dtype", dtype.value, "--layout", layout.value, "--rounds", str(rounds),
                   "--threads", str(threads), "--output", str(output), "--here"]  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.cpu", "--rows", row.name]
            if subprocess.run([*command, "--size", str(megabytes), *how]).returncode:
                failed.append(f"{row.name} at {megabytes} MB")
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _row(name: str) -> Row:
    if name not in ROWS:
        raise typer.BadParameter(f"no row is called {name}: {', '.join(ROWS)}")
    return ROWS[name]


def measure(row: Row, size: int, dtype: str, layout: str, rounds: int) -> dict[str, Any]:
    """Judge and time one row; the entry of the JSON."""
    malloc = reuse_memory()
    case = row.case(size, dtype, layout)
    calls = {
        OURS: ours(row.formula, case, row.eps),
        "eager": row.peer,
        "inductor": compiled(row.peer),
    }
    errors = _judge(row, case, calls)
    given, cotangents = draw(row.formula.definition, case)
    entrants = [Entrant(name, call, given, cotangents) for name, call in calls.items()]
    saved = {e.name: asdict(contest.saved(e)) for e in entrants}
    if layout == "channels_last":
        first = replace(case, layout=IMAGES)
        call = ours(row.formula, first, row.eps)
        entrants.append(Entrant(OTHER, call, *draw(row.formula.definition, first)))
    samples = contest.race(entrants, given["x"], rounds)
    floors = contest.floors(row.formula, given["x"], case.geometry)
    floors[BOTH] = row.floor or floors[BOTH]
    return {
        "row": row.name, "size": size, "dtype": dtype, "layout": layout,
        "shape": list(case.shape), "bytes": given["x"].nbytes, "groups": case.groups,
        "native": row.native, "rounds": rounds, "passes": contest.times(samples, floors),
        "errors": errors, "saved": saved, "environment": environment(malloc),
    }  # fmt: skip


def _judge(row: Row, case: Case, calls: dict[str, Call]) -> dict[str, dict[str, float]]:
    """Every provider's errors; ours has to be in tolerance."""
    seen = contest.judged(case)
    given, cotangents, exact = contest.exactly(row.formula, seen, row.eps)
    found = {n: contest.accuracy(call, given, cotangents, exact) for n, call in calls.items()}
    found[OURS].require(row.name, case.dtype)
    return {name: dict(each.errors) for name, each in found.items()}


def _add(path: Path, entry: dict[str, Any]) -> None:
    """Write an entry in the place of an older one of the same row, size, dtype and layout."""
    entries = json.loads(path.read_text("utf-8")) if path.exists() else {}
    entries["/".join(str(entry[k]) for k in ("row", "size", "dtype", "layout"))] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(entries), indent=1) + "\n", encoding="utf-8")
    _say(entry)


def _rounded(value: Any) -> Any:
    """Floats with four digits: more would be noise, and every diff would be long."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _say(entry: dict[str, Any]) -> None:
    """A line per pass, so that one can watch."""
    for name, found in entry["passes"].items():
        of = found["times"]
        shown = [f"{who} {t['ms']:.2f} ms ({t['times_ours']:.2f}x)" for who, t in of.items()]
        over = f"{of[OURS]['over_floor']:.2f} of floor {found['floor']}A"
        print(f"{entry['row']:16} {entry['size']:4} MB {name:16} {over}; {', '.join(shown)}")


if __name__ == "__main__":
    try:
        app()
    except NormcError as error:
        sys.exit(f"error: {error}")
