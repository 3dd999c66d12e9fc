"""Printing: expressions and definitions as text that parses back to the same objects.

Brackets are as few as Python's precedence allows. Nothing recurses: texts are made bottom-up, once
for every distinct node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count

from normc.language import axes, names
from normc.language.axes import AXIS_SETS
from normc.language.definition import Definition, Input, Param
from normc.language.expr import (
    Call,
    Const,
    Expr,
    Reduce,
    Var,
    children,
    const,
    postorder,
    variables,
)
from normc.language.primitives import COMPARISONS, OPERATORS

_COMPARE, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(6)

_SYMBOL = {name: symbol for symbol, name in (OPERATORS | COMPARISONS).items()}
_LEVELS = {
    "add": (_SUM, _SUM, _PRODUCT),
    "sub": (_SUM, _SUM, _PRODUCT),
    "mul": (_PRODUCT, _PRODUCT, _SIGN),
    "div": (_PRODUCT, _PRODUCT, _SIGN),
    "pow": (_POWER, _ATOM, _SIGN),
} | dict.fromkeys(COMPARISONS.values(), (_COMPARE, _SUM, _SUM))
"""Binary operators: how tightly the whole binds, and how tightly its two operands must."""

_SETS = {row.axes: row.name for row in AXIS_SETS.values()}

_Text = tuple[str, int]  # a text and how tightly it binds
_NAMELESS: Mapping[Expr, str] = {}


def show_expr(expr: Expr, named: Mapping[Expr, str] = _NAMELESS) -> str:
    """The text of ``expr``; a node below it that is in ``named`` is shown by its name.

    >>> from normc.language.definition import X as x
    >>> show_expr((x - 1) * -x / (x * x))
    '(x - 1)*-x/(x*x)'
    """
    texts: dict[Expr, _Text] = {}
    for node in postorder([expr]):
        if node in named and node is not expr:
            texts[node] = named[node], _ATOM
        else:
            texts[node] = _text(node, [texts[child] for child in children(node)])
    return texts[expr][0]


def _text(node: Expr, parts: list[_Text]) -> _Text:
    match node:
        case Const(value):
            text = repr(value).removesuffix(".0")
            return text, _SIGN if text.startswith("-") else _ATOM
        case Var(name):
            return name, _ATOM
        case Reduce(op, over):
            head = f"{_SETS[over]}_{op}" if over in _SETS else f"{op}[{axes.spell(over)}]"
            return f"{head}({parts[0][0]})", _ATOM
        case Call("neg"):
            return f"-{_bracket(parts[0], _SIGN)}", _SIGN
        case Call(fn) if fn in _LEVELS:
            return _infix(fn, *parts)
        case Call(fn):
            return f"{fn}({', '.join(text for text, _ in parts)})", _ATOM


def _infix(fn: str, left: _Text, right: _Text) -> _Text:
    level, least_left, least_right = _LEVELS[fn]
    symbol = _SYMBOL[fn] if level > _SUM else f" {_SYMBOL[fn]} "
    return f"{_bracket(left, least_left)}{symbol}{_bracket(right, least_right)}", level


def _bracket(text: _Text, least: int) -> str:
    return text[0] if text[1] >= least else f"({text[0]})"


def show(definition: Definition) -> str:
    """Text that parses back to ``definition``, whatever it was written like.

    >>> from normc.language.parse import parse
    >>> print(show(parse("h = exp(x)·v/group_rms(x); h²·γ - h")))
    t0 = exp(x)*v/group_rms(x)
    t0**2*gamma - t0
    """
    named = _locals(definition)
    lines = [f"{name} = {show_expr(node, named)}" for node, name in named.items()]
    results = ", ".join(named.get(node) or show_expr(node, named) for node in definition.results)
    return "\n".join([*_declarations(definition, [*named, *definition.results]), *lines, results])


def _locals(definition: Definition) -> dict[Expr, str]:
    """The nodes worth a name of their own, operands before their users."""
    order = postorder(definition.results)
    length = _lengths(order)
    uses = Counter(definition.results)
    shared: set[Expr] = set()
    for node in reversed(order):  # users before their operands
        if _is_worth_naming(node, uses[node], length[node]):
            shared.add(node)
        for child in children(node):
            uses[child] += 1 if node in shared else uses[node]
    fresh = _fresh_names(definition)
    return {node: next(fresh) for node in order if node in shared}


def _lengths(order: list[Expr]) -> dict[Expr, int]:
    """About how long each node's text is, without any local names."""
    length: dict[Expr, int] = {}
    for node in order:
        parts: list[_Text] = [("", _ATOM) for _ in children(node)]
        length[node] = len(_text(node, parts)[0]) + sum(length[child] for child in children(node))
    return length


def _is_worth_naming(node: Expr, uses: int, length: int) -> bool:
    """Whether a local name makes the text noticeably shorter; conditions cannot have one."""
    if isinstance(node, Const | Var) or (
        isinstance(node, Call) and node.fn in COMPARISONS.values()
    ):
        return False
    return (uses - 1) * (length - len("t0*")) > 3


def _fresh_names(definition: Definition) -> Iterator[str]:
    taken = {row.name for row in (*definition.params, *definition.inputs)}
    return (name for i in count() if (name := f"t{i}") not in taken)


def _declarations(definition: Definition, roots: list[Expr]) -> list[str]:
    """Every input, and as few parameters as give the others their order and initial value."""
    params = definition.params
    mentioned = variables(roots)
    first_free = len(params)
    while first_free and _is_implied(params[first_free - 1 :], mentioned):
        first_free -= 1
    return [_declare(row) for row in (*params[:first_free], *definition.inputs)]


def _is_implied(last: tuple[Param, ...], mentioned: list[Var]) -> bool:
    """Whether the ``last`` parameters come out the same when nothing declares them."""
    wanted = [row.var for row in last]
    order = [node for node in mentioned if node in wanted]
    return order == wanted and all(row == names.free(row.name) for row in last)


def _declare(row: Param | Input) -> str:
    over = f"[{axes.spell(row.axes)}]" if row.axes else ""
    if isinstance(row, Input):
        return f"input {row.name}{'' if row.axes == axes.FULL else over}"
    return f"param {row.name}{over} = {show_expr(const(row.init))}"
