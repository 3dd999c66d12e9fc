"""`normc bench`: a formula's kernels against plain torch, torch.compile and torch's own."""

from __future__ import annotations

import json as json_
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normc.cli.shell import (
    DType,
    FormulaText,
    NoColor,
    console,
    find_formula,
    find_shape,
    write,
)

if TYPE_CHECKING:
    from rich.console import Console

    from normc.analysis.agreement import Case
    from normc.analysis.contest import Accuracy
    from normc.formula import Formula

AGAINST = ("eager", "inductor", "native")
"""What ours can be compared with, see `normc.analysis.providers`."""


@dataclass(frozen=True)
class Contest:
    """What is compared, on which tensors."""

    formula: Formula
    case: Case
    eps: float
    rounds: int


def bench(
    formula: FormulaText,
    shape: Annotated[str, typer.Option(help="Of x, with commas.")] = "16,128,56,56",
    groups: Annotated[
        int | None, typer.Option(help="The largest divisor of the channels up to 32 if absent.")
    ] = None,
    channel_dim: Annotated[int, typer.Option(help="Which dimension holds the channels.")] = 1,
    dtype: Annotated[DType, typer.Option(help="The storage type.")] = DType.float32,
    threads: Annotated[int | None, typer.Option(min=1, help="torch's number if absent.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each, taken in turns.")] = 20,
    against: Annotated[str, typer.Option(help="Any of these, with commas.")] = ",".join(AGAINST),
    json: Annotated[Path | None, typer.Option(help="Write every number to a file.")] = None,
    no_color: NoColor = False,
) -> None:
    """Time forward and backward on the CPU against what else computes them."""
    from normc.analysis import machine
    from normc.errors import NormcError

    wanted = _providers(against)
    if json and not json.parent.is_dir():
        raise NormcError(f"--json is {str(json)!r}: there is no folder {str(json.parent)!r}")
    found = find_formula(formula)
    eps = found.eps
    contest = Contest(found, _case(shape, groups, channel_dim, dtype.value), eps, rounds)
    screen = console(no_color)
    with machine.threads(threads):
        record = run(screen, contest, wanted)
    if json:
        json.write_text(json_.dumps(record, indent=1) + "\n", encoding="utf-8")


def _providers(text: str) -> list[str]:
    """The names in a list with commas; `NormcError` for one that is none."""
    from normc.errors import NormcError, nearest

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in AGAINST:
            raise NormcError(
                f"`{name}` is nothing to compare with{nearest(name, AGAINST)}: "
                f"choose from {', '.join(AGAINST)}"
            )
    return names


def _case(text: str, groups: int | None, channel_dim: int, dtype: str) -> Case:
    """The tensors' sizes; `ShapeError` for what no x can have."""
    from normc.analysis.agreement import Case, Layout
    from normc.language.geometry import Geometry

    shape = find_shape(text)
    geometry = Geometry.of(shape, "auto" if groups is None else groups, channel_dim)
    return Case(Layout("contiguous", len(shape), channel_dim), shape, geometry.g, dtype, seed=0)


def run(screen: Console, contest: Contest, against: list[str]) -> dict[str, Any]:
    """Judge, time and print; the record of all that was measured."""
    from normc.analysis import contest as contests
    from normc.analysis import machine
    from normc.analysis.agreement import draw
    from normc.analysis.providers import PROVIDERS
    from normc.ops.target import target_of

    malloc = machine.reuse_memory()
    f, case = contest.formula, contest.case
    with screen.status("judging"):
        errors, notes = _judge(contest, against)
    given, cotangents = draw(f.definition, case)
    calls = {name: PROVIDERS[name](f, case, contest.eps) for name in errors}
    entrants = [contests.Entrant(name, call, given, cotangents) for name, call in calls.items()]
    saved = {e.name: asdict(contests.saved(e)) for e in entrants}
    floors = contests.floors(f, given["x"], case.geometry)
    with screen.status("timing"):
        samples = contests.race(entrants, given["x"], contest.rounds)
    record = {
        "formula": f.text,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "bytes": given["x"].nbytes,
        "groups": case.groups,
        "channel_dim": case.layout.channel_dim,
        "eps": contest.eps,
        "rounds": contest.rounds,
        "backend": target_of(f, "auto", given["x"], (), case.geometry).backend,
        "passes": contests.times(samples, floors),
        "errors": errors,
        "saved": saved,
        "notes": notes,
        "environment": machine.environment(malloc),
    }
    _print(screen, record)
    return record


