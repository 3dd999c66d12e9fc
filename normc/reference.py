"""The oracle: a formula's expression evaluated with plain torch operations, node by node.

Every kernel is judged against it, so it shares no code with derivation, scheduling or the backends:
only the language, whose rows each carry a ``reference`` in torch. Values are views of shape
(N, G, K, S) with size 1 for the axes over which they do not vary; gradients come from autograd, and
with them its conventions at kinks (relu'(0) = 0, ties of max and min share the gradient equally).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from normc.errors import NormcError, ShapeError
from normc.language.axes import FULL, ORDER, Axis
from normc.language.definition import Definition, X
from normc.language.expr import Call, Const, Expr, Reduce, Var, postorder
from normc.language.geometry import Geometry, Groups, check
from normc.language.parse import parse
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import EPS, REDUCTIONS
from normc.language.zoo import ZOO


class Defined(Protocol):
    """Anything that knows its definition, such as a parsed formula."""

    @property
    def definition(self) -> Definition: ...


@dataclass(frozen=True)
class Oracle:
    """A formula as a function of tensors; made by `reference`."""

    definition: Definition

    def __call__(
        self,
        /,
        x: Tensor,
        *,
        groups: Groups = "auto",
        eps: float = 1e-5,
        channel_dim: int = 1,
        **tensors: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """The results of the formula, each of x's shape, dtype and device; several are a tuple.

        ``x`` has rank 2 to 5 and any floating dtype, in which everything is computed. A parameter
        ``v[c]`` has shape (C,), a scalar (), an input x's shape without the dimensions it lacks; a
        parameter not given has its initial value. An x without elements has no statistics: the
        results are empty and all gradients zero. Raises `ShapeError` for what does not fit.
        """
        for name, value in {"x": x, **tensors}.items():
            if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ShapeError(f"`{name}` must be a tensor, not {type(value).__name__}")
        geometry = check(self.definition, x, tensors, groups, channel_dim)
        if x.numel() == 0:
            results = _empty(self.definition, x, tensors.values())
        else:
            values = _bind(self.definition, geometry, eps, {"x": x, **tensors})
            views = evaluate(self.definition.results, values, geometry, eps)
            results = tuple(unview(view, geometry) for view in views)
        first, *more = results
        return results if more else first


def reference(formula: str | Definition | Defined) -> Oracle:
    """The oracle for a formula: its text or name in the zoo, its definition, or what has one.

    >>> rms = reference("x / channel_rms(x) * gamma")
    >>> rms(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if isinstance(formula, str):
        row = ZOO.get(formula.strip())
        return Oracle(parse(row.text if row else formula))
    return Oracle(formula if isinstance(formula, Definition) else formula.definition)


def evaluate(
    roots: Iterable[Expr], values: Mapping[Var, Tensor], geometry: Geometry, eps: float
) -> list[Tensor]:
    """The value of each root, 4-D over the axes it varies over, or 0-D if it is constant.

    ``values`` holds the variables in the same form. Every distinct node is computed once.
    """
    targets = list(roots)
    done: dict[int, Tensor] = {}
    like = values[X]
    for node in postorder(targets):
        match node:
            case Const(value):
                result = like.new_tensor(value)
            case Var(name):
                if node not in values:
                    raise NormcError(f"`{name}` is neither x, eps, a parameter nor an input")
                result = values[node]
            case Call(fn, args):
                operands = [done[id(arg)] for arg in args]
                result = PRIMITIVES[fn].reference(torch, *operands)
            case Reduce(op, over, arg):
                # Reduced as if broadcast to x's shape, so that a sum counts every element of x.
                operand = done[id(arg)].expand(geometry.sizes(arg.axes | over))
                dims = tuple(d for d, axis in enumerate(ORDER) if axis & over)
                result = REDUCTIONS[op].reference(torch, operand, dims, eps)
        done[id(node)] = result
    return [done[id(root)] for root in targets]


def view(tensor: Tensor, axes: Axis, geometry: Geometry) -> Tensor:
    """A user's tensor over ``axes`` as (N, G, K, S), with 1 for the missing axes."""
    return tensor.permute(geometry.to_unfolded(axes)).reshape(geometry.sizes(axes))


def unview(value: Tensor, geometry: Geometry) -> Tensor:
    """A 4-D value as a tensor of x's shape, broadcast over the axes it does not vary over."""
    full = value.expand(geometry.sizes(FULL)).reshape(geometry.unfolded(FULL))
    return full.permute(geometry.from_unfolded(FULL))


def _bind(
    definition: Definition, geometry: Geometry, eps: float, given: Mapping[str, Tensor]
) -> dict[Var, Tensor]:
    x = given["x"]
    values = {EPS: x.new_tensor(eps), X: view(x, FULL, geometry)}
    for param in definition.params:
        start = x.new_full(geometry.shape_of(param.axes), param.init)
        tensor = given.get(param.name, start).to(x.dtype)
        values[param.var] = view(tensor, param.axes, geometry)
    for row in definition.inputs:
        values[row.var] = view(given[row.name].to(x.dtype), row.axes, geometry)
    return values


def _empty(definition: Definition, x: Tensor, others: Iterable[Tensor]) -> tuple[Tensor, ...]:
    # Statistics over no elements are 0/0, and torch has no maximum of nothing; but no element of
    # a result would hold them. The zero terms keep every tensor in the graph.
    zero = sum((other.sum().to(x.dtype) * 0 for other in others), x.new_zeros(()))
    return tuple(x * 1 + zero for _ in definition.results)
