"""A parsed formula: its declarations and its results, nothing derived yet."""

from __future__ import annotations

from dataclasses import dataclass

from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.expr import Expr, Var, var

X: Var = var("x", FULL)
"""The input of every formula."""

RESERVED = ("x", "eps", "param", "input", "where", "groups", "channel_dim")
"""Names with a fixed meaning, which no declaration may take."""

STARTS_AT_ZERO = ("beta", "v0")
"""Free names whose parameter starts at 0; every other starts at 1."""


@dataclass(frozen=True)
class Param:
    """A learned parameter: of shape (C,) where ``axes`` is G and K, a scalar where it is empty."""

    name: str
    axes: Axis = CHANNEL
    init: float = 1.0

    @property
    def var(self) -> Var:
        return var(self.name, self.axes)


@dataclass(frozen=True)
class Input:
    """A tensor given at every call: like x without the dimensions missing from ``axes``."""

    name: str
    axes: Axis = FULL

    @property
    def var(self) -> Var:
        return var(self.name, self.axes)


@dataclass(frozen=True)
class Definition:
    """What a formula's text means: one or more results over x, inputs and parameters."""

    results: tuple[Expr, ...]
    params: tuple[Param, ...] = ()
    inputs: tuple[Input, ...] = ()
