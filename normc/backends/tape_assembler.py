"""The tape's assembler: the text of a tape as the numbers that the machine reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from normc.backends.tape_machine import WIDTH, opcodes
from normc.language.axes import ORDER

_AXES = {str(axis.name): i for i, axis in enumerate(ORDER)}


@dataclass(frozen=True)
class Tape:
    """What the machine is given beside tensors."""

    code: Sequence[int]
    scalars: Sequence[float | str]  # what registers hold at the start: numbers, eps, counts
    vectors: int  # how many registers


def assemble(text: str, tensors: Mapping[str, int], dtype: str) -> Tape:
    """Read a tape; ``tensors`` says at which place each of them is passed."""
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    fixed = {words[0]: words[2] for words in lines if words[1:2] == ["="]}
    steps = [words for words in lines if words[1:2] != ["="]]
    numbers = opcodes(dtype)
    code: list[int] = []
    for words in steps:
        operands = [_operand(o, tensors) for o in words[1:]]
        if words[0] == "kernel":  # two bits for each axis, the innermost first
            packed = sum(axis << 2 * i for i, axis in enumerate(reversed(operands)))
            operands = [0, packed, len(operands)]
        elif words[0] in ("loop", "blocks"):
            operands.insert(1, 0)
        code += [numbers[words[0]], *operands, *[0] * (WIDTH - 1 - len(operands))]
    _link(code, [words[0] for words in steps])
    used = {o for words in steps for o in words[1:]}
    start = [_start(fixed.get(f"s{i}", "0.0")) for i in range(_count("s", used))]
    return Tape([*code, numbers["end"]], start, _count("v", used))


def _operand(text: str, tensors: Mapping[str, int]) -> int:
    if text[0] == "@":
        return tensors[text[1:]]
    return _AXES[text] if text in _AXES else int(text[1:])


def _link(code: list[int], names: Sequence[str]) -> None:
    """Tell loops where they end, and kernels where the next one begins."""
    opened: list[int] = []
    for i, name in enumerate(names):
        if name in ("kernel", "loop", "blocks"):
            opened.append(i)
        elif name == "end":
            begin = opened.pop()
            if names[begin] == "kernel":
                code[WIDTH * begin + 1] = WIDTH * (i + 1)
            else:
                code[WIDTH * begin + 2] = WIDTH * i


def _count(kind: str, used: Iterable[str]) -> int:
    """How many registers of a kind there are."""
    return max((int(o[1:]) + 1 for o in used if o[0] == kind), default=0)


def _start(text: str) -> float | str:
    return text if text == "eps" or text.startswith("|") else float(text)
