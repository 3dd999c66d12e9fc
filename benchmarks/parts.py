"""Files of figures that are measured in parts: rows take the places of those of the same names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import typer


def begun(path: Path, head: dict[str, Any], part: bool) -> dict[str, Any]:
    """The record that rows are put into: a new one, or for a part of them that of the file.

    A file has one head for all its rows, so a part has to be measured with the same batch, versions
    and so on, but for the date, which each row has for itself.
    """
    if not part or not path.exists():
        return {**head, "rows": {}}
    old: dict[str, Any] = json.loads(path.read_text("utf-8"))
    now, then = _timeless(head), _timeless(old)
    if differs := [name for name in now if now[name] != then.get(name)]:
        told = ", ".join(f"{name} is {now[name]}, not {then.get(name)}" for name in differs)
        raise typer.BadParameter(f"{path} is of another kind ({told}): measure all or --output")
    return old


def _timeless(head: dict[str, Any]) -> dict[str, Any]:
    flat = {**head, **head["environment"]}
    return {name: v for name, v in flat.items() if name not in ("environment", "date", "rows")}


def finish(path: Path, record: dict[str, Any], rows: dict[str, Any], order: Iterable[str]) -> None:
    """Write a record with rows in the place of those of the same names, in the table's order."""
    today = date.today().isoformat()
    every = {**record["rows"], **{name: {"date": today, **row} for name, row in rows.items()}}
    ordered = {name: every[name] for name in order if name in every}
    path.write_text(json.dumps({**record, "rows": ordered}, indent=1) + "\n", encoding="utf-8")
