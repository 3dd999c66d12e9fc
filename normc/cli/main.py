"""The command line: one file per command; an error of the user's is one clean message.

Commands import what they need when they run, so that help is quick.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from normc.cli.bench import bench
from normc.cli.check import check
from normc.cli.compile import compile
from normc.cli.demo import demo
from normc.cli.doctor import doctor
from normc.cli.report import report
from normc.cli.search import rerank, resume, search
from normc.cli.show import show
from normc.cli.zoo import zoo
from normc.errors import NormcError

MISTAKE = 2
"""The exit status after an error of the user's."""


class Commands(TyperGroup):
    """Runs a command; a `NormcError` becomes its message on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NormcError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(MISTAKE) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile normalization layers written as text.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"normc {version('normc')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile normalization layers written as text."""


for command in (
    *(show, check, bench, compile, zoo, doctor, demo),
    *(search, resume, rerank, report),
):
    app.command()(command)


def main() -> None:
    """The console script."""
    app()
