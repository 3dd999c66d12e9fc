"""Tile spelling: how Triton kernels write primitives and numbers."""

from __future__ import annotations

import torch

from normc.backends.emit import Spelling
from normc.backends.tile_functions import HALVES
from normc.language.expr import Call, Const, Expr, const
from normc.language.primitives import PRIMITIVES

_FUNCTIONS = {fn: f"tl.{fn}({{}})" for fn in ("abs", "exp", "log", "sin", "cos", "erf")} | {
    "tanh": "tanh({})",
    "atan": "atan({})",
    "expm1": "expm1({})",
    "log1p": "log1p({})",
    "sign": "sign({})",
    "max": "larger({}, {})",
    "min": "smaller({}, {})",
    "where": "tl.where({}, {}, {})",
}


def spelling(dtype: str) -> Spelling:
    """How kernels on tensors stored in ``dtype`` write primitives and numbers."""
    wide = "float64" if dtype == "float64" else "float32"
    root = "tl.sqrt_rn({})" if wide == "float32" else "tl.sqrt({})"
    own = {"sqrt": root, "pow": f"power({{}}, {{}}, tl.{wide})"}
    if wide == "float64":  # of two bare numbers Triton makes float32
        own["where"] = "tl.where({}, {}, {}).to(tl.float64)"
    if dtype in HALVES:  # in few instructions: half precision has 11 bits at most
        own["sigmoid"] = "sigmoid({})"
    return Spelling(_FUNCTIONS | own, lambda value: _number(value, wide))


def _number(value: float, wide: str) -> str:
    text = repr(value)
    if text.strip("-") in ("inf", "nan"):
        return f'float("{text}")'
    # Where nothing tells it better, Triton takes a bare number for float32.
    exact = wide == "float32" or torch.tensor(value, dtype=torch.float32).item() == value
    return text if exact else f"tl.full([], {text}, tl.{wide})"


def settled(node: Expr) -> Expr:
    """A call on numbers alone is a number: Triton's functions take tensors."""
    if not isinstance(node, Call):
        return node
    if node.fn == "where" and isinstance(node.args[0], Const):
        return node.args[1 if node.args[0].value else 2]
    values = [torch.tensor(a.value, dtype=torch.float64) for a in node.args if isinstance(a, Const)]
    if len(values) < len(node.args):
        return node
    return const(PRIMITIVES[node.fn].reference(torch, *values).item())
