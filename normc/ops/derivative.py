"""Derivative: the gradients of a formula, each as a formula again, for people to read.

The backward program is put back together: saved statistics and counts become statistics over x, so
that ``d_x`` is an expression in x, the parameters and ``d_y``, which parses like any other.
"""

from __future__ import annotations

from normc.language.definition import Definition, Input
from normc.language.expr import Expr, Var, const, reduce, substitute, var, variables
from normc.language.reductions import counted
from normc.language.show import show
from normc.pipeline import COTANGENT, programs
from normc.program.algebra import share
from normc.program.canonical import canonical
from normc.program.latex import latex, latex_definition
from normc.program.program import Program, counts

DECLARATIONS = ("input ", "param ")
PATIENCE = 5.0
"""Seconds for one canonical form, so generous that the text does not depend on the machine."""


def derivatives(definition: Definition) -> dict[str, Definition]:
    """The gradients ``d_x``, ``d_v``, ... as formulas with inputs ``d_y`` (or ``d_y0``, ...)."""
    rows = (*definition.inputs, *definition.params)
    found = programs(definition, ("x", *(row.name for row in rows)))
    if found.backward is None:
        return {}
    values: dict[Var, Expr] = {}
    for program in (found.forward, found.backward):
        _resolve(program, values)
        if program is found.forward:  # backward may read a result
            outs = substitute([o.expr for o in program.outputs], values)
            values |= {o.var: e for o, e in zip(program.outputs, outs, strict=True)}
    cotangents = [i for i in found.backward.inputs if i.name.startswith(COTANGENT)]
    inputs = (*(Input(v.name, v.axes) for v in cotangents), *definition.inputs)
    gradients: dict[str, Definition] = {}
    outputs = {o.name: o.expr for o in found.backward.outputs}
    for name, out in found.gradients.items():
        (expr,) = substitute([outputs[out]], values)
        used = {v.name for v in variables([expr])}
        gradients[name] = Definition(
            tuple(share([expr])),
            tuple(p for p in definition.params if p.name in used),
            tuple(i for i in inputs if i.name in used),
        )
    return {name: canonical(gradient, PATIENCE) for name, gradient in gradients.items()}


def _resolve(program: Program, values: dict[Var, Expr]) -> None:
    """Add the meaning of a program's counts and statistics, as expressions over inputs."""
    for v in counts(program):
        values[v] = reduce("sum", counted(v), const(1))
    for stat in program.stats:
        (arg,) = substitute([stat.arg], values)
        values[stat.var] = reduce(stat.op, stat.over, arg)


def show_derivatives(definition: Definition) -> str:
    """Every gradient as text: ``d_x = ...``, and below it what its local names mean."""
    blocks = [_block(name, gradient) for name, gradient in derivatives(definition).items()]
    return "\n".join(blocks)


def _block(name: str, gradient: Definition) -> str:
    lines = [ln for ln in show(gradient).splitlines() if not ln.startswith(DECLARATIONS)]
    *local, result = lines
    return "\n".join([f"{name} = {result}", *(f"    with {line}" for line in local)])


def latex_derivatives(definition: Definition) -> str:
    """Every gradient in LaTeX, one per line."""
    found = derivatives(definition)
    return "\n".join(_named(name, latex_definition(gradient)) for name, gradient in found.items())


def _named(name: str, text: str) -> str:
    """LaTeX of a gradient under its own name instead of ``y``."""
    symbol = f"d_{{{latex(var(name.removeprefix(COTANGENT)))}}}"
    head, mark, tail = text.rpartition("y &= ")
    if mark:
        return f"{head}{symbol} &= {tail}"
    return symbol + text.removeprefix("y")
