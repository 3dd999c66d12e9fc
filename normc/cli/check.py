"""`normc check`: compiled kernels against the oracle, over shapes, dtypes, layouts and backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from normc.cli.shell import Backend, DType, FormulaText, NoColor, console, find_formula

if TYPE_CHECKING:
    from rich.console import Console

    from normc.analysis.agreement import Case, Error
    from normc.formula import Formula

DISAGREES = 1
"""The exit status when a result is out of tolerance."""

_HERE = [DType.float64, DType.float32]


@dataclass(frozen=True)
class Finding:
    """One result or gradient of one case, on one backend."""

    backend: str
    case: Case
    error: Error


def check(
    formula: FormulaText,
    backend: Annotated[
        list[Backend] | None, typer.Option(help="Repeat for several; all that run here if absent.")
    ] = None,
    dtype: Annotated[list[DType], typer.Option(help="Repeat for several.")] = _HERE,
    seed: Annotated[int, typer.Option(help="Of shapes and numbers.")] = 0,
    cases: Annotated[int, typer.Option(min=1, help="Random shapes, each in every dtype.")] = 7,
    no_color: NoColor = False,
) -> None:
    """Check value and gradients against autograd in float64.

    Exit status 1 if a result of any backend is out of tolerance.
    """
    from normc.analysis import agreement

    found = find_formula(formula)
    screen = console(no_color)
    every = agreement.cases(seed, cases, dtypes=[d.value for d in dtype])
    names = [b.value for b in (backend or Backend)]
    findings = [f for name in names for f in _run(screen, found, name, every, backend is not None)]
    _report(screen, found, findings)
    if not all(f.error.ok for f in findings):
        raise typer.Exit(DISAGREES)


def _run(
    screen: Console, formula: Formula, backend: str, cases: list[Case], asked: bool
) -> Iterator[Finding]:
    """The findings of a backend; one that cannot run here is an error if it was asked for."""
    from normc.analysis.agreement import compare
    from normc.errors import BackendError

    eps = formula.eps
    refusals = {dtype: _why_not(backend, dtype) for dtype in {c.dtype: None for c in cases}}
    for refused in dict.fromkeys(filter(None, refusals.values())):
        if asked:
            raise BackendError(refused)
        screen.print(f"left out: {refused}\n", markup=False)
    with screen.status(backend):
        for case in cases:
            if not refusals[case.dtype]:
                for error in compare(formula, case, backend, eps=eps):
                    yield Finding(backend, case, error)


def _why_not(backend: str, dtype: str) -> str:
    """Why a backend cannot run on a dtype here; empty if it can, be it on the GPU."""
    import torch

    from normc.backends.contract import find

    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return find(backend).why_not(dtype, device)


def _report(screen: Console, formula: Formula, findings: list[Finding]) -> None:
    """A table of the worst result per backend, dtype and layout; then the worst of all."""
    from rich.table import Table

    rows: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        rows.setdefault((f.backend, f.case.dtype, f.case.layout.name), []).append(f)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("backend", "dtype", "layout", "worst of", "tensor"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "limit"):
        table.add_column(name, no_wrap=True, justify="right")
    for name in ("rule", ""):
        table.add_column(name, no_wrap=True)
    for key, group in rows.items():
        worst = max(group, key=_badness)
        e = worst.error
        mark = "[green]ok[/green]" if e.ok else "[bold red]WRONG[/bold red]"
        numbers = f"{e.error:.1e}", f"{e.limit:.1e}"
        table.add_row(*key, str(len(group)), e.tensor, *numbers, e.rule, mark)
    screen.print(f"{formula.text}\n", markup=False)
    screen.print(table)
    _verdict(screen, findings)


def _badness(finding: Finding) -> tuple[bool, float]:
    """How bad a finding is: a failure first, then by its share of what its rule allows."""
    return not finding.error.ok, finding.error.error / finding.error.limit


def _verdict(screen: Console, findings: list[Finding]) -> None:
    wrong = sum(not f.error.ok for f in findings)
    if not findings:
        screen.print("\nnothing to check: no backend runs here", markup=False)
        return
    worst = max(findings, key=_badness)
    e = worst.error
    lines = [
        "",
        f"worst: {e.tensor} of {worst.backend} on {worst.case.show()}, seed {worst.case.seed}: "
        f"{e.error:.1e} of {e.limit:.1e}",
        "tolerance: relative to the largest magnitude of the oracle's result, in float64",
    ]
    if any(f.error.rule == "eager" for f in findings):
        lines.append("eager: ill-conditioned; the limit is a multiple of plain torch's own error")
    lines.append(f"{len(findings)} results, {wrong or 'none'} out of tolerance")
    screen.print("\n".join(lines), markup=False)
