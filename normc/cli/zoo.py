"""`normc zoo`: the published layers that normc knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from normc.cli.shell import NoColor, console, write

if TYPE_CHECKING:
    from rich.console import Console

    from normc.language.zoo import Entry


def zoo(
    name: Annotated[str | None, typer.Argument(help="One layer, in detail.")] = None,
    no_color: NoColor = False,
) -> None:
    """List the layers known by name, or show one in detail."""
    from normc.formula import zoo as formulas
    from normc.language.zoo import ZOO

    screen = console(no_color)
    if name is None:
        _table(screen, list(ZOO.values()))
    else:
        write(screen, _detail(ZOO[formulas[name].label]))


def _table(screen: Console, rows: list[Entry]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True, style="cyan")
    table.add_column("formula", overflow="fold", ratio=3)
    table.add_column("paper", ratio=2)
    for row in rows:
        table.add_row(row.name, row.text, f"{row.paper} ({row.arxiv}, {row.year})")
    screen.print(table, markup=False)
    screen.print("\nnormc zoo NAME shows one of them, normc show NAME what it is compiled to.")


def _detail(row: Entry) -> str:
    from normc.formula import zoo as formulas
    from normc.language.geometry import declared

    formula = formulas[row.name]
    params = [f"{declared(p)} = {p.init:g}" for p in formula.params]
    facts = {
        "formula": "\n".join(part.strip() for part in row.text.split(";")),
        "what": row.doc,
        "paper": row.reference,
        "link": f"https://arxiv.org/abs/{row.arxiv}",
        "inputs": ", ".join(["x", *map(declared, formula.inputs)]),
        "parameters": ", ".join(params) or "none",
        "eps, groups": f"{row.eps:g}, {row.groups}",
        "LaTeX": formula.latex(),
    }
    lines = [f"{key:12} {text}".replace("\n", "\n" + " " * 13) for key, text in facts.items()]
    return "\n".join([row.name, "", *lines])
