"""`normc show`: every stage from text to machine code, or one of them alone."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from normc.cli.shell import (
    Backend,
    DType,
    FormulaText,
    Layout,
    NoColor,
    console,
    find_formula,
    write,
)

if TYPE_CHECKING:
    from rich.console import Console

    from normc.cli.stages import Stage, Subject


class StageName(str, Enum):
    """The stages by name, in order."""

    parse = "parse"
    algebra = "algebra"
    program = "program"
    backward = "backward"
    plan = "plan"
    c = "c"
    triton = "triton"
    ptx = "ptx"
    all = "all"


ABOUT = {
    "parse": "text to expressions",
    "algebra": "the canonical form and the derivative",
    "program": "forward, straight line",
    "backward": "the same kind of program",
    "plan": "passes over memory; A is the bytes of one tensor",
    "c": "kernels for CPUs",
    "triton": "kernels for GPUs",
    "tape": "instructions for a machine; no compiler is run",
    "torch": "plain torch operations",
    "ptx": "machine code for GPUs",
}


def show(
    formula: FormulaText,
    stage: Annotated[
        StageName | None, typer.Option(help="Print one stage alone, or all of them in full.")
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(help="Whose plan and kernels to show; the plan is C's if absent."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="The storage type.")] = DType.float32,
    layout: Annotated[
        Layout, typer.Option(help="How tensors lie in memory.")
    ] = Layout.channels_first,
    no_color: NoColor = False,
) -> None:
    """Show what a formula becomes, stage by stage."""
    from normc.cli.stages import Subject
    from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

    last = layout is Layout.channels_last
    order = CHANNELS_LAST if last else CHANNELS_FIRST
    whose = backend.value if backend else ""
    subject = Subject(find_formula(formula), dtype.value, order, whose or "c")
    if stage is None:
        _print(console(no_color), _overview(whose), subject)
    elif stage is StageName.all:
        _print(console(no_color), _stages(), subject)
    else:
        typer.echo(_stages()[stage.value](subject))


def _print(screen: Console, stages: dict[str, Stage], subject: Subject) -> None:
    from rich.rule import Rule

    for i, (name, stage) in enumerate(stages.items()):
        if i:
            screen.print()
        screen.print(Rule(f"[bold]{name}[/bold]: {ABOUT[name]}", align="left", style="dim"))
        write(screen, stage(subject))


def _stages() -> dict[str, Stage]:
    """Every stage in full."""
    from normc.cli import stages

    return {
        "parse": stages.parse,
        "algebra": stages.algebra,
        "program": stages.program,
        "backward": stages.backward,
        "plan": stages.plan,
        "c": lambda subject: stages.source(subject, "c"),
        "triton": lambda subject: stages.source(subject, "triton"),
        "ptx": stages.ptx,
    }


def _overview(backend: str) -> dict[str, Stage]:
    """Every stage in brief; the machine code of a GPU takes a while, and is left out."""
    from normc.cli import stages

    head = {
        "parse": stages.parse_brief,
        "algebra": stages.algebra_brief,
        "program": stages.program,
        "backward": stages.backward,
        "plan": stages.plan_brief,
    }
    if backend:
        return head | {backend: lambda subject: stages.source_brief(subject, backend)}
    return head | {
        "c": lambda subject: stages.source_brief(subject, "c"),
        "triton": lambda subject: stages.source_brief(subject, "triton"),
        "ptx": lambda subject: f"--stage ptx compiles for {stages.ARCH}; no GPU is needed",
    }
