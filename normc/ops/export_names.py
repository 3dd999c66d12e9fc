"""Names in an exported file: what a formula's tensors are called there, and calls that fit a line.

Names of the file's own begin with an underscore, as no name of a formula does, or are listed here.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Sequence
from pathlib import PurePath

from normc.backends.tile_functions import functions
from normc.formula import Formula
from normc.language.axes import Axis, members

WIDTH = 96  # of a line, before the body of a function is indented

_LOCAL = (
    *("call", "ctx", "found", "how", "index", "kernel", "wanted", "d", "want"),
    *("torch", "triton", "tl", "zip", "float", "N", "G", "K", "S", "C", "PARTS", "SUM"),
)
_GLOBAL = {
    *("torch", "triton", "tl", "os", "sys", "warnings", "lru_cache", "prod", "NamedTuple"),
    *("once_differentiable", *keyword.softkwlist, *dir(builtins)),
}


def local(name: str) -> str:
    """What a tensor of a Program is called within a function: its name, unless that is taken."""
    taken = name in _LOCAL or re.fullmatch(r"t\d+|.*_(parts|resident|streaming)|.*_", name)
    return f"{name}_" if taken else name


def title(formula: Formula, path: PurePath) -> str:
    """What the exported function is called: after the formula or, if it has no name, the file."""
    unnamed = formula.label == f"formula_{formula.digest[:8]}"
    name = re.sub(r"\W", "_", path.stem if unnamed else formula.label, flags=re.ASCII)
    if not re.match(r"[A-Za-z]", name):
        name = f"layer_{name.lstrip('_')}"
    taken = keyword.iskeyword(name) or name in _GLOBAL or name in functions("float32")
    return f"{name}_" if taken else name


def letters(axes: Axis) -> str:
    """``"ngk"``: a set of axes as the exported file writes it."""
    return "".join(str(axis.name).lower() for axis in members(axes))


def arguments(head: str, items: Sequence[str], tail: str, indent: str = "") -> list[str]:
    """A call or a definition, over several lines if it does not fit one."""
    line = f"{indent}{head}{', '.join(items)}{tail}"
    if len(line) <= WIDTH:
        return [line]
    inside = [f"{indent}    {row}" for row in wrapped(items, len(indent) + 4)]
    return [f"{indent}{head}", *inside, f"{indent}{tail}"]


def wrapped(items: Sequence[str], indent: int) -> list[str]:
    """Arguments in lines that fit, each ending with a comma."""
    rows: list[str] = []
    for item in items:
        if rows and len(rows[-1]) + len(item) + 2 <= WIDTH - indent:
            rows[-1] += f" {item},"
        else:
            rows.append(f"{item},")
    return rows


def unpacked(names: Sequence[str]) -> str:
    """``a, b``, or ``(a,)``."""
    return ", ".join(names) if len(names) > 1 else bracketed(names)


def assigned(names: Sequence[str], value: str, indent: str = "") -> list[str]:
    """The line that takes a tuple apart, or several."""
    line = f"{indent}{unpacked(names)} = {value}"
    return [line] if len(line) <= WIDTH else arguments("(", names, f") = {value}", indent)


def bracketed(items: Sequence[str]) -> str:
    """``(a, b)``, or ``(a,)``."""
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def sizes(body: Sequence[str], known: str) -> list[str]:
    """The line that gives those of the sizes N, G, K, S their names which a body uses."""
    text = "\n".join(body)
    used = {size for size in known if re.search(rf"\b{size}\b", text)}
    if not used:
        return []
    parts = used | ({"G", "K"} if "C" in used else set())
    line = ", ".join(size if size in parts else "_" for size in "NGKS")
    return [f"{line} = call.sizes", *(["C = G*K"] if "C" in used else [])]


def quoted(text: str) -> str:
    """Text that cannot end the docstring it stands in, nor hide what it is."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return plain.replace("\\", "\\\\").replace('"', "'")
