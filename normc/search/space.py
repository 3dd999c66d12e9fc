"""Space: what layers can be made of. A space is data; `EVONORM` is the one of the paper.

    x, 0, v0, v1      the initial nodes: the input, a constant, two parameters per channel
    10 nodes          each one operation on nodes before it; the last one is the layer
    12 + 12           element-wise operations, and statistics: 3 moments over 4 sets of axes
    *gamma + beta     an affine transform per channel around it, outside of the graph

From Liu et al., Evolving Normalization-Activation Layers, arXiv 2004.02967, table 2. Where the
paper leaves open how operations are drawn, all of them are as likely. Division and logarithm have
no epsilon of their own: a layer that is not finite is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from normc.errors import NormcError
from normc.language.definition import Param
from normc.language.expr import Expr, substitute, variables
from normc.language.parse import parse

OPERANDS = ("a", "b", "c")
"""What the texts of operations call the nodes they read."""


@dataclass(frozen=True)
class Operation:
    """One thing a node can be."""

    name: str
    arity: int
    expr: Expr  # over its operands

    def __call__(self, *nodes: Expr) -> Expr:
        values = {v: nodes[OPERANDS.index(v.name)] for v in variables([self.expr])}
        return substitute([self.expr], values)[0]


@dataclass(frozen=True)
class Space:
    """Operations and initial nodes as text in the language of formulas, and the number of nodes.

    An operation is an expression over a, b and c: ``"MAX": "max(a, b)"``; a statistic is one too:
    ``"batch_std": "batch_std(a)"``. Another space is another table, in Python or read from a file:

    >>> Space({**EVONORM.operations, "SIN": "sin(a)"}, nodes=12).operation("SIN").arity
    1

    Raises `FormulaError` for a text that is no formula, `NormcError` for one without operands.
    """

    operations: Mapping[str, str]
    initial: tuple[str, ...] = ("x", "0", "v0", "v1")
    nodes: int = 10

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise NormcError(f"a space needs at least one node, not {self.nodes}")
        if not self.operations or not self.initial:
            raise NormcError("a space needs operations and initial nodes")
        assert self.table and self.roots  # every text is parsed now, not in the middle of a run

    @cached_property
    def table(self) -> dict[str, Operation]:
        """The operations by name."""
        return {name: _operation(name, text) for name, text in self.operations.items()}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the operations, in order."""
        return tuple(self.operations)

    @cached_property
    def roots(self) -> tuple[Expr, ...]:
        """The initial nodes."""
        return tuple(parse(text).results[0] for text in self.initial)

    @cached_property
    def params(self) -> dict[str, Param]:
        """The parameters of the initial nodes, by name."""
        every = [p for text in self.initial for p in parse(text).params]
        return {p.name: p for p in every}

    def operation(self, name: str) -> Operation:
        """The operation of a name."""
        return self.table[name]


def _operation(name: str, text: str) -> Operation:
    used = [o for o in OPERANDS if any(p.name == o for p in parse(text).params)]
    if not used:
        raise NormcError(
            f"the operation {name} reads no node: write it over a, b or c, not {text!r}"
        )
    declared = "\n".join(f"input {o}" for o in used)
    (expr,) = parse(f"{declared}\n{text}").results
    arity = OPERANDS.index(used[-1]) + 1
    return Operation(name, arity, expr)


_ELEMENTWISE = {
    "ADD": "a + b",
    "MUL": "a*b",
    "DIV": "a/b",
    "MAX": "max(a, b)",
    "NEG": "-a",
    "SIGMOID": "sigmoid(a)",
    "TANH": "tanh(a)",
    "EXP": "exp(a)",
    "LOG": "signed_log(a)",
    "ABS": "abs(a)",
    "SQUARE": "square(a)",
    "SQRT": "signed_sqrt(a)",
}
_AGGREGATIONS = {
    f"{axes}_{moment}": f"{axes}_{moment}(a)"
    for moment in ("mean", "rms", "std")
    for axes in ("batch", "layer", "instance", "group")
}

EVONORM = Space({**_ELEMENTWISE, **_AGGREGATIONS})
"""The space of the paper: 12 element-wise operations and 12 aggregations, 14 nodes in all."""
