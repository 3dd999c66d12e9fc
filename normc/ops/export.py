"""Export: a formula as one Python file that needs torch and triton, and nothing of normc.

    file ::= docstring, imports, function, autograd, checks and views,
             plain torch operations, launches, Triton kernels, self-check

What depends on the formula is printed for it by a file of this folder each, ``export_*``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from string import Template

from normc.backends.contract import Job
from normc.formula import Formula
from normc.ops.export_call import CALL
from normc.ops.export_check import CHECK
from normc.ops.export_face import autograd_function, docstring, public_function, tables
from normc.ops.export_launch import kernels, launch_function
from normc.ops.export_layer import ORDERS, Layer, layer
from normc.ops.export_names import quoted, title
from normc.ops.export_tiles import TILES
from normc.ops.export_torch import formula_function, program_function

_IMPORTS = """\
import os
import sys
import warnings
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

__all__ = ["$name"]"""


Jobs = Sequence[tuple[str, Job]]
"""For each order in memory, the jobs of forward and backward."""


def export(formula: Formula, path: str | os.PathLike[str]) -> Path:
    """Write the file of a formula and return its path; see `normc.ops.op.Op.export`."""
    where = Path(path)
    text = module(layer(formula, title(formula, where)), where.name)
    where.write_text(text, encoding="utf-8")
    return where


def module(one: Layer, file: str) -> str:
    """The text of the file of that name."""
    file = " ".join(quoted(file).split())
    fill = {
        "name": one.name,
        "groups": "groups" if one.splits else "1  # no statistic tells groups apart",
        "results": str(len(one.found.results)),
        "names": ", ".join(f'"{y}"' for y in one.found.results),
    }
    imports, call, tiles, check = (
        Template(text).substitute(fill).strip() for text in (_IMPORTS, CALL, TILES, CHECK)
    )
    jobs = one.jobs()
    blocks = [
        docstring(one, file) + "\n\n" + imports,
        public_function(one),
        autograd_function(one),
        *_section("what a call is about", [tables(one), call]),
        *_section("plain torch operations", _plain(one)),
        *_section("launches of the kernels", [tiles, *_launches(one, jobs)]),
        *_section("Triton kernels", _kernels(jobs)),
        *_section(f"self-check: python {file}", [_formula(one), check]),
    ]
    return "\n\n\n".join(blocks) + "\n"


def _section(title: str, blocks: Sequence[str]) -> list[str]:
    """Blocks below a ruler."""
    return [f"# --- {title} {'-' * (93 - len(title))}\n{blocks[0]}", *blocks[1:]]


def _plain(one: Layer) -> list[str]:
    """Forward and backward as plain torch operations."""
    return [
        program_function(f"_plain_{part}", _doc(one, part), program, results)
        for part, (program, results) in one.parts.items()
    ]


def _launches(one: Layer, jobs: Jobs) -> list[str]:
    """The launches for both orders in memory, and the table of all paths."""
    launches = [_launch(one, order, job) for order, job in jobs]
    return [*launches, "\n".join(_paths(part) for part in one.parts)]


def _kernels(jobs: Jobs) -> list[str]:
    """The functions that kernels call, and the kernels."""
    functions, texts = kernels([job for _, job in jobs])
    return [functions, *texts] if functions else texts


def _formula(one: Layer) -> str:
    doc = "The formula as it is written, for autograd to differentiate."
    return formula_function("_formula", doc, one.formula.definition)


def _launch(one: Layer, order: str, job: Job) -> str:
    doc = f"{_doc(one, job.part)} {order.replace('_', ' ').capitalize()}."
    return launch_function(f"_{job.part}_{order}", doc, job, one.parts[job.part][1])


def _paths(part: str) -> str:
    """The table of the functions for forward or backward."""
    names = ["plain", *ORDERS]
    functions = [f"_plain_{part}", *(f"_{part}_{order}" for order in ORDERS)]
    rows = [f'    "{name}": {fn},' for name, fn in zip(names, functions, strict=True)]
    return "\n".join([f"_{part.upper()} = {{", *rows, "}"])


def _doc(one: Layer, part: str) -> str:
    if part == "backward":
        return f"The gradients: {_listed(one.parts[part][1])}."
    saved = one.found.saved
    return f"{_listed(one.found.results)}{f', and for backward {_listed(saved)}' if saved else ''}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 10 else f"{', '.join(names[:9])} and others"
