"""Limits: what a formula may cost, decided before the parse and while its nodes are built.

Text from anywhere is answered at once: either it is small, shallow and in a known alphabet, or it
is refused with the limit it broke. Nothing behind this file needs to fear depth, size or overflow.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from keyword import iskeyword

from normc.errors import FormulaError
from normc.language.expr import Call, Const, Expr, children
from normc.language.mistakes import WORDS
from normc.language.names import GREEK, spell

CHARACTERS = 4096
NESTING = 64
NAME = 64
DIGITS = 20
NODES = 256
DEPTH = 100  # sympy recurses, several frames a level, and Python allows it 1,000
PARAMS = 16
ITEMS = 16
EXPONENT = 16
SMALLEST, LARGEST = 1e-30, 1e30

_SYMBOLS = "·⋅×−√²³"
_ALIEN = re.compile(f"[^\\t\\n -~{_SYMBOLS}{''.join(GREEK)}]")
_LETTERS = f"A-Za-z_{''.join(GREEK)}"
_PIECE = re.compile(
    rf"(?P<comment>\#[^\n]*) | (?P<name>[{_LETTERS}][{_LETTERS}0-9]*)"
    r"| (?P<number>[0-9.]+([eE][+-]?[0-9]+)?) | (?P<open>[(\[]) | (?P<close>[)\]]) | (?P<end>\n)",
    re.VERBOSE,
)
_LOOKALIKES = str.maketrans(
    "аеһіјорԛѕԝухАВЕНІЈКМОРСТХοıΑΒΕΗΙΚΜΝΟΡΤΥΧΖ",  # Cyrillic, Greek, and a dotless i
    "aehijopqswyxABEHIJKMOPCTXoiABEHIKMNOPTYXZ",
)


def text(formula: str) -> str:
    """Check ``formula`` against every limit on text, and blank what the grammar need not see.

    The answer has the same length, so that positions stay: comments, and newlines inside brackets,
    have become spaces.

    >>> text("exp(x +\\n  1)  # why")
    'exp(x +   1)       '
    """
    if len(formula) > CHARACTERS:
        raise FormulaError(f"a formula has at most {CHARACTERS:,} characters", position=CHARACTERS)
    if alien := _ALIEN.search(formula):
        raise FormulaError(_describe(alien.group()), position=alien.start())
    cleaned = _scan(formula)
    if not cleaned.strip(" \t\n;"):
        raise FormulaError("the formula is empty", position=0)
    return cleaned


def _describe(character: str) -> str:
    name = unicodedata.name(character, "no name")
    plain = unicodedata.normalize("NFKC", character).translate(_LOOKALIKES)
    known = len(plain) == 1 and plain.isascii() and plain.isprintable()
    hint = f"; did you mean `{plain}`?" if known else ""
    return f"U+{ord(character):04X} ({name}) is not a character of formulas{hint}"


def _scan(formula: str) -> str:
    pieces = list(formula)
    opened: list[int] = []
    for match in _PIECE.finditer(formula):
        kind, piece, at = str(match.lastgroup), match.group(), match.start()
        if kind == "comment" or (kind == "end" and opened):
            pieces[at : match.end()] = " " * len(piece)
        elif kind in ("open", "close"):
            _nest(formula, opened, at)
        elif kind == "name":
            _name(piece, at)
        elif kind == "number" and any(len(run) > DIGITS for run in re.split(r"\D", piece)):
            raise FormulaError(f"a number has at most {DIGITS} digits in a row", position=at)
    if opened:
        raise FormulaError(f"this `{formula[opened[-1]]}` is never closed", position=opened[-1])
    return "".join(pieces)


def _nest(formula: str, opened: list[int], at: int) -> None:
    """Keep the positions of open brackets up to date over the bracket at ``at``."""
    if formula[at] in "([":
        opened.append(at)
        if len(opened) > NESTING:
            raise FormulaError(f"brackets nest at most {NESTING} deep", position=at)
    elif not opened:
        raise FormulaError(f"this `{formula[at]}` closes nothing", position=at)
    elif formula[opened.pop()] + formula[at] not in ("()", "[]"):
        raise FormulaError(f"this `{formula[at]}` closes a bracket of the other kind", position=at)


def _name(name: str, at: int) -> None:
    if name.startswith("_"):
        raise FormulaError("a name starts with a letter, not with an underscore", position=at)
    if len(spell(name)) > NAME:
        raise FormulaError(f"a name has at most {NAME} characters", position=at)
    if iskeyword(name):
        hint = f"; {WORDS[name]}" if name in WORDS else ""
        problem = f"`{name}` is a word of Python that formulas do not have{hint}"
        raise FormulaError(problem, position=at)


def number(literal: str, at: int) -> float:
    """The value of a literal, if it is zero or of ordinary size."""
    value = float(literal)
    is_zero = not literal.lower().partition("e")[0].strip("0.")
    if not (is_zero or SMALLEST <= value <= LARGEST):
        limits = f"zero or between {SMALLEST:g} and {LARGEST:g} in size"
        raise FormulaError(f"a constant is {limits}", position=at)
    return value


def length(items: int, at: int) -> None:
    """Refuse lists of results, arguments or axes that nobody writes."""
    if items > ITEMS:
        raise FormulaError(f"at most {ITEMS} results or arguments can be listed", position=at)


@dataclass(frozen=True)
class _Facts:
    depth: int = 1
    power: bool = False  # whether a power is in it


class Meter:
    """Counts the distinct nodes of one formula while they are built."""

    def __init__(self) -> None:
        self._facts: dict[Expr, _Facts] = {}

    def add(self, node: Expr, at: int) -> None:
        """Count ``node``, which stands at position ``at``, and the leaves below it."""
        power = isinstance(node, Call) and node.fn == "pow"
        if power:
            self._exponent(children(node)[1], at)
        below = [self._facts.setdefault(child, _Facts()) for child in children(node)]
        depth = 1 + max((facts.depth for facts in below), default=0)
        self._facts[node] = _Facts(depth, power or any(facts.power for facts in below))
        if depth > DEPTH:
            raise FormulaError(f"an expression is at most {DEPTH} operations deep", position=at)
        if len(self._facts) > NODES:
            raise FormulaError(
                f"a formula has at most {NODES} distinct nodes (numbers, names, operations)",
                position=at,
            )

    def _exponent(self, exponent: Expr, at: int) -> None:
        if isinstance(exponent, Const):
            value = exponent.value
            if value.is_integer() and abs(value) > EXPONENT:
                raise FormulaError(f"an integer exponent is at most {EXPONENT}", position=at)
        elif self._facts.get(exponent, _Facts()).power:
            raise FormulaError("an exponent cannot contain another power", position=at)
