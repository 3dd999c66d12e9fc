"""normc: a compiler for normalization(-activation) layers written as text."""

from importlib import import_module
from typing import Any

from normc.errors import BackendError, CompileError, FormulaError, NormcError, ShapeError
from normc.formula import Formula, parse, zoo
from normc.ops.convert import convert_sync_norms
from normc.ops.dropin import norm_layer
from normc.ops.grouping import CHOOSERS
from normc.ops.layer import Layer
from normc.ops.many import compile_many
from normc.ops.op import Op, compile
from normc.ops.replace import replace_norms, revert_norms
from normc.reference import reference

__all__ = [
    "BackendError",
    "CompileError",
    "Formula",
    "FormulaError",
    "Layer",
    "NormcError",
    "Op",
    "ShapeError",
    "compile",
    "compile_many",
    "convert_sync_norms",
    "norm_layer",
    "parse",
    "reference",
    "replace_norms",
    "revert_norms",
    "zoo",
]


def _isometric() -> Any:
    return import_module("normc.analysis.isometric")


CHOOSERS["isometric"] = _isometric
