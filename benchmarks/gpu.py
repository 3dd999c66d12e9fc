"""The GPU benchmark: ``python -m benchmarks.gpu``, from the root of the repository, on one GPU.

It checks that kernels are right and measures how fast they are, within a budget of minutes: what is
most important comes first, and what was left out for lack of time is named in the JSON. That is
written as results come in; `benchmarks.gpu_report` prints the page from it. All work is done in
other processes, see `benchmarks.gpu_pool`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import gpu_check, gpu_report
from benchmarks.formulas import stored
from benchmarks.gpu_pool import GRACE, Answer, Budget, GoneError, Task, Worker, share_out
from benchmarks.gpu_record import Record, Tally
from benchmarks.gpu_rows import COMPILE, EAGER, LIGER, PASSES, QUACK, ROWS, Row
from normc.analysis.contest import COPY
from normc.analysis.providers import OURS
from normc.backends import triton
from normc.formula import zoo

OUTPUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.json"
COMMAND = [sys.executable, "-m", "benchmarks.gpu_worker"]

CHECKED = 0.42
"""The share of the time that checks have before speed is measured; they go on with what is left."""

WARMED = 0.3
"""The share in which kernels are compiled ahead, if there are no checks."""

PATIENCE = {"check": 60.0, "warm": 150.0, "speed": 100.0}
"""Seconds after which a worker is taken to hang."""

LAST = 12.0
"""Seconds kept for the second copy and for writing."""

COMPILES = 25.0
"""Seconds that must be left for `torch.compile` to take part."""


class Part(str, Enum):
    check = "check"
    speed = "speed"
    all = "all"


class Where(str, Enum):
    cuda = "cuda"
    cpu = "cpu"


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    part: Annotated[Part, typer.Option(help="What to do.")] = Part.all,
    minutes: Annotated[float, typer.Option(min=0.05, help="For everything.")] = 9.0,
    only: Annotated[str, typer.Option(help="A row, as T1 or C1/evonorm_s0, or a formula.")] = "",
    out: Annotated[Path, typer.Option(help="The JSON; the page lies beside it.")] = OUTPUT,
    device: Annotated[Where, typer.Option(help="cpu: checks alone, interpreted.")] = Where.cuda,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: by processors.")] = 0,
) -> None:
    """Check and measure on one GPU."""
    rows, names, texts = selected(only)
    if why := why_not(part, device) or ("" if rows or names or texts else f"nothing is {only!r}"):
        typer.echo(f"error: {why}", err=True)
        raise typer.Exit(2)
    budget = Budget(60 * minutes)
    here = device is Where.cpu
    sizes = {"small": gpu_check.TINY, "large": gpu_check.TINY, "repeats": 2} if here else {}
    tally = Tally(gpu_check.plan(names, texts, **sizes))
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    record = Record(out, budget, started=started, minutes=minutes, part=part.value, only=only)
    try:
        if here:
            check_here(record, tally)
        else:
            measure(record, tally, rows, part, workers)
        record.data["finished"] = True
    except GoneError as error:
        record.data["error"] = str(error)
    finally:
        record.save()
        gpu_report.write(out)
    typer.echo(gpu_report.brief(record.data))
    raise typer.Exit(1 if tally.failed or not record.data["finished"] else 0)


def selected(only: str) -> tuple[list[Row], list[str], list[str]]:
    """The rows to measure, the most important first; the zoo's names and the texts to check."""
    if not only:
        return sorted(ROWS.values(), key=lambda row: row.rank), list(zoo), stored()
    parts = only.split("/")
    rows = [r for r in ROWS.values() if r.id.split("/")[: len(parts)] == parts or r.name == only]
    texts = dict.fromkeys([*([only] if only in zoo else []), *(row.text for row in rows)])
    rows = rows or [row for row in ROWS.values() if row.text == only]
    names = [text for text in texts if text in zoo]
    rows.sort(key=lambda row: row.rank)
    return rows, names, [text for text in texts if text not in zoo]


def why_not(part: Part, device: Where) -> str:
    """Why nothing can be done here; empty if it can."""
    if triton.triton is None:
        return "Triton is not installed"
    if device is Where.cpu:
        if part is not Part.check:
            return "without a GPU there is only --part check"
        return "" if triton.interpreted() else "--device cpu needs TRITON_INTERPRET=1"
    if triton.interpreted():
        return "TRITON_INTERPRET=1 runs kernels on the CPU: unset it, or give --device cpu"
    return "" if torch.cuda.is_available() else "there is no CUDA device: nothing is measured"


# --- the parts -----------------------------------------------------------------------------------


def check_here(record: Record, tally: Tally) -> None:
    """The checks in this process, under Triton's interpreter."""
    record.data["machine"] = {"gpu": "no GPU: Triton's interpreter"}
    for task in tally.tasks():
        try:
            answer = gpu_check.check(task)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        tally.take(task, answer)
        record.data["check"] = tally.record()
        record.save(2)
        if record.budget.left() <= 0:
            return