def _judge(contest: Contest, against: list[str]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The errors of the providers that run here, and why others do not; ours must be accurate."""
    from normc.analysis import contest as contests
    from normc.analysis.providers import OURS, PROVIDERS

    f, eps = contest.formula, contest.eps
    case = contests.judged(contest.case)
    given, cotangents, exact = contests.exactly(f, case, eps)

    def accuracy(name: str) -> Accuracy:
        return contests.accuracy(PROVIDERS[name](f, case, eps), given, cotangents, exact)

    ours = accuracy(OURS)
    ours.require(OURS, case.dtype, accuracy("eager"))
    errors, notes = {OURS: dict(ours.errors)}, list[str]()
    for name in against:
        try:
            errors[name] = dict(accuracy(name).errors)
        except Exception as error:  # of torch.compile's any: that it does not run is the finding
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            notes.append(f"{name} is left out: {reason}")
    return errors, notes


# --- the table -----------------------------------------------------------------------------------


def _print(screen: Console, record: dict[str, Any]) -> None:
    from rich.table import Table

    from normc.analysis.contest import BOTH, FORWARD

    write(screen, "\n".join([*_header(record), *record["notes"], ""]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True, style="cyan")
    for name in (FORWARD, BOTH):
        for column in (f"{name}, ms", "/ floor", "/ normc"):
            table.add_column(column, justify="right")
    table.add_column("saved for backward", justify="right")
    table.add_column("error", justify="right", no_wrap=True)
    for who, errors in record["errors"].items():
        cells = [cell for name in (FORWARD, BOTH) for cell in _cells(record["passes"][name], who)]
        saved = _saved(record["saved"][who])
        table.add_row(who, *cells, saved, f"{max(errors.values()):.0e}")
    screen.print(table)
    screen.print(
        "\nms: median, and 20th to 80th percentile, measured in turns; / floor: in units of the "
        "time in which a copy moves\nas many bytes as have to be moved; error: the largest "
        "relative one of result and gradients, against float64",
        markup=False,
    )


def _header(record: dict[str, Any]) -> list[str]:
    """What was measured, and the floor: A is the bytes of x."""
    from normc.schedule.cost import show_bytes

    sizes = ", ".join(map(str, record["shape"]))
    floors = [f"{name} {found['floor']}A" for name, found in record["passes"].items()]
    copy = min(found["copy_ms"] for found in record["passes"].values())
    speed = 2 * record["bytes"] / copy / 1e6
    return [
        record["formula"],
        "",
        f"x ({sizes}) {record['dtype']}, A = {show_bytes(record['bytes'])}, "
        f"groups {record['groups']}, threads {record['environment']['threads']}, "
        f"backend {record['backend']}",
        f"floor: {', '.join(floors)}; a copy of x moves 2A in {copy:.3g} ms, {speed:.1f} GB/s",
    ]


def _cells(found: dict[str, Any], who: str) -> tuple[str, str, str]:
    """A provider's time with its spread, over the floor, and over ours."""
    of = found["times"][who]
    spread = f"{of['ms']:.3g} ({of['p20']:.3g}-{of['p80']:.3g})"
    return spread, f"{of['over_floor']:.2f}", f"{of['times_ours']:.2f}"


def _saved(found: dict[str, Any]) -> str:
    """The tensors that live anyway by name, and the bytes of the others."""
    from normc.schedule.cost import show_bytes

    return " + ".join(filter(None, [", ".join(found["named"]), show_bytes(found["rest"])]))
