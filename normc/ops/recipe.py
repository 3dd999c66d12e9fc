"""Recipe: what is computed, whatever the tensors are: a formula, its mode, and what was derived.

A recipe is also a line of text, which stands in graphs that `torch.compile` and `torch.export`
make, and in files these write. It is parsed like any formula, and never executed:

    recipe ::= edition "|" mode "|" backend "|" name "|" tensors "|" {step ";"} newline formula
    step   ::= ("vjp" | "jvp" | "vmap") tensors
    tensors ::= names, separated by spaces

The edition says by which normc the text was written. Any other reads it; but caches of compiled
graphs, which hold what forward hands to backward in an order of normc's, take it for another text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from normc.backends.contract import BACKENDS
from normc.errors import NormcError
from normc.formula import Formula
from normc.language.axes import FULL, Axis
from normc.pipeline import Mode, Programs, batch_levels, programs, staged
from normc.program.running import LOCAL
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
        return written(self.formula, self.names, self.mode, self.backend, edition(), steps)


def written(
    formula: Formula, names: Sequence[str], mode: Mode, backend: str, made: str, steps: str = ""
) -> str:
    """A recipe's text, put together from what can be read off while torch.compile traces."""
    fields = f"{made}|{mode}|{backend}|{formula.name}|{' '.join(names)}|{steps}"
    return f"{fields}\n{formula.text}"


@cache
def edition() -> str:
    """A name for the code that derives programs: the start of its sha256."""
    here = Path(__file__).parent.parent
    files = sorted(f for d in ("language", "program", "ops") for f in here.glob(f"{d}/*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=4096)
def read(text: str) -> Recipe:
    """The recipe that a text stands for; `NormcError` or `FormulaError` if it is none."""
    head, _, formula = text.partition("\n")
    fields = head.split("|")
    if len(fields) != 6:
        raise NormcError(f"no recipe of normc's: {head[:80]!r}")
    _, mode, backend, name, names, steps = fields
    if not re.fullmatch(r"batch|track|frozen|synced|local\d+", mode):
        raise NormcError(
            f"a recipe has no mode {mode!r}: expected batch, track, frozen, synced or local0, ..."
        )
    if backend not in ("auto", *BACKENDS):
        raise NormcError(f"a recipe's backend is {backend!r}: expected auto, {', '.join(BACKENDS)}")
    taken = tuple(_step(step) for step in steps.split(";")) if steps else ()
    recipe = Recipe(Formula(formula, name), tuple(names.split()), mode, backend, taken)
    _check(recipe)
    return recipe


def _step(text: str) -> Step:
    kind, *names = text.split() or [""]
    if kind not in ("vjp", "jvp", "vmap"):
        raise NormcError(f"no step is called {kind!r}: expected vjp, jvp or vmap")
    if len(names) != len(set(names)) or not (names or kind == "vmap"):
        raise NormcError(f"a {kind} needs tensors, each once: {text!r}")
    return Step(cast(Any, kind), tuple(names))


def _check(recipe: Recipe) -> None:
    """Raise `NormcError` unless there is what the mode and every step need."""
    several = len(batch_levels(recipe.formula.definition))
    level = recipe.mode.removeprefix(LOCAL)
    if level.isdecimal() and int(level) >= several:
        raise NormcError(f"the formula has {several} levels of batch statistics: no {recipe.mode}")
    for i, step in enumerate(recipe.steps):
        before = replace(recipe, steps=recipe.steps[:i]).stage.source
        unknown = set(step.names).difference(v.name for v in before.inputs)
        if unknown and step.kind != "vmap":  # a batch may also vary over what is not read
            raise NormcError(f"nothing is called `{min(unknown)}` where {step.kind} is taken")
    if len(recipe.names) != len(set(recipe.names)) or FULL not in recipe.axes.values():
        raise NormcError(f"a recipe needs tensors, each once, and x: {' '.join(recipe.names)!r}")
