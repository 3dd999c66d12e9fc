"""Traced: what torch.compile and torch.export see of an op, which they trace line by line.

So there is little to see: names and numbers are put into the arguments of an opaque operator, or
where torch.func is at work, the operations of the formula are gone through one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normc.formula import Formula, parse
from normc.language.geometry import Groups
from normc.ops.composite import Tables, composite, tables
from normc.ops.doors import transformed
from normc.ops.recipe import edition, written
from normc.pipeline import Mode, staged


def _constant(function: Any) -> Any:
    """Let the compiler call it and take what it returns for a constant, as with
    `torch.compiler.assume_constant_result`, which takes a second to import."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _tables(text: str, mode: Mode) -> Tables:
    return tables(parse(text), mode)


@_constant
def _outputs(text: str, mode: Mode) -> int:
    return len(staged(parse(text).definition, mode, ())[0].source.outputs)


@_constant
def _edition() -> str:
    return edition()


def traced(
    formula: Formula,
    backend: str,
    given: Mapping[str, Tensor],
    groups: Groups,
    eps: float,
    channel_dim: int,
    mode: Mode,
) -> tuple[Tensor, ...]:
    """Doors 4 and 5: all outputs."""
    if transformed():
        return composite(_tables(formula.text, mode), given, groups, channel_dim, eps)
    names = list(given)
    wrt = [n for n in names if given[n].requires_grad] if torch.is_grad_enabled() else []
    many: Any = 0 if groups == "auto" else groups
    recipe = written(formula, names, mode, backend, _edition())
    tensors = [given[n] for n in names]
    outs = torch.ops.normc.forward(tensors, recipe, " ".join(wrt), many, channel_dim, float(eps))
    return tuple(outs[: _outputs(formula.text, mode)])
