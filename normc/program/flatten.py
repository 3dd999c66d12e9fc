"""Flatten: expressions with statistics inside become a straight-line Program.

Surface statistics are lowered to core rows (`std` to `sqrt(var + eps)`), a statistic over axes that
its argument lacks loses them (a sum is multiplied by their count instead), and equal statistics are
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from normc.language.axes import FULL, Axis
from normc.language.definition import Definition
from normc.language.expr import Expr, Reduce, Var, reduce, rewrite
from normc.language.reductions import REDUCTIONS, count
from normc.program.program import Output, Program, Stat, restrict, tensors


class Builder:
    """Collects statistics under fresh names; equal ones (same op, axes, argument) are one."""

    def __init__(self, known: Iterable[Stat] = (), taken: Iterable[str] = ()) -> None:
        self.stats: list[Stat] = []
        self._found: dict[tuple[str, Axis, int], Var] = {}
        self._kept_alive: list[Expr] = []
        self._taken = {*taken, *(s.name for s in known)}
        self._next = 0
        for stat in known:
            self._found[stat.op, stat.over, id(stat.arg)] = stat.var
            self._kept_alive.append(stat.arg)

    def _fresh(self) -> str:
        while (name := f"s{self._next}") in self._taken:
            self._next += 1
        self._taken.add(name)
        return name

    def stat(self, op: str, over: Axis, arg: Expr, start: float = 0.0) -> Var:
        """The variable that holds ``op[over] arg``, over axes which the argument has."""
        key = (op, over, id(arg))
        if key not in self._found:
            stat = Stat(self._fresh(), op, over, arg, start)
            self.stats.append(stat)
            self._found[key] = stat.var
        return self._found[key]

    def settle(self, op: str, over: Axis, arg: Expr, start: float = 0.0) -> Expr:
        """``op[over] arg`` over any axes, as an expression of statistics collected here."""
        row = REDUCTIONS[op]
        present, missing = over & arg.axes, over & ~arg.axes
        value = self.stat(op, present, arg, start) if present else row.single(arg)
        return row.repeat(value, count(missing)) if missing else value

    def lower(self, node: Expr, start: float | None = None) -> Expr:
        """Replace a `Reduce` whose argument is flat; other nodes pass."""
        if not isinstance(node, Reduce):
            return node
        row = REDUCTIONS[node.op]
        begin = row.running if start is None else start
        if row.lower is None:
            return self.settle(node.op, node.over, node.arg, begin)
        below = row.lower(node.arg, node.over)
        return rewrite([below], lambda inner: self.lower(inner, begin))[0]


def flatten(
    inputs: Sequence[Var], outputs: Sequence[Output], known: Sequence[Stat] = ()
) -> Program:
    """The Program of expressions which may hold statistics; ``known`` ones are read as inputs."""
    exprs = [o.expr for o in outputs]
    taken = {v.name for v in (*inputs, *tensors(exprs))} | {o.name for o in outputs}
    builder = Builder(known, taken)
    done = rewrite(exprs, builder.lower)
    flat = [Output(o.name, o.axes, e) for o, e in zip(outputs, done, strict=True)]
    candidates = (*inputs, *(s.var for s in known))
    return restrict(Program(tuple(candidates), tuple(builder.stats), ()), flat)


def flatten_definition(definition: Definition) -> Program:
    """The forward Program of a formula: outputs ``y`` (or ``y0``, ``y1``, ...) of x's shape."""
    results, inputs = definition.results, tensors(definition.results)
    names = _result_names(len(results), {v.name for v in inputs})
    outputs = [Output(name, FULL, expr) for name, expr in zip(names, results, strict=True)]
    order = {"x": -1, **{p.name: i for i, p in enumerate((*definition.inputs, *definition.params))}}
    inputs.sort(key=lambda v: order[v.name])
    return flatten(inputs, outputs)


def _result_names(count: int, taken: set[str]) -> list[str]:
    """What results are called; a user may have called a tensor ``y``, or like a gradient of it."""
    numbers = [str(i) for i in range(count)] if count > 1 else [""]
    for stem in ("y", "out", "result", *(f"result_{i}" for i in range(len(taken)))):
        names = [stem + number for number in numbers]
        if taken.isdisjoint([*names, *(f"d_{name}" for name in names)]):
            return names
    raise AssertionError("fewer names are taken than were tried")


def stack(expr: Expr, over: Axis) -> Expr:
    """The adjoint of a broadcast: the sum over the axes along which a value was repeated."""
    return reduce("sum", over, expr) if over else expr
