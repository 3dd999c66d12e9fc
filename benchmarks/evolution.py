"""Evolution against random search: ``python -m benchmarks.evolution RUNS``, from the root.

For each seed, one run of each with the same number of evaluations, in the folder RUNS; one that is
there already is gone on with. Both begin with the same random graphs. What counts is the
hypervolume of the front of the three accuracies, above 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from normc.analysis.machine import environment
from normc.search import Archive, Evolution, Setting, resume, run
from normc.search.archive import scores

DATA = Path(__file__).parent.parent / "docs" / "benchmarks" / "evolution.json"


def searched(folder: Path, setting: Setting, evaluations: int, workers: int) -> Archive:
    """The run of a folder, complete."""
    if (folder / "search.sqlite").exists():
        return resume(folder, evaluations=evaluations, workers=workers)
    return run(folder, setting, evaluations=evaluations, workers=workers)


def found(archive: Archive, evaluations: int) -> dict[str, Any]:
    """What a run came to, on its first so many evaluations."""
    records = archive.records[:evaluations]
    curve = archive.progress(records, [0.0] * len(archive.names))
    best = archive.best[0]
    return {
        "hypervolume": curve[-1],
        "after": {str(n): curve[n - 1] for n in range(50, evaluations + 1, 50)},
        "survivors": sum(r.sound for r in records),
        "front": len(archive.best),
        "best": {"formula": best.candidate.text, "scores": scores(best)},
        "seconds": sum(r.outcome.seconds for r in records if r.outcome),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where the runs are, or are to be.")],
    seeds: Annotated[int, typer.Option(help="How many.")] = 5,
    evaluations: Annotated[int, typer.Option(help="Of each run.")] = 150,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the figures are kept.")] = DATA,
) -> None:
    """Search, compare, and keep the figures."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        row: dict[str, Any] = {"seed": seed}
        for strategy in ("random", "evolution"):
            setting = Setting(evolution=Evolution(seed=seed, strategy=strategy))
            archive = searched(folder / f"{strategy}-{seed}", setting, evaluations, workers)
            row[strategy] = found(archive, evaluations)
            row["references"] = {n: o.scores for n, o in archive.references.items()}
        rows.append(row)
        volumes = [row[s]["hypervolume"] for s in ("random", "evolution")]
        typer.echo(f"seed {seed}: random {volumes[0]:.4f}, evolution {volumes[1]:.4f}")
    wins = sum(r["evolution"]["hypervolume"] > r["random"]["hypervolume"] for r in rows)
    typer.echo(f"evolution is ahead in {wins} of {len(rows)}")
    setting = json.loads(Setting().to_json())
    record = {"rows": rows, "evaluations": evaluations, "setting": setting}
    record["environment"] = environment("as it is")
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
