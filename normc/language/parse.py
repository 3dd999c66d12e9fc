"""Parsing: the only file that knows lark.

The grammar's callbacks build expressions while the text is read: there is no tree, and nothing
recurses. What they build comes from a fixed set of constructors; no part of a text is executed.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NoReturn, TypeVar, cast

from lark import Lark, Token, Transformer, UnexpectedCharacters, UnexpectedToken, v_args

from normc.errors import FormulaError
from normc.language import check, names
from normc.language.axes import FULL, LETTERS, NONE, Axis
from normc.language.definition import Definition, Input, Param
from normc.language.expr import Const, Expr, const
from normc.language.mistakes import CHARACTERS, EXPECTED, SYNTAX
from normc.language.primitives import COMPARISONS, OPERATORS
from normc.language.scope import Scope

_OPERATORS = OPERATORS | {"·": "mul", "⋅": "mul", "×": "mul", "−": "sub"}
_SUPERSCRIPTS = {"²": 2, "³": 3}

_Item = TypeVar("_Item", Expr, Token)

_scope: ContextVar[Scope] = ContextVar("scope")
_building = threading.Lock()


def parse(text: str) -> Definition:
    """Read a formula; the only error is `FormulaError`, with a caret under the place.

    >>> [param.name for param in parse("x / group_std(x) * gamma + beta").params]
    ['gamma', 'beta']
    """
    cleaned = text
    scope = _scope.set(Scope())
    try:
        cleaned = check.text(text)
        return cast(Definition, _parser().parse(cleaned))
    except FormulaError as error:
        raise FormulaError(error.message, text, error.position) from None
    except UnexpectedCharacters as error:
        raise FormulaError(CHARACTERS[error.char], text, error.pos_in_stream) from None
    except UnexpectedToken as error:
        is_end = error.token.type == "$END"
        position = len(cleaned.rstrip()) if is_end else error.token.start_pos
        raise FormulaError(_explain(error), text, position) from None
    finally:
        _scope.reset(scope)


def grammar() -> str:
    """The text of the grammar, from the installed package or the folder beside this one."""
    try:
        return resources.files("normc.grammar").joinpath("formula.lark").read_text("utf-8")
    except ModuleNotFoundError:  # a checkout that was never installed
        return Path(__file__).parents[2].joinpath("grammar", "formula.lark").read_text("utf-8")


def _parser() -> Lark:
    with _building:
        return _build()


@cache
def _build() -> Lark:
    return Lark(grammar(), parser="lalr", lexer="basic", transformer=_Builder())


@cache
def _failures() -> dict[str, UnexpectedToken]:
    """How each example in the table of mistakes fails, found once."""
    return {example: _failure(example) for _, examples in SYNTAX for example in examples}


def _failure(example: str) -> UnexpectedToken:
    scope = _scope.set(Scope())
    try:
        _parser().parse(check.text(example))
    except UnexpectedToken as error:
        return _without_stack(error)
    finally:
        _scope.reset(scope)
    raise AssertionError(f"not a mistake: {example}")


def _without_stack(error: UnexpectedToken) -> UnexpectedToken:
    """Lark finds two states equal only at equal depth; mistakes are the same at any depth."""
    error.state = error.state.position
    return error


def _explain(error: UnexpectedToken) -> str:
    def fail(example: str) -> NoReturn:
        raise failures[example].with_traceback(None)

    def is_alike(example: str) -> bool:
        return failures[example].token.type == error.token.type

    failures = _failures()
    rows = [(message, list(filter(is_alike, examples))) for message, examples in SYNTAX]
    found = _without_stack(error).match_examples(fail, rows, use_accepts=False)
    return found or _expectation(error)


def _expectation(error: UnexpectedToken) -> str:
    wanted = next(text for terminal, text in EXPECTED.items() if terminal in error.expected)
    return f"expected {wanted} here"


def _at(token: Token) -> int:
    return token.start_pos or 0


def _axes(letters: list[Token], allowed: str) -> Axis:
    """The set of axes that ``letters`` name, each of them a letter of ``allowed``."""
    axes = NONE
    for letter in letters:
        if letter not in tuple(allowed):
            problem = f"`{letter}` is not an axis here; expected one of {', '.join(allowed)}"
            raise FormulaError(problem, position=_at(letter))
        if axes & LETTERS[letter]:
            raise FormulaError(f"the axis `{letter}` is named twice", position=_at(letter))
        axes |= LETTERS[letter]
    return axes


@v_args(inline=True)
class _Builder(Transformer[Token, Definition]):
    """One method per rule of the grammar, each handed what its parts have built."""

    def start(self, *parts: list[Expr]) -> Definition:
        return _scope.get().close(tuple(parts[-1]))

    def first(self, item: _Item) -> list[_Item]:
        return [item]

    def another(self, items: list[_Item], comma: Token, item: _Item) -> list[_Item]:
        check.length(len(items) + 1, _at(comma))
        return [*items, item]

    def local(self, name: Token, value: Expr) -> None:
        _scope.get().define(names.spell(name), value, _at(name))

    def param(self, name: Token, axes: list[Token] | None, init: float | None) -> None:
        spelled = names.spell(name)
        over = NONE if axes is None else _axes(axes, "c")
        start = names.free(spelled).init if init is None else init
        _scope.get().declare(Param(spelled, over, start), _at(name))

    def input(self, name: Token, axes: list[Token] | None) -> None:
        over = FULL if axes is None else _axes(axes, "ncs")
        _scope.get().declare(Input(names.spell(name), over), _at(name))

    def value(self, sign: Token | None, number: Token) -> float:
        value = check.number(number, _at(number))
        return -value if sign and _OPERATORS[sign] == "sub" else value

    def number(self, number: Token) -> Expr:
        return const(check.number(number, _at(number)))

    def name(self, name: Token) -> Expr:
        return _scope.get().lookup(names.spell(name), _at(name))

    def binary(self, left: Expr, operator: Token, right: Expr) -> Expr:
        return _scope.get().apply(_OPERATORS[operator], (left, right), _at(operator))

    power = binary

    def superscript(self, base: Expr, mark: Token) -> Expr:
        return _scope.get().apply("pow", (base, const(_SUPERSCRIPTS[mark])), _at(mark))

    def sign(self, sign: Token, operand: Expr) -> Expr:
        if _OPERATORS[sign] == "add":
            return operand
        if isinstance(operand, Const):
            return const(-operand.value)
        return _scope.get().apply("neg", (operand,), _at(sign))

    def root(self, mark: Token, operand: Expr) -> Expr:
        return _scope.get().apply("sqrt", (operand,), _at(mark))

    def call(self, name: Token, args: list[Expr]) -> Expr:
        return _scope.get().call(names.spell_called(name), tuple(args), _at(name))

    def statistic(self, name: Token, axes: list[Token], arg: Expr) -> Expr:
        over = _axes(axes, "ngkcs")
        return _scope.get().reduce(names.spell_statistic(name), over, arg, _at(name))

    def where(self, word: Token, condition: Expr, yes: Expr, no: Expr) -> Expr:
        return _scope.get().apply("where", (condition, yes, no), _at(word))

    def comparison(self, left: Expr, operator: Token, right: Expr) -> Expr:
        return _scope.get().apply(COMPARISONS[operator], (left, right), _at(operator))
