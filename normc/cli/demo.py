"""`normc demo`: from text to a trained network, with the numbers measured on the way.

Three formulas are compiled, explained and checked against autograd; then each is trained as a layer
of a small convolutional net, beside nn.BatchNorm2d with ReLU, and timed beside plain torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from normc.cli.shell import NoColor, console, find_formula, write

if TYPE_CHECKING:
    from rich.console import Console

    from normc.cli.digits import Digits, MakeLayer
    from normc.formula import Formula

YOURS = "h = x/group_rms(x); h*sigmoid(v*h - instance_mean(h))*gamma + beta"
"""Gates each value by how far it is above the mean of its channel; nobody has a kernel for it."""

BASELINE = "nn.BatchNorm2d + ReLU"


@dataclass(frozen=True)
class Contender:
    """A layer to train, and the same layer without the compiler."""

    name: str
    layer: MakeLayer
    eager: MakeLayer | None = None  # None: the layer is plain torch itself


@dataclass(frozen=True)
class Score:
    """What is measured of one contender."""

    name: str
    accuracies: list[float]
    compiled: float | None  # milliseconds per training step
    eager: float


def demo(
    formula: Annotated[
        str, typer.Argument(metavar="FORMULA", help="Yours, beside two of the zoo.")
    ] = YOURS,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Networks trained per layer.")] = 3,
    batches: Annotated[
        int | None, typer.Option(min=1, help="End each epoch early, for a quick look.")
    ] = None,
    no_color: NoColor = False,
) -> None:
    """Compile formulas, check them, and train with them."""
    run(formula, console(no_color), epochs=epochs, seeds=seeds, batches=batches)


def run(
    formula: str, screen: Console, *, epochs: int, seeds: int, batches: int | None = None
) -> list[Score]:
    """The whole demo; what it prints ends in a table of the scores it returns."""
    from normc.cli import digits

    began = time.perf_counter()
    data = digits.load()
    formulas = {
        "EvoNorm-S0": find_formula("evonorm_s0"),
        "EvoNorm-B0": find_formula("evonorm_b0"),
        "yours": _trainable(find_formula(formula)),
    }
    for name, each in formulas.items():
        introduce(screen, name, each)
    contenders = [_baseline(), *(_contender(name, each) for name, each in formulas.items())]
    with digits.one_thread():
        scores = _measure(screen, contenders, data, epochs, seeds, batches)
    _table(screen, scores, seeds)
    screen.print(f"\n{time.perf_counter() - began:.0f} s in all")
    return scores


def _trainable(formula: Formula) -> Formula:
    from normc.errors import NormcError

    if formula.inputs or len(formula.definition.results) > 1:
        raise NormcError("the demo trains formulas with one result and no input beside x")
    return formula


def introduce(screen: Console, name: str, formula: Formula) -> None:
    """Print a formula's text, derivative, plan and measured error."""
    from rich.rule import Rule

    from normc.cli.stages import Subject, plan_brief
    from normc.ops.derivative import show_derivatives

    screen.print(Rule(f"[bold]{name}[/bold]", align="left", style="dim"))
    sections = {
        "text": formula.text,
        "derivative": show_derivatives(formula.definition),
        "plan, A = bytes of one tensor": plan_brief(Subject(formula)),
        "error against autograd in float64": _errors(formula),
    }
    for title, text in sections.items():
        screen.print(f"[dim]{title}[/dim]")
        write(screen, "\n".join(f"  {line}" for line in text.splitlines()))
    screen.print()


def _errors(formula: Formula) -> str:
    """The worst error of value and gradients, per dtype."""
    from normc.analysis.agreement import cases, compare

    lines: list[str] = []
    for dtype in ("float64", "float32"):
        every = [e for case in cases(0, 3, [4], [dtype]) for e in compare(formula, case)]
        value = max(e.error for e in every if e.tensor == "y")
        gradient = max((e.error for e in every if e.tensor != "y"), default=0.0)
        verdict = "ok" if all(e.ok for e in every) else "out of tolerance"
        lines.append(f"{dtype}: value {value:.0e}, gradients {gradient:.0e}, {verdict}")
    return "\n".join(lines)


def _baseline() -> Contender:
    from torch import nn

    return Contender(BASELINE, lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()))


def _contender(name: str, formula: Formula) -> Contender:
    from normc.cli.digits import GROUPS, Eager
    from normc.ops.layer import Layer

    return Contender(
        name,
        lambda channels: Layer(formula, channels, groups=GROUPS),
        lambda channels: Eager(formula, channels),
    )


def _measure(
    screen: Console,
    contenders: list[Contender],
    data: Digits,
    epochs: int,
    seeds: int,
    batches: int | None,
) -> list[Score]:
    """Train every contender with every seed, then time all of them in turns."""
    from rich.progress import Progress

    from normc.cli.digits import Training, milliseconds, train

    accuracies: dict[str, list[float]] = {c.name: [] for c in contenders}
    with Progress(console=screen, transient=True) as bar:
        task = bar.add_task("training", total=len(contenders) * seeds * epochs)
        for seed in range(seeds):
            for c in contenders:
                bar.update(task, description=f"training {c.name}, seed {seed}")
                how = Training(epochs, seed, batches, lambda: bar.advance(task))
                accuracies[c.name].append(train(c.layer, data, how))
    layers = {c.name: c.layer for c in contenders}
    layers |= {_eager(c): c.eager for c in contenders if c.eager}
    times = milliseconds(layers, data, rounds=min(40, 8 * (batches or 5)))
    return [
        Score(c.name, accuracies[c.name], times[c.name] if c.eager else None, times[_eager(c)])
        for c in contenders
    ]


def _eager(contender: Contender) -> str:
    """The name under which plain torch is timed."""
    return f"{contender.name} in plain torch" if contender.eager else contender.name


def _table(screen: Console, scores: list[Score], seeds: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column(f"test accuracy, {seeds} seeds", no_wrap=True)
    for name in ("compiled, ms/step", "plain torch, ms/step", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in scores:
        mean = f"{100 * sum(s.accuracies) / len(s.accuracies):.1f} %"
        spread = f"{100 * min(s.accuracies):.1f} to {100 * max(s.accuracies):.1f}"
        times = ("-", f"{s.eager:.2f}", "-")
        if s.compiled is not None:
            times = (f"{s.compiled:.2f}", f"{s.eager:.2f}", f"{s.eager / s.compiled:.2f}x")
        table.add_row(s.name, f"{mean} ({spread})", *times)
    screen.print(table)
    screen.print(
        "\na step is forward, backward and update of the whole net, 64 images; "
        "medians, measured in turns in one run, on one thread"
    )
