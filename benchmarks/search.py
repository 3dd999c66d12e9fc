"""How fast a search is: ``python -m benchmarks.search``, from the root.

    screening   random graphs judged before any training: a second, and how many are equal; the
                memory of the process after each tenth
    loop        candidates of one search, decided from the text to the scores, by layers that are
                compiled, by the same layers as plain torch operations, and by torch.compile of
                those; on one thread, candidate after candidate in turns, caches empty at the start

Stability differentiates twice, which torch.compile does not: there its layers run as plain torch.
"""

from __future__ import annotations

import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from normc.analysis.machine import environment
from normc.formula import Formula
from normc.ops.composite import composite, tables
from normc.ops.layer import Layer
from normc.search.data import digits
from normc.search.evaluate import Evaluation
from normc.search.evolve import Evolution, Study
from normc.search.genome import draw
from normc.search.outcome import Outcome
from normc.search.screen import Screen
from normc.search.setting import Setting
from normc.search.space import EVONORM

DATA = Path(__file__).parent.parent / "docs" / "benchmarks" / "search.json"
Plain = Callable[..., Sequence[Tensor]]


class Eager(Layer):
    """A layer whose formula is plain torch operations, which autograd differentiates."""

    twice = False  # whether gradients are differentiated again

    def __init__(self, formula: Formula, channels: int, **options: Any) -> None:
        super().__init__(formula, channels, **options)
        self.op = Plainly(self.op.formula, self.call())

    def call(self) -> Plain:
        return composite


class Compiled(Eager):
    """The same operations, compiled by torch for every layer."""

    def call(self) -> Plain:
        fast = torch.compile(composite)
        return lambda *given: (composite if Eager.twice else fast)(*given)


class Plainly:
    """What stands for an op in a layer."""

    def __init__(self, formula: Formula, call: Plain) -> None:
        self.formula, self.call = formula, call

    def run(
        self, x: Tensor, given: Mapping[str, Tensor], groups: int, eps: float, dim: int,
        mode: Any = "batch", buffers: Mapping[str, Tensor] | None = None,
    ) -> Sequence[Tensor]:  # fmt: skip
        """The results, and in mode "track" the statistics of the batch."""
        known = {**given, **(buffers or {}), "x": x}
        return self.call(tables(self.formula, mode), known, groups, dim, eps)


class Loop(Evaluation):
    """An evaluation that tells its layers when they are differentiated twice."""

    def _stable(self, name: str, formula: Formula) -> float:
        Eager.twice = True
        try:
            return super()._stable(name, formula)
        finally:
            Eager.twice = False


WAYS: Mapping[str, type[nn.Module]] = {
    "normc": Layer, "torch eager": Eager, "torch.compile": Compiled,
}  # fmt: skip


def screening(graphs: int) -> dict[str, Any]:
    """Random graphs a second of one core, what became of them, and the memory held."""
    screen, chance = Screen(EVONORM), random.Random(0)
    for _ in range(200):
        screen(draw(EVONORM, chance))
    rates, memory = list[float](), [_mebibytes()]
    for _ in range(10):
        began = time.process_time()
        for _ in range(graphs // 10):
            screen(draw(EVONORM, chance))
        rates.append(graphs // 10 / (time.process_time() - began))
        memory.append(_mebibytes())
    return {
        "graphs": graphs,
        "per_cpu_second": {"median": median(rates), "least": min(rates)},
        "counts": dict(screen.counts),
        "equal": screen.counts["form"] + screen.counts["duplicate"],
        "mebibytes": memory,
    }


def _mebibytes() -> float:
    """What the process holds now, as the system counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def loop(candidates: int, slow: int, seed: int) -> dict[str, Any]:
    """Seconds and outcomes per way; the slowest way decides the first few candidates alone."""
    study = Study(Evolution(seed=seed))
    setting = Setting(evolution=study.evolution)
    ways = {name: Loop(setting, digits(), make=make) for name, make in WAYS.items()}
    rows: list[dict[str, Any]] = []
    for number in range(candidates):
        candidate, row = study.ask(), dict[str, Outcome]()
        names = [name for name in ways if name != "torch.compile" or number < slow]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            row[name] = ways[name](candidate.text)
            torch.compiler.reset()
        study.tell(number, row["normc"].told)
        kept = {name: asdict(outcome) for name, outcome in row.items()}
        rows.append({"formula": candidate.text, **kept})
        typer.echo(
            f"{number}: " + ", ".join(f"{n} {o.status} {o.seconds:.1f} s" for n, o in row.items())
        )
    return {"rows": rows, "per_minute": _rates(rows), "setting": json.loads(setting.to_json())}


def _rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Candidates a minute, on those that each way has decided beside normc."""
    found: dict[str, Any] = {}
    for name in WAYS:
        both = [row for row in rows if name in row]
        theirs, ours = (sum(row[who]["seconds"] for row in both) for who in (name, "normc"))
        found[name] = {
            "candidates": len(both),
            "per_minute": 60 * len(both) / theirs,
            "normc_on_the_same": 60 * len(both) / ours,
            "normc_faster": theirs / ours,
        }
    return found


def main(
    graphs: Annotated[int, typer.Option(help="To screen.")] = 100_000,
    candidates: Annotated[int, typer.Option(help="To decide.")] = 40,
    slow: Annotated[int, typer.Option(help="Of them also by torch.compile.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the figures are kept.")] = DATA,
) -> None:
    """Measure, print, and keep the figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NORMC_CACHE_DIR"] = f"{folder}/normc"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        Path(os.environ["NORMC_CACHE_DIR"]).mkdir(mode=0o700)
        record: dict[str, Any] = {"screening": screening(graphs)} if graphs else {}
        typer.echo(json.dumps(record, indent=1))
        if candidates:
            record["loop"] = loop(candidates, slow, seed)
            typer.echo(json.dumps(record["loop"]["per_minute"], indent=1))
    record["environment"] = environment("as it is")
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
