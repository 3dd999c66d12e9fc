"""What the pages of figures have in common: tables, and where the figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table, all columns but the first at the right; a ``|`` in a cell is escaped."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def where(environment: Mapping[str, Any]) -> str:
    """The machine and the versions that figures come from, in a line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())
