"""Setting: a recipe with its groups and channel dimension, and the calls made of it so far.

What is derived from a setting is a setting again, found once and kept with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from normc.errors import NormcError, ShapeError
from normc.formula import Formula
from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Geometry, Groups, check
from normc.ops.call import Back, Call, kernels
from normc.ops.recipe import Recipe
from normc.ops.target import target_of
from normc.pipeline import Built, Mode, Target
from normc.program.steps import Kind, cotangent, past, tangent

MOST_CALLS = 4096
"""Kinds of calls that are remembered before they are all forgotten."""


Ready = dict[tuple[Mode, Target], tuple[Built, bool]]
"""Kernels made ahead, and whether they come with all gradients."""


class Setting:
    """What a recipe needs beside tensors and eps; compared by identity."""

    def __init__(
        self, recipe: Recipe, groups: Groups, channel_dim: int, ready: Ready | None = None
    ) -> None:
        self.recipe = recipe
        self.ready: Ready = {} if ready is None else ready
        self.asked: Groups = groups
        self.groups: Groups = groups if splits_channels(recipe.formula) else 1
        self.channel_dim = channel_dim
        self._calls: dict[Any, Call] = {}
        self._derived: dict[Any, Setting] = {}

    def call(self, args: Sequence[Tensor], wrt: tuple[str, ...]) -> Call:
        """The kernels for tensors like these, with the gradients of ``wrt``."""
        return self._found("forward", args, wrt, self._forward)

    def back(self, args: Sequence[Tensor], wrt: tuple[str, ...]) -> Call:
        """The same where forward was elsewhere: for tensors like what `Back.passed` names."""
        return self._found("backward", args, wrt, self._backward)

    def _found(
        self, part: str, args: Sequence[Tensor], wrt: tuple[str, ...], make: Callable[..., Call]
    ) -> Call:
        key = (part, wrt, *[(t.shape, t.stride(), t.dtype, t.device) for t in args])
        call = self._calls.get(key)
        if call is None:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            call = self._calls[key] = make(args, wrt)
        return call

    def _forward(self, args: Sequence[Tensor], wrt: tuple[str, ...]) -> Call:
        recipe, geometry = self.recipe, self.checked(args)
        given, like = dict(zip(recipe.names, args, strict=True)), args[recipe.full]
        full = [t for n, t in given.items() if recipe.axes[n] == FULL]
        target = target_of(recipe.formula, recipe.backend, like, full, geometry)
        ready, differentiable = self.ready.get((recipe.mode, target), (None, False))
        if ready is None or recipe.steps or (wrt and not differentiable):
            ready = kernels(recipe, wrt, target)
        return Call(recipe, ready, target, geometry, given, like, bool(wrt))

    def _backward(self, args: Sequence[Tensor], wrt: tuple[str, ...]) -> Call:
        recipe, back = self.recipe, Back(self.recipe, self.recipe.programs(wrt))
        given = dict(zip(back.passed, args, strict=True))
        full = [given[n] for n in back.whole if n not in back.cotangents]  # those are laid anew
        like = given[back.whole[0]]
        geometry = Geometry.of(like.shape, self.groups, self.channel_dim)
        target = target_of(recipe.formula, recipe.backend, like, full, geometry)
        return Call(recipe, kernels(recipe, wrt, target), target, geometry, given, like, True)

    def geometry(self, args: Sequence[Tensor]) -> Geometry:
        """The sizes of a call."""
        return Geometry.of(args[self.recipe.full].shape, self.groups, self.channel_dim)

    def checked(self, args: Sequence[Tensor]) -> Geometry:
        """The sizes of a call whose tensors fit the formula; `ShapeError` if they do not."""
        if not self.recipe.steps:
            definition = self.recipe.formula.definition
            given = dict(zip(self.recipe.names, args, strict=True))
            mine = {p.name for p in (*definition.params, *definition.inputs)}
            rest = {"x", *(r.stat for r in self.recipe.programs().running), *self.reads} - mine
            tensors = {n: t for n, t in given.items() if n not in rest}
            check(definition, given["x"], tensors, self.asked, self.channel_dim)
            missing = [p.name for p in definition.params if p.name not in given]
            if missing:
                name = missing[0]
                raise ShapeError(f"the parameter `{name}` is missing: pass {name}=...")
        return self.geometry(args)

    # --- derived ----------------------------------------------------------------------------

    def then(self, kind: Kind, names: Sequence[str], tensors: Sequence[str]) -> Setting:
        """The setting of what is derived from this one, computed from ``tensors``."""
        key = (kind, tuple(names), tuple(tensors))
        if key not in self._derived:
            recipe = self.recipe.then(*key)
            self._derived[key] = Setting(recipe, self.asked, self.channel_dim)
        return self._derived[key]

    @cached_property
    def reads(self) -> frozenset[str]:
        """The tensors on which anything depends."""
        return frozenset(i.name for i in self.recipe.stage.source.inputs)

    def pulled(
        self, wrt: Iterable[str], known: Mapping[str, Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[Setting, list[Tensor]]:
        """What computes the gradients of ``wrt``, from what is known of inputs and results."""
        level, results = self.recipe.stage.level, self.recipe.results
        given = {n: t for n, t in known.items() if n in self.recipe.names}
        given |= {past(level, n): known[n] for n in results if n in known}
        given |= dict(zip(map(cotangent, results), cotangents, strict=False))
        found = self.then("vjp", [n for n in wrt if n in self.reads], list(given))
        missing = found.reads.difference(given)
        if missing:
            raise NormcError(
                f"backward has not kept `{min(missing)}`, which a second derivative needs: "
                "use normc.reference(formula) where it is wanted"
            )
        return found, list(given.values())

    def pushed(
        self, tangents: Mapping[str, Tensor], args: Sequence[Tensor]
    ) -> tuple[Setting, list[Tensor]]:
        """What computes the tangents of the results, from inputs and tangents of some of them."""
        recipe = self.recipe
        along = [n for n in tangents if n in self.reads]
        names = [*recipe.names, *(tangent(recipe.stage.level, n) for n in along)]
        return self.then("jvp", along, names), [*args, *(tangents[n] for n in along)]


@lru_cache(maxsize=4096)
def splits_channels(formula: Formula) -> bool:
    """Whether any statistic treats groups and the channels in them differently."""
    nodes = postorder(formula.definition.results)
    return any(isinstance(e, Reduce) and e.over & CHANNEL not in (CHANNEL, Axis(0)) for e in nodes)


def wanted(names: Sequence[str], args: Sequence[Tensor]) -> tuple[str, ...]:
    """The tensors whose gradient autograd will ask for."""
    if not torch.is_grad_enabled():
        return ()
    return tuple([name for name, t in zip(names, args, strict=True) if t.requires_grad])
