"""`normc report`: a search as one page, and as what other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normc.cli.shell import NoColor, console, write


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; RUN/report.html if absent.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A run of random search with the same budget.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write the run for TensorBoard into this folder.")
    ] = None,
    optuna: Annotated[
        str | None, typer.Option(help="Write it as a study into this storage: sqlite:///FILE.")
    ] = None,
    no_color: NoColor = False,
) -> None:
    """Write a search as one self-contained page; a run may be running meanwhile."""
    from normc.search import export, runs
    from normc.search.report.page import page

    screen = console(no_color)
    archive, notes = runs.read(folder)
    baseline = runs.read(against)[0] if against else None
    place = output or folder / "report.html"
    _write(place, page(archive, folder.resolve().name, baseline, notes))
    write(screen, f"{place}: {len(archive.records)} candidates, front {len(archive.best)}")
    if tensorboard:
        export.to_tensorboard(archive, tensorboard)
        write(screen, f"tensorboard --logdir {tensorboard}")
    if optuna:
        export.to_optuna(archive, optuna, folder.resolve().name)
        write(screen, f"{optuna}: study {folder.resolve().name}")


def _write(place: Path, text: str) -> None:
    from normc.errors import NormcError

    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NormcError(f"cannot write {place}: {error}") from error
