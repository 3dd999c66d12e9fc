"""Emit: expressions to statements, each at the loop level of its axes; knows nothing of memory.

A backend's *skeleton* decides loops, loads and stores; this *printer* turns expressions into text
with the backend's table of spellings. `Block` cuts an expression DAG by loop level: what does not
vary in the innermost loop becomes a named temporary in the loop where it does, and what is used
twice is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from normc.language.axes import Axis
from normc.language.expr import Call, Const, Expr, Var, children, postorder, rewrite
from normc.language.primitives import COMPARISONS, OPERATORS, PRIMITIVES
from normc.program.program import is_scalar

_SYMBOLS = {fn: op for op, fn in (*OPERATORS.items(), *COMPARISONS.items()) if fn != "pow"}
_RANK = dict.fromkeys(COMPARISONS.values(), 1) | {"add": 2, "sub": 2, "mul": 3, "div": 3, "neg": 4}
_ATOM = 9


@dataclass(frozen=True)
class Spelling:
    """How a target language writes primitives; operators and comparisons are shared."""

    functions: Mapping[str, str]  # primitive -> format string over its arguments
    number: Callable[[float], str]

    @property
    def known(self) -> set[str]:
        """The primitives this language spells; all others expand into the core."""
        return set(self.functions) | set(_SYMBOLS) | {"neg"}


def expand(exprs: Iterable[Expr], spelling: Spelling) -> list[Expr]:
    """Replace primitives which the language does not spell by their bodies."""
    known = spelling.known

    def rule(node: Expr) -> Expr:
        if not isinstance(node, Call) or node.fn in known:
            return node
        return expand([PRIMITIVES[node.fn].expand(*node.args)], spelling)[0]

    return rewrite(exprs, rule)


def write(expr: Expr, spelling: Spelling, names: Mapping[int, str]) -> str:
    """One expression as text; ``names`` maps node ids to temporaries or variables already known."""
    done: dict[int, tuple[str, int]] = {}
    stack = [expr]
    while stack:
        node = stack[-1]
        if id(node) in names:
            done[id(node)] = (names[id(node)], _ATOM)
        waiting = [] if id(node) in done else [c for c in children(node) if id(c) not in done]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if id(node) not in done:
            done[id(node)] = _spell(node, spelling, done)
    return done[id(expr)][0]


def _spell(node: Expr, spelling: Spelling, done: Mapping[int, tuple[str, int]]) -> tuple[str, int]:
    match node:
        case Const(value):
            text = spelling.number(value)
            return text, 4 if text.startswith("-") else _ATOM
        case Call("neg", (a,)):
            return f"-{_within(done[id(a)], 5)}", _RANK["neg"]
        case Call(fn, (a, b)) if fn in _SYMBOLS:
            rank = _RANK[fn]
            left, right = _within(done[id(a)], rank), _within(done[id(b)], rank + 1)
            space = "" if rank == _RANK["mul"] else " "
            return f"{left}{space}{_SYMBOLS[fn]}{space}{right}", rank
        case Call(fn, args):
            return spelling.functions[fn].format(*(done[id(a)][0] for a in args)), _ATOM
        case _:
            raise AssertionError(f"no spelling for {node!r}")


def _within(part: tuple[str, int], rank: int) -> str:
    text, own = part
    return text if own >= rank else f"({text})"


Load = Callable[[Var], str]


@dataclass
class Block:
    """The statements of one loop nest: ``lines[depth]`` are the temporaries of loop ``depth``."""

    depths: Sequence[Axis]  # the axes bound once loop i has been entered; depth 0 is outside all
    spelling: Spelling
    load: Load  # text that reads a tensor variable, or names a scalar
    declare: str  # e.g. "const real {} = {};"
    prefix: str = "t"
    lines: list[list[str]] = field(default_factory=lambda: [])
    names: dict[int, str] = field(default_factory=lambda: {})
    count: int = 0  # temporaries named so far
    _alive: list[Expr] = field(default_factory=lambda: [])

    def depth(self, axes: Axis) -> int:
        """The outermost loop inside which a value over ``axes`` is known."""
        bound = Axis(0)
        for i, more in enumerate(self.depths):
            bound |= more
            if not axes & ~bound:
                return i
        raise AssertionError(f"{axes} is not bound by {self.depths}")

    @property
    def levels(self) -> int:
        """How many lists of statements there are."""
        return len(self.depths)

    def bind(self, value: Var, name: str) -> None:
        """Let a variable be read by a name that the skeleton has given it, without a load."""
        self._alive.append(value)
        self.names[id(value)] = name

    def leave(self) -> None:
        """Forget what was known only inside the loops: the next loops start from depth 0."""
        outside = {id(e) for e in postorder(self._alive) if not e.axes & ~self.depths[0]}
        self.names = {i: name for i, name in self.names.items() if i in outside}
        self.lines = []

    def prepare(self, exprs: Sequence[Expr]) -> list[str]:
        """Add the temporaries that ``exprs`` need and return the text of each."""
        roots = expand(exprs, self.spelling)
        self._alive += roots
        order = postorder(roots)
        users = _users(order)
        self.lines += [[] for _ in range(self.levels - len(self.lines))]
        for node in order:
            if id(node) not in self.names and self._wants_name(node, users):
                self._name(node)
        return [write(root, self.spelling, self.names) for root in roots]

    def _wants_name(self, node: Expr, users: Mapping[int, list[Expr]]) -> bool:
        if isinstance(node, Var):
            return True
        if isinstance(node, Const) or _is_comparison(node):
            return False
        above = users.get(id(node), [])
        return len(above) > 1 or any(self.depth(u.axes) > self.depth(node.axes) for u in above)

    def _name(self, node: Expr) -> None:
        if isinstance(node, Var) and is_scalar(node.name):
            self.names[id(node)] = self.load(node)
            return
        name = f"{self.prefix}{self.count}"
        text = write(node, self.spelling, self.names) if isinstance(node, Call) else ""
        if isinstance(node, Var):
            name, text = f"{node.name}_", self.load(node)
        self.names[id(node)] = name
        self.count += 1
        self.lines[self.depth(node.axes)].append(self.declare.format(name, text))


def _is_comparison(node: Expr) -> bool:
    return isinstance(node, Call) and node.fn in COMPARISONS.values()


def _users(order: Sequence[Expr]) -> dict[int, list[Expr]]:
    users: dict[int, list[Expr]] = {}
    for node in order:
        for child in children(node):
            users.setdefault(id(child), []).append(node)
    return users
