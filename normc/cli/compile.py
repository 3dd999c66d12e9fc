"""`normc compile`: a formula's kernels as machine code in a folder; the GPU need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normc.cli.shell import (
    DType,
    FormulaText,
    Layout,
    NoColor,
    console,
    find_formula,
    find_shape,
    write,
)

if TYPE_CHECKING:
    from rich.console import Console

    from normc.formula import Formula
    from normc.language.axes import Axis
    from normc.language.geometry import Geometry, Groups


def compile(
    formula: FormulaText,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder; it appears whole or not at all.")
    ],
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942.")] = "sm_90",
    dtype: Annotated[DType, typer.Option(help="The storage type.")] = DType.float32,
    shape: Annotated[str, typer.Option(help="Of x, with commas.")] = "32,256,28,28",
    groups: Annotated[
        str, typer.Option(help="A number; auto is the largest divisor of the channels up to 32.")
    ] = "auto",
    channel_dim: Annotated[int, typer.Option(help="Which dimension holds the channels.")] = 1,
    layout: Annotated[
        Layout | None,
        typer.Option(help="Of memory; channels-last if absent and x has them last."),
    ] = None,
    eps: Annotated[float | None, typer.Option(help="The zoo's, or 1e-5, if absent.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder whatever is in it.")
    ] = False,
    no_color: NoColor = False,
) -> None:
    """Compile forward and backward for a GPU, with all that it takes to launch them."""
    from normc.cli import folder, manifest
    from normc.language.geometry import Geometry

    found = find_formula(formula)
    geometry = Geometry.of(find_shape(shape), _groups(groups), channel_dim)
    order = _order(layout, geometry)
    wanted = manifest.Wanted(found, target, dtype.value, geometry, order, _eps(eps, found))
    folder.check(output, manifest.FORMAT, force)
    screen = console(no_color)
    with screen.status("compiling"):
        record, files = manifest.build(wanted)
    folder.install(output, files, manifest.FORMAT, force)
    _print(screen, record)
    write(screen, f"\n{output}: {len(files)} files; {folder.MANIFEST} says how to launch them")


def _groups(text: str) -> Groups:
    """The groups in an option; `ShapeError` for what is no number."""
    from normc.errors import ShapeError

    if text == "auto":
        return "auto"
    if not (text.isdecimal() and len(text) <= 18):
        raise ShapeError(f"--groups is {text!r}: expected a number from 1, or auto")
    return int(text)


def _eps(given: float | None, formula: Formula) -> float:
    """Epsilon, which becomes part of the machine code."""
    from math import isfinite

    from normc.errors import NormcError

    if given is None:
        return formula.eps
    if not isfinite(given):
        raise NormcError(f"--eps is {given}: expected a finite number")
    return given


def _order(layout: Layout | None, geometry: Geometry) -> tuple[Axis, ...]:
    """The order of axes in memory: the wanted one, or that of a contiguous x."""
    from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

    last = layout is Layout.channels_last
    if layout is None:
        last = geometry.channel_dim == geometry.rank - 1 or geometry.s == 1
    return CHANNELS_LAST if last else CHANNELS_FIRST


# --- the table -----------------------------------------------------------------------------------


def _print(screen: Console, record: dict[str, Any]) -> None:
    """What was compiled, and what each kernel asks of the GPU."""
    from rich.table import Table

    write(screen, "\n".join([record["formula"], "", _header(record), ""]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", no_wrap=True, style="cyan")
    table.add_column("schedule", no_wrap=True)
    for column in ("programs", "warps", "registers", "spills", "shared", "bytes"):
        table.add_column(column, no_wrap=True, justify="right")
    for job in record["jobs"]:
        for kernel in job["kernels"]:
            table.add_row(*_cells(record["name"], kernel))
    screen.print(table)


def _header(record: dict[str, Any]) -> str:
    """For which tensors on which GPU."""
    sizes = ", ".join(map(str, record["shape"]))
    return (
        f"x ({sizes}) {record['dtype']}, channels in dimension {record['channel_dim']}, "
        f"{record['layout']}, groups {record['groups']}, eps {record['eps']:g}; "
        f"for {record['target']}"
    )


def _cells(label: str, kernel: dict[str, Any]) -> list[str]:
    """A kernel by its name without the formula's, and its numbers."""
    asked = [kernel[key] for key in ("warps", "registers", "spills", "shared")]
    numbers = [kernel["grid"][0], *asked, kernel["binary"]["bytes"]]
    name = kernel["name"].removeprefix(f"{label}_")
    return [name, kernel["schedule"], *(str(number) for number in numbers)]
