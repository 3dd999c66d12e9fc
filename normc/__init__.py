"""normc: a compiler for normalization(-activation) layers written as text."""

from normc.errors import BackendError, FormulaError, NormcError, ShapeError
from normc.formula import Formula, parse, zoo
from normc.ops.layer import Layer
from normc.ops.op import Op, compile
from normc.reference import reference

__all__ = [
    "BackendError",
    "Formula",
    "FormulaError",
    "Layer",
    "NormcError",
    "Op",
    "ShapeError",
    "compile",
    "parse",
    "reference",
    "zoo",
]
