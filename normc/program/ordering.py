"""Ordering: sums, products and symmetric functions with their operands in one order.

A sum is taken apart into numbers of terms, a product into a number and factors above and below;
both are put together again, fine terms and coarse factors first: ``2*gamma*x/std + x - mean + 1``.
Nothing is cancelled: ``x - x`` and ``x/x`` stay, for they may be NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from typing import Any

from normc.language.expr import Call, Const, Expr, Reduce, Var, call, children, const
from normc.program.simplify import LARGEST, Stop

_PRODUCTS = ("mul", "div", "neg", "pow")
_MAX_POWER = 16

_Terms = dict[tuple[Expr | None, bool], Fraction]
"""Numbers of terms, positive and negative ones apart; the term None is 1."""


@dataclass
class _Product:
    """``number * product(above) / product(below)``, each factor with its multiplicity."""

    number: Fraction = Fraction(1)
    above: Counter[Expr] = field(default_factory=Counter[Expr])
    below: Counter[Expr] = field(default_factory=Counter[Expr])


def _product(expr: Expr) -> _Product:
    """A tree of mul, div, neg and whole powers taken apart."""
    found = _Product()
    stack: list[tuple[Expr, int]] = [(expr, 1)]
    while stack:
        node, power = stack.pop()
        match node:
            case Const(value) if math.isfinite(value) and (value != 0 or power > 0):
                found.number *= Fraction(value) ** power
            case Call("neg", (a,)):
                found.number *= (-1) ** power
                stack.append((a, power))
            case Call("mul", (a, b)):
                stack += [(a, power), (b, power)]
            case Call("div", (a, b)):
                stack += [(a, power), (b, -power)]
            case Call("pow", (a, Const(e))) if e.is_integer() and 0 < abs(e * power) <= _MAX_POWER:
                stack.append((a, power * int(e)))
            case _:
                (found.above if power > 0 else found.below)[node] += abs(power)
    return found


def _number(value: Fraction) -> tuple[Expr, Expr]:
    """A positive number as a legal constant over a whole one: 2/3 stays so, 1/4 is 0.25 over 1."""
    if value == 1:
        return const(1), const(1)
    whole = value.denominator & (value.denominator - 1) and value.denominator <= 1_000_000
    try:
        over = float(value.numerator if whole else value)
    except OverflowError:
        raise Stop from None
    if over and not 1 / LARGEST <= over <= LARGEST:
        raise Stop
    return const(over), const(value.denominator if whole else 1)


def _is_sum(expr: Expr | None) -> bool:
    return isinstance(expr, Call) and expr.fn in ("add", "sub")


def _negated(terms: _Terms) -> _Terms:
    return {(rest, rest is not None and n > 0): -n for (rest, _), n in terms.items()}


class Order:
    """One order for the operands of everything that may be reordered."""

    def __init__(self) -> None:
        self._keys: dict[Expr, tuple[Any, ...]] = {}
        self._digests: dict[Expr, bytes] = {}

    def place(self, node: Expr) -> Expr:
        """A node over placed operands, itself in order."""
        match node:
            case Call("add" | "sub") | Call("neg", (Call("add" | "sub"),)):
                return self._sum(self._terms(node))
            case Call(fn) if fn in _PRODUCTS:
                number, rest = self._unsigned(node)
                if number == -1 and rest is not None and _is_sum(rest):
                    return self._sum(self._terms(-rest))
                return self._scaled(number, rest)
            case Call("max" | "min" as fn):
                return self._symmetric(fn, node)
            case Call("eq" | "ne" as fn, args):
                return call(fn, *sorted(args, key=self._key))
            case _:
                return node

    def _terms(self, expr: Expr) -> _Terms:
        """A tree of add, sub and neg taken apart."""
        found: _Terms = {}
        stack: list[tuple[Expr, int]] = [(expr, 1)]
        while stack:
            node, sign = stack.pop()
            match node:
                case Call("add" | "sub" as fn, (a, b)):
                    stack += [(b, sign if fn == "add" else -sign), (a, sign)]
                case Call("neg", (a,)) if _is_sum(a):
                    stack.append((a, -sign))
                case _:
                    number, rest = self._unsigned(node)
                    if rest is not None and abs(number) == 1 and _is_sum(rest):
                        stack.append((rest, sign * int(number)))
                    else:
                        key = rest, rest is not None and sign * number < 0
                        found[key] = found.get(key, Fraction(0)) + sign * number
        return found

    def _sum(self, terms: _Terms) -> Expr:
        """Fine terms before coarse ones, numbers last, a positive one in front if there is any."""
        ordered = self._in_order(terms)
        first = next((i for i, key in enumerate(ordered) if terms[key] >= 0), 0)
        ordered.insert(0, ordered.pop(first))
        value: Expr | None = None
        for key in ordered:
            part = self._scaled(abs(terms[key]), key[0])
            if value is None:
                value = -part if terms[key] < 0 else part
            else:
                value = value - part if terms[key] < 0 else value + part
        return const(0) if value is None else value

    def _in_order(self, terms: _Terms) -> list[tuple[Expr | None, bool]]:
        keyed = [
            (*self._fine_first(rest), minus, rest) for rest, minus in terms if rest is not None
        ]
        ordered: list[tuple[Expr | None, bool]] = [(k[-1], k[-2]) for k in sorted(keyed)]
        number = None, False
        return [*ordered, number] if terms.get(number) or not ordered else ordered

    def _unsigned(self, expr: Expr) -> tuple[Fraction, Expr | None]:
        """A product as its number and the rest of it, whose sums begin with a positive term."""
        if not (isinstance(expr, Const) or (isinstance(expr, Call) and expr.fn in _PRODUCTS)):
            return Fraction(1), expr
        parts = _product(expr)
        self._name_sigmoids(parts)
        for factors in (parts.above, parts.below):
            for node in [n for n in factors if _is_sum(n)]:
                terms = self._terms(node)
                if terms[self._in_order(terms)[0]] < 0:
                    power = factors.pop(node)
                    factors[self._sum(_negated(terms))] += power
                    parts.number *= (-1) ** power
        above = [self._power(n, parts.above[n]) for n in sorted(parts.above, key=self._key)]
        below = [self._power(n, parts.below[n]) for n in sorted(parts.below, key=self._key)]
        return parts.number, _quotient(above, below)

    def _name_sigmoids(self, parts: _Product) -> None:
        """``x/(1 + exp(-u))`` is ``x*sigmoid(u)``, whose derivative does not overflow."""
        for node in list(parts.below):
            match node:
                case Call("add", (Call("exp", (u,)), Const(1.0))):
                    sigmoid = call("sigmoid", self.place(-u))
                    parts.above[sigmoid] += parts.below.pop(node)
                case _:
                    pass

    def _power(self, node: Expr, times: int) -> Expr:
        """A repeated factor as powers that are legal in a formula."""
        powers = [_MAX_POWER] * (times // _MAX_POWER) + [times % _MAX_POWER] * (
            times % _MAX_POWER > 0
        )
        return _quotient([node if p == 1 else call("pow", node, p) for p in powers], []) or node

    def _scaled(self, number: Fraction, rest: Expr | None) -> Expr:
        """``number * rest``, the number in front, its denominator at the end."""
        over, under = _number(abs(number))
        if rest is None:
            value = over if under is const(1) else call("div", over, under)
        else:
            value = _with_number(over, rest)
            value = value if under is const(1) else call("div", value, under)
        return call("neg", value) if number < 0 else value

    def _symmetric(self, fn: str, node: Expr) -> Expr:
        """``max`` and ``min`` of several: each operand once."""
        operands: dict[Expr, None] = {}
        stack = [node]
        while stack:
            top = stack.pop()
            if isinstance(top, Call) and top.fn == fn:
                stack += top.args
            else:
                operands[top] = None
        first, *rest = sorted(operands, key=self._fine_first)
        for operand in rest:
            first = call(fn, first, operand)
        return first

    # --- keys ---

    def _fine_first(self, node: Expr) -> tuple[Any, ...]:
        number_last = isinstance(node, Const)
        axes, *others = self._key(node)
        return number_last, -axes, *others

    def _key(self, node: Expr) -> tuple[Any, ...]:
        """Coarse before fine, variables before functions, then by name, then by content."""
        if node not in self._keys:
            self._keys[node] = self._make_key(node)
        return self._keys[node]

    def _make_key(self, node: Expr) -> tuple[Any, ...]:
        axes = node.axes.value.bit_count()
        match node:
            case Const(value):
                return axes, 0, "", value, b""
            case Var(name):
                return axes, 1, name, 0, self._digest(node)
            case Call(fn):
                return axes, 2, fn, 0, self._digest(node)
            case Reduce(op):
                return axes, 3, op, 0, self._digest(node)

    def _digest(self, node: Expr) -> bytes:
        stack = [node]
        while stack:
            missing = [c for c in children(stack[-1]) if c not in self._digests]
            stack += missing
            if not missing:
                top = stack.pop()
                self._digests[top] = self._fingerprint(top)
        return self._digests[node]

    def _fingerprint(self, node: Expr) -> bytes:
        """A short hash of what a node is, the same in every process."""
        match node:
            case Const(value):
                head = f"const {value.hex()}"
            case Var(name, axes):
                head = f"var {name} {axes.value}"
            case Call(fn):
                head = f"call {fn}"
            case Reduce(op, over):
                head = f"reduce {op} {over.value}"
        below = b"".join(self._digests[child] for child in children(node))
        return blake2b(head.encode() + b"\0" + below, digest_size=12).digest()


def _quotient(above: Sequence[Expr], below: Sequence[Expr]) -> Expr | None:
    """The product of ``above`` over each of ``below`` in turn; None where there is nothing."""
    value: Expr | None = None
    for factor in above:
        value = factor if value is None else value * factor
    for divisor in below:
        value = (const(1) if value is None else value) / divisor
    return value


def _with_number(number: Expr, rest: Expr) -> Expr:
    """``number * rest`` with the number as the leftmost factor."""
    if number is const(1):
        return rest
    spine: list[Call] = []
    while isinstance(rest, Call) and rest.fn in ("mul", "div"):
        spine.append(rest)
        rest = rest.args[0]
    value = number if rest is const(1) else number * rest
    for node in reversed(spine):
        value = call(node.fn, value, node.args[1])
    return value
