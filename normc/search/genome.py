"""Genome: a layer as a graph of a space, how it is drawn, changed, and read as a formula."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from normc.errors import NormcError
from normc.language.axes import CHANNEL, Axis
from normc.language.definition import Definition, Param
from normc.language.expr import (
    Call,
    Const,
    Expr,
    Reduce,
    Var,
    call,
    children,
    postorder,
    var,
    variables,
)
from normc.language.show import show
from normc.program.canonical import canonical
from normc.search.space import Space


@dataclass(frozen=True)
class Node:
    """One operation on nodes before it: the initial ones are 0, 1, ..., then come the others."""

    op: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Genome:
    """A graph; its last node is the layer, and nodes that it does not need are dead."""

    nodes: tuple[Node, ...]

    def exprs(self, space: Space) -> list[Expr]:
        """Every node as an expression, initial ones first."""
        done = list(space.roots)
        for node in self.nodes:
            done.append(space.operation(node.op)(*[done[i] for i in node.inputs]))
        return done

    def expr(self, space: Space) -> Expr:
        """The layer, without the affine transform around it."""
        return self.exprs(space)[-1]

    def live(self, space: Space) -> tuple[bool, ...]:
        """Which of its nodes the layer needs."""
        start = len(space.roots)
        alive = {start + len(self.nodes) - 1}
        for i in range(len(self.nodes) - 1, -1, -1):
            if start + i in alive:
                alive.update(self.nodes[i].inputs)
        return tuple(start + i in alive for i in range(len(self.nodes)))

    @cached_property
    def code(self) -> str:
        """The graph as a line of text, by which a run stores it; `read` is the inverse."""
        return " ".join(f"{n.op}:{','.join(map(str, n.inputs))}" for n in self.nodes)


def read(code: str, space: Space) -> Genome:
    """The genome of a line of text; `NormcError` where it does not fit the space."""
    nodes: list[Node] = []
    for place, word in enumerate(code.split(), len(space.initial)):
        name, _, places = word.partition(":")
        numbers, row = places.split(","), space.table.get(name)
        sound = all(
            p.isascii() and p.isdecimal() and len(p) < 9 and int(p) < place for p in numbers
        )
        if row is None or len(numbers) != row.arity or not sound:
            raise NormcError(f"no node of this space: {word!r}")
        nodes.append(Node(name, tuple(map(int, numbers))))
    if not nodes:
        raise NormcError("a genome needs at least one node")
    return Genome(tuple(nodes))


# --- drawing and changing -----------------------------------------------------------------------


def draw(space: Space, chance: random.Random) -> Genome:
    """A random graph: node after node, each a random operation on random nodes before it."""
    start = len(space.initial)
    return Genome(tuple(_draw(space, chance, start + i) for i in range(space.nodes)))


def _draw(space: Space, chance: random.Random, before: int) -> Node:
    name = chance.choice(space.names)
    arity = space.operation(name).arity
    return Node(name, tuple(chance.randrange(before) for _ in range(arity)))


def mutate(genome: Genome, space: Space, chance: random.Random) -> Genome:
    """The graph with one node drawn anew, operation and operands; what reads it stays."""
    i = chance.randrange(len(genome.nodes))
    node = _draw(space, chance, len(space.initial) + i)
    return Genome((*genome.nodes[:i], node, *genome.nodes[i + 1 :]))


# --- as a formula -------------------------------------------------------------------------------

SYMMETRIC = ("add", "mul", "max", "min")
"""Functions whose operands may change places."""

PATIENCE = 60.0
"""Seconds for simplifying: so many that no layer of a search needs them, on no machine, and a graph
has one text."""

GAMMA, BETA = var("gamma", CHANNEL), var("beta", CHANNEL)


def formula(expr: Expr, space: Space) -> str:
    """A layer as a line of text, simplified: declarations, the expression, its affine transform."""
    whole = call("add", call("mul", expr, GAMMA), BETA)
    names = {v.name for v in variables([whole])}
    params = [p for name, p in space.params.items() if name in names]
    made = Definition((whole,), (*params, Param("gamma"), Param("beta", init=0.0)))
    return "; ".join(show(canonical(made, PATIENCE)).splitlines())


def form(expr: Expr) -> bytes:
    """A name for the expression, whatever the order of operands that may change places."""
    names: dict[Expr, bytes] = {}
    for node in postorder([expr]):
        below = [names[child] for child in children(node)]
        names[node] = blake2b(
            b"".join([_own(node), *_placed(node, below)]), digest_size=16
        ).digest()
    return names[expr]


def _placed(node: Expr, below: list[bytes]) -> list[bytes]:
    return sorted(below) if isinstance(node, Call) and node.fn in SYMMETRIC else below


def _own(node: Expr) -> bytes:
    """What a node is, apart from its operands."""
    match node:
        case Const(value):
            return f"const {value!r}".encode()
        case Var(name):
            return f"var {name}".encode()
        case Call(fn):
            return f"call {fn}".encode()
        case Reduce(op, over):
            return f"reduce {op} {over.value}".encode()


def crosses_samples(expr: Expr) -> bool:
    """Whether a statistic over the batch is among what is left of a layer."""
    return any(isinstance(n, Reduce) and n.over & Axis.N for n in postorder([expr]))


def reads_input(exprs: Sequence[Expr]) -> bool:
    """Whether x is among what is left of layers."""
    return any(isinstance(n, Var) and n.name == "x" for n in postorder(exprs))
