"""The tables of mistakes are their own test; beside them, slips that are caught elsewhere."""

import keyword
import re
import string
import time

import pytest

from normc.errors import FormulaError
from normc.language import names
from normc.language.mistakes import CHARACTERS, FOREIGN, SYNTAX, WORDS
from normc.language.parse import parse

ROWS = [(message, example) for message, examples in SYNTAX for example in examples]


def error_of(text):
    with pytest.raises(FormulaError) as caught:
        parse(text)
    return caught.value


@pytest.mark.parametrize(("message", "example"), ROWS)
def test_table(message, example):
    assert error_of(example).message == message


def test_no_example_stands_twice():
    examples = [example for _, example in ROWS]
    assert sorted(set(examples)) == sorted(examples)


NESTED = {
    "2x": "an operator is missing here",
    "(x)(y)": "an operator is missing here",
    "x//2": "an operand is missing between two operators",
    "max(x,)": "an expression is missing at this comma",
    "exp()": "these parentheses are empty",
    "x = 2": "`=` gives a name its value",
    "x > 2": "a comparison can only be the condition",
    "x[0]": "square brackets give a statistic its axes",
}


@pytest.mark.parametrize("slip", NESTED)
@pytest.mark.parametrize("frame", ["({})", "v*exp(v + (1 - {}))", "h = 2*({})\nh"])
def test_a_slip_is_the_same_at_any_depth(slip, frame):
    assert error_of(frame.format(slip)).message.startswith(NESTED[slip])


def starts_a_token(character):
    try:
        parse(f"{character} 2")
    except FormulaError as error:
        return error.message not in CHARACTERS.values()
    return True


def test_every_strange_character_is_explained():
    strange = {c for c in string.punctuation if not starts_a_token(c)}
    assert strange == set(CHARACTERS)


@pytest.mark.parametrize("character", CHARACTERS)
@pytest.mark.parametrize("frame", ["x {} 2", "exp(2 + v{})", "h = x{}h", "{}"])
def test_strange_character(character, frame):
    error = error_of(frame.format(character))
    assert error.message == CHARACTERS[character]
    assert error.position == frame.index("{")


@pytest.mark.parametrize("word", keyword.kwlist)
def test_word_of_python(word):
    error = error_of(f"x*{word}")
    assert error.message.startswith(f"`{word}` is a word of Python")
    assert error.message.endswith(WORDS.get(word, "do not have"))
    assert error.position == 2


SLIPS = {
    "x^2": ("a power is written `**`", 1),
    "x.y": ("a `.` stands only inside a number; nothing has attributes", 1),
    "lambda x: x": ("`lambda` is a word of Python that formulas do not have", 0),
    "x if x > 0 else 2": ("`if` is a word of Python", 2),
    "f'{x}'": ("formulas contain no quoted text", 1),
    'x*"v"': ("formulas contain no quoted text", 2),
    "x & v": ("formulas have no `&`", 2),
    "x | v": ("formulas have no `|`", 2),
    "x @ v": ("formulas have no matrix product", 2),
    "x % 2": ("formulas have no remainder", 2),
    "!x": ("formulas have no `!`", 0),
    "x*(v + 2": ("this `(` is never closed", 2),
    "h = exp(x\nh*2": ("this `(` is never closed", 7),
    "x)": ("this `)` closes nothing", 1),
    "(x]": ("this `]` closes a bracket of the other kind", 2),
    "mean[n,s)(x)": ("this `)` closes a bracket of the other kind", 8),
    "x + # why": ("the formula ends in the middle", 3),
    "x++": ("the formula ends in the middle", 3),
    "x +\n2": ("the line ends in the middle", 3),
    "2x": ("an operator is missing here", 1),
    "x*2v": ("an operator is missing here", 3),
    "sigmoid x": ("an operator is missing here", 8),
    "group std(x)": ("an operator is missing here", 6),
    "x//2": ("an operand is missing between two operators", 2),
    "x == v": ("a comparison can only be the condition", 2),
    "y = x": ("the last statement has to be a result", 5),
    "x\nx*2": ("only the last statement is a result", 2),
    "x[0]": ("square brackets give a statistic its axes", 2),
    "param = 2; x": ("`param` declares a parameter", 6),
    "2*input": ("`input` declares a tensor", 2),
    "param v: 2; v": ("formulas have no `:`", 7),
    "where(x, v, 2)": ("the condition of where is a comparison", 7),
    "where(0 < x < 1, v, 2)": ("comparisons cannot be chained", 12),
    "": ("the formula is empty", 0),
    " \n\t ": ("the formula is empty", 0),
    "# nothing": ("the formula is empty", 0),
    ";;": ("the formula is empty", 0),
    "__class__": ("a name starts with a letter, not with an underscore", 0),
}


@pytest.mark.parametrize("text", SLIPS)
def test_slip(text):
    message, position = SLIPS[text]
    error = error_of(text)
    assert error.message.startswith(message)
    assert error.position == position


def test_every_error_is_told_quickly():
    error_of("2x")  # the examples are parsed once
    start = time.thread_time()
    for _, example in ROWS:
        error_of(example)
    assert (time.thread_time() - start) / len(ROWS) < 0.01


def test_functions_of_other_libraries_are_told_apart():
    for word, hint in FOREIGN.items():
        assert not names.is_function(word) and not names.statistic(word), word
        with pytest.raises(FormulaError) as caught:
            parse(f"x + {word}(x)")
        assert caught.value.message == f"unknown function `{word}`: {hint}"
        advised = re.search(r"(?:: |called |logarithm is )(.*\))$", hint)
        if advised:
            parse(advised[1])
    with pytest.raises(FormulaError, match="`group_median`: nothing is sorted"):
        parse("x - group_median(x)")
