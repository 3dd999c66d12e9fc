"""Recipe: what is computed, whatever the tensors are: a formula, its mode, and what was derived.

A recipe is also a line of text, which stands in graphs that `torch.compile` and `torch.export`
make, and in files these write. It is parsed like any formula, and never executed:

    recipe ::= mode "|" backend "|" name "|" tensors "|" {step ";"} newline formula
    step   ::= ("vjp" | "jvp" | "vmap") tensors
    tensors ::= names, separated by spaces
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

from normc.errors import NormcError
from normc.formula import Formula
from normc.language.axes import FULL, Axis
from normc.pipeline import Mode, Programs, programs, staged
from normc.program.steps import Kind, Stage, Step, cotangent, past, tangent


@dataclass(frozen=True)
class Recipe:
    """A computation on tensors called ``names``, in this order."""

    formula: Formula
    names: tuple[str, ...]
    mode: Mode = "batch"
    backend: str = "auto"
    steps: tuple[Step, ...] = ()

    def programs(self, wrt: tuple[str, ...] = ()) -> Programs:
        """Forward, and backward for the gradients of ``wrt``."""
        return programs(self.formula.definition, wrt, self.mode, self.steps)

    @cached_property
    def stage(self) -> Stage:
        """What is computed, as one program."""
        return staged(self.formula.definition, self.mode, self.steps)[0]

    @property
    def results(self) -> tuple[str, ...]:
        """The outputs that can be differentiated."""
        return self.stage.results

    @cached_property
    def outputs(self) -> dict[str, Axis]:
        """All outputs, the results first, and the axes over which they vary."""
        return {o.name: o.axes for o in self.stage.source.outputs}

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """The axes of every tensor that goes in."""
        definition = self.formula.definition
        known = {"x": FULL, **{row.name: row.axes for row in definition.inputs}}
        known |= {row.name: row.axes for row in definition.params}
        for step in range(len(self.steps)):
            known = self._known(known, step)
        read = {i.name: i.axes for i in self.stage.source.inputs}
        return {name: read.get(name, known.get(name, Axis(0))) for name in self.names}

    def _known(self, known: dict[str, Axis], step: int) -> dict[str, Axis]:
        """The axes of what may go in after a step, read or not."""
        kind, names = self.steps[step].kind, self.steps[step].names
        before = replace(self, steps=self.steps[:step])
        level = before.stage.level
        if kind == "vmap":
            return {n: a | Axis.N if n in names else a for n, a in known.items()}
        if kind == "jvp":
            return known | {tangent(level, n): known[n] for n in names}
        outs = {n: a for n, a in before.outputs.items() if n in before.results}
        more = {past(level, n): a for n, a in outs.items()}
        return known | more | {cotangent(n): a for n, a in outs.items()}

    @cached_property
    def full(self) -> int:
        """Where a tensor of x's shape goes in; there always is one."""
        return next(i for i, name in enumerate(self.names) if self.axes[name] == FULL)

    def then(self, kind: Kind, names: Sequence[str], tensors: Sequence[str]) -> Recipe:
        """What is derived from this one, computed from ``tensors``."""
        steps = (*self.steps, Step(kind, tuple(names)))
        return Recipe(self.formula, tuple(tensors), self.mode, self.backend, steps)

    @cached_property
    def text(self) -> str:
        """The recipe as text; `read` is the inverse."""
        steps = ";".join(f"{s.kind} {' '.join(s.names)}" for s in self.steps)
        return written(self.formula, self.names, self.mode, self.backend, steps)


def written(
    formula: Formula, names: Sequence[str], mode: Mode, backend: str, steps: str = ""
) -> str:
    """A recipe's text, put together from what can be read off while torch.compile traces."""
    return f"{mode}|{backend}|{formula.name}|{' '.join(names)}|{steps}\n{formula.text}"


@lru_cache(maxsize=4096)
def read(text: str) -> Recipe:
    """The recipe that a text stands for; `NormcError` or `FormulaError` if it is none."""
    head, _, formula = text.partition("\n")
    fields = head.split("|")
    if len(fields) != 5:
        raise NormcError(f"no recipe of normc's: {head[:80]!r}")
    mode, backend, name, names, steps = fields
    if not re.fullmatch(r"batch|track|frozen|local\d+", mode):
        raise NormcError(f"a recipe has no mode {mode!r}: expected batch, track, frozen or local")
    taken = tuple(_step(step) for step in steps.split(";") if step)
    return Recipe(Formula(formula, name), tuple(names.split()), mode, backend, taken)


def _step(text: str) -> Step:
    kind, *names = text.split()
    if kind not in ("vjp", "jvp", "vmap"):
        raise NormcError(f"no step is called {kind!r}: expected vjp, jvp or vmap")
    return Step(cast(Any, kind), tuple(names))
