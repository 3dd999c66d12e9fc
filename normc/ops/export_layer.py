"""What is exported: a formula under the name of its function, with its programs and jobs."""

from __future__ import annotations

from dataclasses import dataclass

from normc.backends.contract import Job
from normc.errors import NormcError
from normc.formula import Formula
from normc.language.axes import CHANNEL, NONE
from normc.language.definition import Input, Param
from normc.language.expr import Reduce, postorder
from normc.pipeline import COTANGENT, Programs, Target, jobs, programs
from normc.program.program import Program
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

ORDERS = {"channels_first": CHANNELS_FIRST, "channels_last": CHANNELS_LAST}
"""How axes may lie in memory; kernels are printed for both."""


@dataclass(frozen=True)
class Layer:
    """A formula that has a derivative, and what its exported functions take and return."""

    formula: Formula
    name: str
    found: Programs
    backward: Program

    @property
    def rows(self) -> tuple[Input | Param, ...]:
        """What a call is given beside x, in order."""
        return (*self.formula.inputs, *self.formula.params)

    @property
    def given(self) -> tuple[str, ...]:
        """The names of everything that a call is given."""
        return ("x", *(row.name for row in self.rows))

    @property
    def splits(self) -> bool:
        """Whether a statistic treats groups and the channels in them differently."""
        nodes = postorder(self.formula.definition.results)
        return any(isinstance(e, Reduce) and e.over & CHANNEL not in (CHANNEL, NONE) for e in nodes)

    @property
    def cotangents(self) -> tuple[str, ...]:
        """What arrives at the results."""
        return tuple(COTANGENT + y for y in self.found.results)

    @property
    def kept(self) -> tuple[str, ...]:
        """The tensors that forward keeps for backward."""
        names = (i.name for i in self.backward.inputs)
        return tuple(name for name in names if name not in self.cotangents)

    @property
    def parts(self) -> dict[str, tuple[Program, tuple[str, ...]]]:
        """Forward and backward, each with the names of what its functions return."""
        gradients = tuple(o.name for o in self.backward.outputs)
        forward = (*self.found.results, *self.found.saved)
        return {"forward": (self.found.forward, forward), "backward": (self.backward, gradients)}

    def jobs(self) -> list[tuple[str, Job]]:
        """The work of kernels: for each order in memory, forward and backward."""
        text = "; ".join(self.formula.shown.splitlines())
        return [
            (order, job)
            for order, axes in ORDERS.items()
            for job in jobs(
                f"{self.name}_{order}",
                text,
                self.found,
                Target("triton", "float32", axes, unit=False),
            )
        ]


def layer(formula: Formula, name: str) -> Layer:
    """Derive; raises `NormcError` where there is nothing to derive, or two tensors share a name."""
    rows = (*formula.inputs, *formula.params)
    given = ("x", *(row.name for row in rows))
    several = len(formula.definition.results) > 1
    results = [f"y{i}" for i in range(len(formula.definition.results))] if several else ["y"]
    taken = {*results, *(COTANGENT + name for name in (*results, *given))}
    for row in rows:
        if row.name in taken:
            raise NormcError(
                f"`{row.name}` is also what a result or a gradient is called in an exported file: "
                "give the parameter or input another name"
            )
    found = programs(formula.definition, given)
    assert found.backward is not None  # what can be compiled reads x
    return Layer(formula, name, found, found.backward)
