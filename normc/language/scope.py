"""Scope: what the names of one formula mean, and every rule about them.

Positions are offsets into the formula's text; they end up under the caret of an error.
"""

from __future__ import annotations

from normc.errors import FormulaError
from normc.language import names
from normc.language.axes import Axis
from normc.language.check import PARAMS, Meter
from normc.language.definition import Definition, Input, Param, X
from normc.language.expr import Expr, call, reduce
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import EPS, REDUCTIONS


class Scope:
    """The names of one formula, in the order in which they are first mentioned."""

    def __init__(self) -> None:
        self._values: dict[str, Expr] = {X.name: X, EPS.name: EPS}
        self._params: list[Param] = []
        self._inputs: list[Input] = []
        self._unused: dict[str, int] = {}  # declared or defined names, and where
        self._free: set[str] = set()
        self._meter = Meter()

    def declare(self, row: Param | Input, at: int) -> None:
        """Give a declared parameter or input its name."""
        self.define(row.name, row.var, at)
        if isinstance(row, Input):
            self._inputs.append(row)
        else:
            self._learn(row, at)

    def define(self, name: str, value: Expr, at: int) -> None:
        """Give ``name`` its value, once and before its first use."""
        if problem := names.untakeable(name):
            raise FormulaError(problem, position=at)
        if name in self._values:
            how = "used before it is defined" if name in self._free else "defined twice"
            raise FormulaError(f"`{name}` is {how}", position=at)
        self._values[name] = value
        self._unused[name] = at

    def lookup(self, name: str, at: int) -> Expr:
        """The value of ``name``; a name nobody defined is a parameter per channel."""
        self._unused.pop(name, None)
        if name not in self._values:
            if problem := names.misuse(name):
                raise FormulaError(problem, position=at)
            param = names.free(name)
            self._learn(param, at)
            self._free.add(name)
            self._values[name] = param.var
        return self._values[name]

    def _learn(self, param: Param, at: int) -> None:
        if len(self._params) == PARAMS:
            raise FormulaError(f"a formula has at most {PARAMS} parameters", position=at)
        self._params.append(param)

    def apply(self, fn: str, args: tuple[Expr, ...], at: int) -> Expr:
        """The primitive ``fn`` of ``args``."""
        return self._grow(call(fn, *args), at)

    def call(self, name: str, args: tuple[Expr, ...], at: int) -> Expr:
        """``name(args)`` as it is written: a function or a statistic over a named set of axes."""
        if found := names.statistic(name):
            self._count(name, ("x",), args, at)
            return self.reduce(*found, args[0], at)
        if names.is_function(name):
            self._count(name, PRIMITIVES[name].args, args, at)
            return self.apply(name, args, at)
        if name in self._values:
            problem = f"`{name}` is not a function; to multiply, write `{name}*(...)`"
            raise FormulaError(problem, position=at)
        raise FormulaError(names.unknown(name), position=at)

    def _count(self, name: str, wanted: tuple[str, ...], args: tuple[Expr, ...], at: int) -> None:
        if len(args) != len(wanted):
            needs = f"`{name}({', '.join(wanted)})` takes {len(wanted)} argument"
            hint = f"; the statistic is `group_{name}(x)`" if name in REDUCTIONS else ""
            raise FormulaError(
                f"{needs}{'s' * (len(wanted) > 1)}, not {len(args)}{hint}", position=at
            )

    def reduce(self, op: str, axes: Axis, arg: Expr, at: int) -> Expr:
        """The statistic ``op`` of ``arg`` over ``axes``."""
        if op not in REDUCTIONS:
            raise FormulaError(names.unknown_statistic(op), position=at)
        return self._grow(reduce(op, axes, arg), at)

    def _grow(self, node: Expr, at: int) -> Expr:
        self._meter.add(node, at)
        return node

    def close(self, results: tuple[Expr, ...]) -> Definition:
        """The finished definition."""
        for name, place in self._unused.items():
            raise FormulaError(f"`{name}` is never used", position=place)
        return Definition(results, tuple(self._params), tuple(self._inputs))
