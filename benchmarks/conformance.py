"""What PyTorch may do with an op: ``python -m benchmarks.conformance``, from the root.

Runs the checks of `normc.analysis.conformance` with Inductor, and writes docs/conformance.md. A
check that fails has a note below the table, and makes the exit status 1.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from normc.analysis.conformance import CHECKS, SHAPE, Result, conformance
from normc.formula import Formula, zoo

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"

NAMES = (
    *("evonorm_b0", "evonorm_s0", "group_norm", "batch_norm", "layer_norm_tokens"),
    *("add_rms_norm", "grn", "ada_layer_norm"),
)
NESTED = Formula("h = tanh(gamma*x - layer_mean(x)); h/batch_std(h) + beta", "nested")
"""A statistic of a statistic, over all samples: the zoo has no line for that."""

DOORS = [
    # number, who is watching, what answers, the checks that come in there
    ("1", "nobody", "the kernels", "1"),
    ("2", "autograd", "a Function around the kernels", "17 to 19"),
    ("3", "torch.func, forward mode", "a Function with rules for vjp, jvp and vmap",
     "2 to 8, 18, 19"),
    ("4", "torch.compile, torch.export, dispatch modes", "operators of `torch.ops.normc`",
     "9 to 11, 16, 17, 20 to 22"),
    ("5", "torch.compile of torch.func", "plain torch operations", "12 to 15"),
]  # fmt: skip

TEXT = """\
# Conformance

Printed by `python -m benchmarks.conformance`.

PyTorch differentiates, batches, compiles, exports and checkpoints functions. Each of {count} checks
does one of these with a compiled formula and compares the result with the oracle in float64, which
is plain torch operations, called eagerly, one case after the other, and differentiated by reverse
mode alone. All differentiation is by x and by every parameter and input; x has shape
{shape}, and parameters have one value per channel. What is compiled is so with
`fullgraph=True`, without a single graph break.

A call finds its way by who is watching, as [In PyTorch](torch.md) explains:

{doors}

11 compiles once for three shapes. 16 saves the program, loads it, and differentiates what was
loaded. 17 is with and without reentry, and with a policy that saves the operator. 18 and 19 compare
with finite differences, and 18 also with `vmap` of the older kind, which
`torch.autograd.grad(is_grads_batched=True)` uses. 20 to 22 are the four tests of
`torch.library.opcheck` each, for channels first and last.

With torch {torch}, Python {python}, the compiler `{compiler}`, and kernels in C:

{table}
{notes}"""


def page(formulas: Sequence[Formula], found: Sequence[Sequence[Result]], compiler: str) -> str:
    """The Markdown page, from the results of each formula."""
    notes: dict[str, int] = {}
    rows = [["", "check", *(f"`{f.label}`" for f in formulas)]]
    for check, results in zip(CHECKS, zip(*found, strict=True), strict=True):
        rows.append([str(check.number), check.name, *(_cell(r, notes) for r in results)])
    doors = [["door", "who is watching", "what answers", "checks"], *DOORS]
    own = [f"`{f.label}` is `{f.text}`." for f in formulas if f.label not in zoo]
    return TEXT.format(
        count=len(CHECKS), shape=SHAPE, doors=_table(doors), table=_table(rows),
        torch=torch.__version__.partition("+")[0], python=platform.python_version(),
        compiler=compiler, notes="".join(f"\n{line}\n" for line in (*own, *_notes(notes))),
    )  # fmt: skip


def _cell(result: Result, notes: dict[str, int]) -> str:
    """``ok``, or the number of the note that says what went wrong."""
    if result.ok:
        return "ok"
    reason = result.error.strip().splitlines()[0][:200]
    return f"fails [{notes.setdefault(reason, len(notes) + 1)}]"


def _notes(notes: Mapping[str, int]) -> list[str]:
    return [f"[{number}] `{reason}`" for reason, number in notes.items()]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *more = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *more))


def main(
    compiler: Annotated[str, typer.Option(help="A backend of torch.compile.")] = "inductor",
    output: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Run all checks of all formulas, a line each on stderr, and write the page."""
    formulas, found = [*(zoo[name] for name in NAMES), NESTED], []
    for formula in formulas:
        found.append(conformance(formula, compiler))
        failed = [result.check for result in found[-1] if not result.ok]
        seconds = sum(result.seconds for result in found[-1])
        print(f"{formula.label:18} {seconds:4.0f} s", *failed, sep="  ", file=sys.stderr)
    output.write_text(page(formulas, found, compiler), encoding="utf-8")
    raise typer.Exit(any(not result.ok for results in found for result in results))


if __name__ == "__main__":
    typer.run(main)
