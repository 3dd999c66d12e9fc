"""Formulas in the place of a norm: which ones fit, and what they are without their activation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from normc.errors import FormulaError
from normc.formula import Formula, formula_of
from normc.language.axes import CHANNEL
from normc.language.definition import Definition, X
from normc.language.expr import Call, Expr, Reduce, postorder, variables
from normc.language.show import show
from normc.ops.layer import Layer

_MANY = 2  # any degree above 1


def norm_of(formula: Formula | str) -> Formula:
    """`formula_of`, if it maps one tensor to one tensor; else `FormulaError`."""
    formula = formula_of(formula)
    if formula.inputs or len(formula.definition.results) > 1:
        raise FormulaError(
            f"a norm maps one tensor to one tensor, but `{formula.text}` "
            + (f"needs the input `{formula.inputs[0].name}`" if formula.inputs else "returns more")
        )
    return formula


def activates(formula: Formula) -> bool:
    """Whether a formula contains an activation: it is not affine in x, given its statistics.

    The expression decides: x may be added to and multiplied by what does not vary with x, or
    divided by it, and every reduction counts as such.
    """
    roots = formula.definition.results
    degrees = _degrees(roots)
    return any(degrees[id(root)] > 1 for root in roots)


def without_activation(formula: Formula) -> Formula | None:
    """The formula before its activation, or None if the text does not say what that is.

    A formula without an activation is its own answer. Else the last thing computed must be a
    function of one argument, affine in x: ``relu(h)`` is ``h`` without it, and ``x*sigmoid(v*x)``
    divided by a statistic is nothing.
    """
    if not activates(formula):
        return formula
    root = formula.definition.results[0]
    if not isinstance(root, Call) or len(root.args) != 1:
        return None
    inner = root.args[0]
    if _degrees([inner])[id(inner)] > 1:
        return None
    used = {v.name for v in variables([inner])}
    params = tuple(p for p in formula.params if p.name in used)
    return Formula(show(Definition((inner,), params)))


def _degrees(roots: Any) -> dict[int, int]:
    """The degree in x of every node, statistics taken as constants: 0, 1, or 2 for the rest."""
    found: dict[int, int] = {}
    for node in postorder(roots):
        if isinstance(node, Call):
            found[id(node)] = min(_MANY, _degree(node, [found[id(a)] for a in node.args]))
        else:
            found[id(node)] = int(node is X and not isinstance(node, Reduce))
    return found


def _degree(node: Expr, below: list[int]) -> int:
    assert isinstance(node, Call)
    if not any(below):
        return 0
    if node.fn in ("add", "sub", "neg"):
        return max(below)
    if node.fn == "mul":
        return sum(below)
    if node.fn == "div" and not below[1]:
        return below[0]
    if node.fn == "where" and not below[0]:
        return max(below[1:])
    return _MANY


def norm_act(
    num_features: int,
    apply_act: bool = True,
    eps: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    formula: Formula,
    linear: Formula | None = None,
    **settings: Any,
) -> Layer:
    """A `Layer` by timm's signature; what `norm_layer` binds a formula to."""
    for ignored in ("act_layer", "act_kwargs", "inplace"):  # the activation is in the formula
        settings.pop(ignored, None)
    chosen = formula if apply_act else linear or without_activation(formula)
    if chosen is None:
        raise FormulaError(
            f"`{formula.text}` has no form without its activation: "
            "give one, norm_layer(formula, linear=...)"
        )
    if eps is None:
        eps = chosen.eps
    taken = {p.name for p in chosen.params} & {"weight", "bias"}
    kind = Layer if taken else _DropIn
    return kind(chosen, num_features, eps=eps, device=device, dtype=dtype, **settings)


class _DropIn(Layer):
    """A layer whose gamma and beta go by torch's names, too: models zero the last norm's weight."""

    def _get_name(self) -> str:
        return "Layer"

    @property
    def weight(self) -> nn.Parameter | None:
        return self._alias("gamma", 1.0)

    @property
    def bias(self) -> nn.Parameter | None:
        return self._alias("beta", 0.0)

    def _alias(self, name: str, start: float) -> nn.Parameter | None:
        """The parameter, if it means the same: where 1 + gamma is the gain, gamma starts at 0."""
        like = any((p.name, p.axes, p.init) == (name, CHANNEL, start) for p in self.formula.params)
        return self.get_parameter(name) if like else None


class NormLayer(functools.partial[Layer]):
    """What `norm_layer` returns: a function-like value that makes layers of one formula.

    It is a `functools.partial` of a plain function, the one kind of callable (beside functions)
    that timm takes for a norm_layer it does not know; so it is pickled by reference, too.
    """

    def __repr__(self) -> str:
        given = dict(self.keywords)
        parts = [repr(given.pop("formula").text), *map(repr, self.args)]
        linear = given.pop("linear", None)
        parts += [f"linear={linear.text!r}"] if linear else []
        return f"normc.norm_layer({', '.join([*parts, *(f'{k}={v!r}' for k, v in given.items())])})"


def norm_layer(
    formula: Formula | str, *, linear: Formula | str | None = None, **settings: Any
) -> NormLayer:
    """A value for the ``norm_layer=`` argument of torchvision's and timm's models.

    ``formula`` is a formula, its text, or a name in the zoo, and ``settings`` are those of `Layer`.
    The result is called ``(num_features, apply_act=True, eps=..., device=None, dtype=None,
    **settings)``; ``eps`` is the zoo's or 1e-5 if absent. timm's ``act_layer``, ``act_kwargs`` and
    ``inplace`` are accepted and ignored: the formula is what is computed, so where a model leaves
    the activation to its norm, the formula has to contain one.
    The layers have ``weight`` and ``bias``, None or other names for gamma and beta, for models that
    initialize their norms.

    ``apply_act=False`` gives the formula itself if it is affine in x (given its statistics); else
    ``linear`` if given; else, for an activation that is the last thing computed, as in
    ``relu((x - batch_mean(x))/batch_std(x))``, its argument; else it raises `FormulaError`.

    >>> make = norm_layer("relu((x - batch_mean(x))/batch_std(x)*gamma + beta)", momentum=0.01)
    >>> make(64, apply_act=False).formula.text
    '(x - batch_mean(x))/batch_std(x)*gamma + beta'
    """
    bound: dict[str, Any] = {"formula": norm_of(formula)}
    if linear is not None:
        bound["linear"] = norm_of(linear)
    return NormLayer(norm_act, **bound, **settings)