def measure(record: Record, tally: Tally, rows: list[Row], part: Part, workers: int) -> None:
    """All parts on the GPU."""
    budget, checks, times = record.budget, part is not Part.speed, part is not Part.check
    bench = Worker(COMMAND)
    crew = [Worker(COMMAND) for _ in range(workers or max(1, min(12, (os.cpu_count() or 1) - 2)))]
    try:
        record.data["machine"] = bench.ask({"kind": "machine"}, 60)
        if times:
            record.data["copy"] = {"first": _copy(bench)}
        share = 1.0 if not times else CHECKED if checks else WARMED
        ahead = _ahead(rows) if times else iter(())
        tasks = chain(ahead, tally.tasks() if checks else ())
        _share(record, tally, tasks, crew, budget.before(LAST).share(share))
        if times:
            _speed(record, bench, rows, budget.before(LAST))
            record.data["copy"]["last"] = _copy(bench)
            if checks and budget.left() > 3 * LAST:
                _share(record, tally, tally.tasks(), crew, budget.before(LAST / 2))
    finally:
        for worker in (bench, *crew):
            worker.close()


def _ahead(rows: list[Row]) -> Iterator[Task]:
    """Compile what will be timed; huge tensors are left alone, of which not many fit at a time."""
    for who in (OURS, COMPILE):
        yield from ({"kind": "warm", "row": r.id, "provider": who} for r in rows if r.bytes < 1e9)


def _share(
    record: Record, tally: Tally, tasks: Iterator[Task], crew: list[Worker], budget: Budget
) -> None:
    def take(task: Task, answer: Answer) -> None:
        if task["kind"] == "warm":
            if "error" in answer:
                told = f"{task['row']}, {task['provider']}: {answer['error']}"
                record.data.setdefault("ahead", []).append(told)
            return
        tally.take(task, answer)
        record.data["check"] = tally.record()
        record.save(2)

    share_out(tasks, crew, budget, lambda task: PATIENCE[task["kind"]], take)
    for worker in crew:
        worker.close()  # nothing else is to run while times are taken
    record.save()


def _copy(bench: Worker) -> Answer:
    try:
        return bench.ask({"kind": "copy", "seconds": 0.5}, 30)
    except GoneError as error:
        return {"error": str(error)}


def _speed(record: Record, bench: Worker, rows: list[Row], budget: Budget) -> None:
    found = record.data["speed"] = {"rows": {}, "left_out": {}}
    copied = record.data["copy"]["first"].get("gbps")
    for row in rows:
        if budget.left() < LAST / 2:
            found["left_out"][row.id] = "no time"
            continue
        answer = _row(bench, row, budget)
        if "error" in answer:
            found["left_out"][row.id] = answer["error"]
        else:
            found["rows"][row.id] = answer | _known(row, answer, copied)
        typer.echo(gpu_report.line(row.id, answer))
        record.save()


def _row(bench: Worker, row: Row, budget: Budget) -> Answer:
    """One row; if it brings the worker down, once more without what may have done so."""
    compiles = [COMPILE] if budget.left() > COMPILES else []
    task = {"kind": "speed", "row": row.id, "seconds": 2.0 if row.bytes > 1e9 else 1.2}
    answer: Answer = {"error": "no time"}
    for providers in ([OURS, EAGER, *compiles, LIGER, QUACK], [OURS, EAGER]):
        try:
            seconds = min(PATIENCE["speed"], budget.left() + GRACE)
            return bench.ask(task | {"providers": providers}, seconds)
        except GoneError as error:
            if budget.left() <= 0:
                break
            answer = {"error": f"worker: {error}"}
    return answer


def _known(row: Row, answer: Answer, copied: float | None) -> dict[str, Any]:
    """What does not have to be measured, and what follows from what was."""
    floors, traffic = row.floors(copied) if copied else {}, row.traffic()
    for who, parts in answer["times"].items():
        for part, found in parts.items():
            moved = 2 * row.bytes if who == COPY else traffic[part]
            found["gbps"] = moved / found["us"] / 1e3
            if floors and who != COPY:
                found["efficiency"] = floors[part] / found["us"]
    return {
        "formula": row.text, "shape": list(row.shape), "dtype": row.dtype, "groups": row.groups,
        "layout": row.layout.name, "bytes": row.bytes, "rank": row.rank,
        "moves": dict(zip(PASSES, row.moves, strict=True)), "traffic": traffic, "floor_us": floors,
        "aims": dict(zip(PASSES, row.aims, strict=True)), "beats": dict(row.beats),
    }  # fmt: skip


if __name__ == "__main__":
    app()
