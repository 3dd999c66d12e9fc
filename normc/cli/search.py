"""`normc search`, `resume`, `rerank`: layers evolved in a folder, seen while it runs."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normc.cli.shell import NoColor, console, write

if TYPE_CHECKING:
    from rich.console import Console

    from normc.search.archive import Archive
    from normc.search.runs import Run
    from normc.search.setting import Setting


class Series(str, Enum):
    """Whether statistics may cross samples."""

    B = "B"
    S = "S"


class Strategy(str, Enum):
    """How candidates are proposed."""

    evolution = "evolution"
    random = "random"


class EngineName(str, Enum):
    """Where candidates are evaluated."""

    local = "local"
    ray = "ray"


Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Evaluations = Annotated[
    int | None, typer.Option(min=1, help="End after so many candidates, those before included.")
]
Minutes = Annotated[
    float | None, typer.Option(min=0.01, help="End after so much time; running ones are finished.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one per core if absent.")]
OnEngine = Annotated[EngineName, typer.Option("--engine", help="Processes here, or Ray's.")]
Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster; Ray begins one here if absent.")
]


def search(
    folder: Folder,
    evaluations: Evaluations = None,
    minutes: Minutes = None,
    seed: Annotated[int | None, typer.Option(help="Of graphs, weights and batches.")] = None,
    series: Annotated[
        Series | None, typer.Option(help="B: statistics may cross samples; S: none may.")
    ] = None,
    strategy: Annotated[
        Strategy | None, typer.Option(help="Evolution, or random search with the same budget.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10:FOLDER or cifar100:FOLDER.")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="accuracy, bytes, latency or error; repeat for several."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    setting: Annotated[
        Path | None, typer.Option(help="A JSON file with whatever else is not as by default.")
    ] = None,
    workers: Workers = None,
    engine: OnEngine = EngineName.local,
    address: Address = None,
    no_color: NoColor = False,
) -> None:
    """Evolve layers on small networks; the first Ctrl-C finishes what runs, then stops."""
    from normc.errors import NormcError
    from normc.search.runs import run
    from normc.search.setting import Setting

    if evaluations is None and minutes is None:
        raise NormcError("how long? --minutes 10, or --evaluations 500, for example")
    how = Setting.from_json(_text(setting)) if setting else Setting()
    ways = {"seed": seed, "series": series, "strategy": strategy}
    found = {name: getattr(way, "value", way) for name, way in ways.items() if way is not None}
    named = {"data": data, "device": device, "objectives": tuple(objective) if objective else None}
    changes = {name: value for name, value in named.items() if value is not None}
    how = replace(how, evolution=replace(how.evolution, **found), **changes)
    with _watched(folder, console(no_color), how) as view:
        archive = run(
            folder, how, evaluations=evaluations, minutes=minutes, workers=_workers(workers, how),
            engine=engine.value, address=address, watch=view.watch,
        )  # fmt: skip
    view.end(archive)


def resume(
    folder: Folder,
    evaluations: Evaluations = None,
    minutes: Minutes = None,
    workers: Workers = None,
    engine: OnEngine = EngineName.local,
    address: Address = None,
    no_color: NoColor = False,
) -> None:
    """Go on with a search, to the end it was begun with if none is given."""
    from normc.search import runs

    how = runs.read(folder)[0].setting
    with _watched(folder, console(no_color), how) as view:
        archive = runs.resume(
            folder, evaluations=evaluations, minutes=minutes, workers=_workers(workers, how),
            engine=engine.value, address=address, watch=view.watch,
        )  # fmt: skip
    view.end(archive)


def rerank(
    folder: Folder,
    top: Annotated[int, typer.Option(min=1, help="How many, the best on average.")] = 10,
    times: Annotated[float, typer.Option(min=0.01, help="How much longer they train.")] = 4.0,
    workers: Workers = None,
    no_color: NoColor = False,
) -> None:
    """Train the best layers of a search again, for longer, and rank them by that."""
    from normc.cli.search_view import ranking
    from normc.search import runs

    screen = console(no_color)
    archive = runs.read(folder)[0]
    with screen.status("training"):
        found = runs.rerank(folder, top, times, workers=_workers(workers, archive.setting))
    screen.print(ranking(archive, found))


def _workers(given: int | None, how: Setting) -> int:
    import os

    return given or min(os.cpu_count() or 1, how.evolution.lag)


def _text(path: Path) -> bytes:
    from normc.errors import NormcError

    try:
        return path.read_bytes()
    except OSError as error:
        raise NormcError(f"cannot read {path}: {error}") from error


# --- while it runs --------------------------------------------------------------------------------


@dataclass
class View:
    """What is on the screen, and whether somebody wants it to end."""

    folder: Path
    screen: Console
    setting: Setting
    live: Any = None  # rich's Live on a terminal
    asked: int = 0  # how often Ctrl-C was pressed
    front: list[int] = field(default_factory=list[int])

    def watch(self, run: Run) -> None:
        """Show how far a run is."""
        from normc.cli.search_view import frame, news

        run.stopped = run.stopped or bool(self.asked)
        if self.live is not None:
            self.live.update(frame(self.folder, run))
            return
        best = [r.candidate.number for r in run.archive.best]
        if best != self.front:
            self.front = best
            write(self.screen, news(run))

    def end(self, archive: Archive) -> None:
        """What was found, and what can be done with it."""
        from normc.cli.search_view import summary

        self.screen.print(summary(archive))
        write(
            self.screen, f"\nnormc report {self.folder} -o report.html   # the whole run as a page"
        )
        write(self.screen, f"normc resume {self.folder} --minutes 10     # go on with it")


@contextmanager
def _watched(folder: Path, screen: Console, setting: Setting) -> Generator[View]:
    """A view, live on a terminal, during which Ctrl-C asks for an end."""
    from rich.live import Live

    view = View(folder, screen, setting)

    def interrupted(_: int, __: object) -> None:
        view.asked += 1
        if view.asked > 1:
            raise KeyboardInterrupt
        write(screen, "finishing what runs; Ctrl-C once more ends it at once")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        if screen.is_terminal:
            with Live(console=screen, refresh_per_second=4, transient=True) as view.live:
                yield view
        else:
            yield view
    except KeyboardInterrupt:
        write(screen, f"stopped; what was finished is kept: normc resume {folder}")
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)
