"""Expressions: four frozen, hash-consed node types.

    Expr ::= Const(value) | Var(name, axes) | Call(fn, args) | Reduce(op, axes, arg)

Equal expressions are one object: equality is ``is``, every pass memoises for free, and a formula is
a DAG whose size is its number of distinct nodes. Build nodes with `const`, `var`, `call`, `reduce`
or with Python's operators, never with the classes, which serve for matching. ``expr.axes`` is the
set of axes over which the value varies. No function here recurses: depth is bounded by memory
alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from normc.language.axes import NONE, Axis


class Node:
    """What the four node types share: operators, identity, and surviving copy and pickle."""

    axes: Axis

    def __add__(self, other: Expr | float) -> Expr:
        return call("add", self, other)

    def __radd__(self, other: float) -> Expr:
        return call("add", other, self)

    def __sub__(self, other: Expr | float) -> Expr:
        return call("sub", self, other)

    def __rsub__(self, other: float) -> Expr:
        return call("sub", other, self)

    def __mul__(self, other: Expr | float) -> Expr:
        return call("mul", self, other)

    def __rmul__(self, other: float) -> Expr:
        return call("mul", other, self)

    def __truediv__(self, other: Expr | float) -> Expr:
        return call("div", self, other)

    def __rtruediv__(self, other: float) -> Expr:
        return call("div", other, self)

    def __neg__(self) -> Expr:
        return call("neg", self)

    def __pow__(self, other: Expr | float) -> Expr:
        return call("pow", self, other)

    def __copy__(self) -> Node:
        return self

    def __deepcopy__(self, memo: object) -> Node:
        return self


@dataclass(frozen=True, eq=False)
class Const(Node):
    """A number."""

    value: float
    axes: Axis = NONE

    def __reduce__(self) -> tuple[Any, ...]:
        return const, (self.value,)


@dataclass(frozen=True, eq=False)
class Var(Node):
    """A tensor or scalar known by name: an input, a parameter, a statistic, ``eps``, a count."""

    name: str
    axes: Axis

    def __reduce__(self) -> tuple[Any, ...]:
        return var, (self.name, self.axes)


@dataclass(frozen=True, eq=False)
class Call(Node):
    """A primitive applied element by element; its axes are the union of its arguments'."""

    fn: str
    args: tuple[Expr, ...]
    axes: Axis

    def __reduce__(self) -> tuple[Any, ...]:
        return call, (self.fn, *self.args)


@dataclass(frozen=True, eq=False)
class Reduce(Node):
    """A statistic: ``op`` of ``arg`` over ``over``, as if ``arg`` were broadcast to x's shape."""

    op: str
    over: Axis
    arg: Expr
    axes: Axis

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce, (self.op, self.over, self.arg)


Expr = Const | Var | Call | Reduce

_table: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
_lock = threading.Lock()


def _intern(key: tuple[object, ...], make: Callable[[], Any]) -> Any:
    with _lock:
        node = _table.get(key)
        if node is None:
            node = _table[key] = make()
        return node


def const(value: float) -> Const:
    """The number ``value``; -0.0 and 0.0 are different nodes."""
    number = float(value)
    return _intern(("const", number.hex()), lambda: Const(number))


def var(name: str, axes: Axis = NONE) -> Var:
    """The named value, varying over ``axes``."""
    return _intern(("var", name, axes), lambda: Var(name, axes))


def call(fn: str, *args: Node | float) -> Call:
    """Primitive ``fn`` applied to expressions or numbers."""
    exprs: tuple[Any, ...] = tuple(a if isinstance(a, Node) else const(a) for a in args)
    axes = NONE
    for arg in exprs:
        axes |= arg.axes
    return _intern((fn, *map(id, exprs)), lambda: Call(fn, exprs, axes))


def reduce(op: str, over: Axis, arg: Expr) -> Reduce:
    """Reduction ``op`` of ``arg`` over the axes ``over``."""
    return _intern(("reduce", op, over, id(arg)), lambda: Reduce(op, over, arg, arg.axes & ~over))


def children(expr: Expr) -> tuple[Expr, ...]:
    """The direct operands of a node."""
    if isinstance(expr, Call):  # `match` is three times slower, and every pass comes through here
        return expr.args
    return (expr.arg,) if isinstance(expr, Reduce) else ()


def with_children(expr: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same node over other operands."""
    match expr:
        case Call(fn, _):
            return call(fn, *args)
        case Reduce(op, over, _):
            return reduce(op, over, args[0])
        case _:
            return expr


def postorder(roots: Iterable[Expr]) -> list[Expr]:
    """Every distinct node below ``roots``, operands before their users, in a stable order."""
    seen: set[int] = set()
    order: list[Expr] = []
    stack: list[Any] = list(roots)[::-1]  # nodes to visit, and (node,) once its operands are done
    while stack:
        node = stack.pop()
        if type(node) is tuple:
            order.append(node[0])
        elif id(node) not in seen:
            seen.add(id(node))
            below = children(node)
            if below:
                stack.append((node,))
                stack += below[::-1]
            else:
                order.append(node)
    return order


def rewrite(roots: Iterable[Expr], rule: Callable[[Expr], Expr]) -> list[Expr]:
    """Apply ``rule`` to every node bottom-up, once per distinct node, and return the new roots."""
    targets = list(roots)
    done: dict[int, Expr] = {}
    for node in postorder(targets):
        below = children(node)
        args = tuple([done[id(child)] for child in below])
        done[id(node)] = rule(node if args == below else with_children(node, args))
    return [done[id(root)] for root in targets]


def substitute(roots: Iterable[Expr], values: Mapping[Var, Expr]) -> list[Expr]:
    """Replace variables by expressions."""
    return rewrite(roots, lambda node: values.get(node, node) if isinstance(node, Var) else node)


def variables(roots: Iterable[Expr]) -> list[Var]:
    """The distinct variables below ``roots``, in order of first use."""
    return [node for node in postorder(roots) if isinstance(node, Var)]
