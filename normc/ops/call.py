"""Call: the kernels of a recipe for tensors of one kind, and what all calls of that kind share."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from normc.backends.contract import Bound
from normc.backends.memory import result_strides, wide
from normc.formula import Formula
from normc.language.axes import FULL
from normc.language.geometry import Geometry
from normc.ops.recipe import Recipe
from normc.pipeline import COTANGENT, Built, Mode, Programs, Steps, Target, build
from normc.program.program import Output, Program, restrict

Tensors = Mapping[str, Tensor]


class Call:
    """Kernels bound to one kind of tensors: shapes, strides and dtypes are found out once."""

    def __init__(
        self,
        recipe: Recipe,
        built: Built,
        target: Target,
        geometry: Geometry,
        given: Tensors,
        like: Tensor,
        gradient: bool,
    ) -> None:
        self.recipe, self.built, self.target, self.geometry = recipe, built, target, geometry
        self.inputs = tuple(given)
        self.names = tuple(recipe.outputs)  # of what comes out
        self.tracked = len(self.names) - len(recipe.results)
        self.shape, self.strides = like.shape, result_strides(like.stride(), geometry)
        self.dtype, self.device = like.dtype, like.device
        self.empty = prod(like.shape) == 0  # then there is nothing to compute: see `_nothing`
        self.bound: dict[str, Bound] = {}
        self.lent = lent(recipe, built.programs.forward)
        self.back = Back(recipe, built.programs)
        self.kept, self.outputs = self.back.kept, self.back.outputs
        self.kept_given = tuple(n for n in self.kept if n in given)  # first of what is kept
        self.kept_made = tuple(n for n in self.kept if n not in given)
        self.laid = self._laid(given)
        self.cotangents, self.read = self.back.cotangents, self.back.read
        self.blank = not self.back.full
        self.places = self.back.places({name: t.dtype for name, t in given.items()})
        self.gradient = gradient  # whether some tensor wants one

    def forward(self, given: Tensors, eps: float) -> dict[str, Tensor]:
        """Run the forward kernels: results and saved statistics by name."""
        if self.empty:
            return self._nothing(self.built.programs.forward, self.built.programs.saved)
        if self.lent:
            given = lend(given, self.lent)
        bound = self.bound.get("forward")
        if bound is None:
            bound = self.bound["forward"] = self.built.forward.bind(self.geometry, given)
        return bound(given, eps)

    def backward(self, given: dict[str, Tensor], eps: float) -> tuple[Tensor, ...]:
        """Run the backward kernels: the outputs of the backward program."""
        if self.empty:
            assert self.built.programs.backward is not None
            return tuple(self._nothing(self.built.programs.backward, ()).values())
        self._lay(given, self.read)
        if self.blank:  # nothing of x's shape is read, but the gradients take its shape
            given["x"] = self._room()
        for name, stride in self.laid:
            tensor = given[name]
            if tensor.stride() != stride:  # a hook may have kept it, and given back a copy
                how: Any = {"dtype": tensor.dtype, "device": tensor.device}
                given[name] = torch.empty_strided(tensor.shape, stride, **how).copy_(tensor)
        bound = self.bound.get("backward")
        if bound is None:
            assert self.built.backward is not None
            bound = self.bound["backward"] = self.built.backward.bind(self.geometry, given)
        done = bound(given, eps)
        return tuple([done[name] for name in self.outputs])

    def _nothing(self, program: Program, saved: Sequence[str]) -> dict[str, Tensor]:
        """What comes of no elements, whatever the formula: empty tensors of x's shape, and zeros
        for statistics and gradients, which are sums over nothing."""
        outs = {o.name: self._room() for o in program.outputs if o.axes == FULL}
        small = {o.name: self.geometry.shape_of(o.axes) for o in program.outputs}
        small |= {s.name: self.geometry.sizes(s.kept) for s in program.stats if s.name in saved}
        zeros = {
            n: torch.zeros(size, dtype=wide(self.dtype), device=self.device)
            for n, size in small.items()
        }
        return {**zeros, **outs}

    def _laid(self, given: Tensors) -> list[tuple[str, tuple[int, ...]]]:
        """How what is kept of x's shape lies in memory, which kernels count on."""
        outputs = self.recipe.outputs
        made = [n for n in self.kept_made if outputs.get(n) == FULL]
        whole = [n for n in self.kept_given if given[n].shape == self.shape]
        return [*((n, given[n].stride()) for n in whole), *((n, self.strides) for n in made)]

    def _lay(self, given: dict[str, Tensor], names: Iterable[str]) -> None:
        """Let cotangents lie in memory as x does, and small ones densely: as kernels are bound."""
        for name in names:
            tensor = given[name]
            if tensor.shape != self.shape:
                given[name] = tensor.contiguous().resolve_neg()
            elif tensor.stride() != self.strides or tensor.is_neg():
                given[name] = self._room().copy_(tensor)

    def _room(self) -> Tensor:
        dtype, device = self.dtype, self.device
        return torch.empty_strided(self.shape, self.strides, dtype=dtype, device=device)


def _below(found: Programs, read: Container[str]) -> list[str]:
    """The inputs of the statistics that backward reads: to differentiate it again takes them."""
    stats = [s for s in found.forward.stats if s.name in found.saved and s.name in read]
    return [
        i.name
        for i in restrict(found.forward, [Output(s.name, s.kept, s.var) for s in stats]).inputs
    ]


class Back:
    """What goes in and out of a recipe's backward, by the programs alone."""

    def __init__(self, recipe: Recipe, found: Programs) -> None:
        program = found.backward
        read = {i.name: i.axes for i in program.inputs} if program else {}
        saved = dict.fromkeys((*recipe.names, *found.results, *found.saved))
        self.recipe, self.found = recipe, found
        self.cotangents = tuple(COTANGENT + n for n in found.results)
        whole = ""  # what tells x's shape, where no cotangent does
        if program and not any(recipe.outputs[n] == FULL for n in found.results):
            whole = recipe.names[recipe.full]
        needed = {*read, whole}
        if program and needed.isdisjoint(found.results):  # results serve second derivatives, too
            needed.update(_below(found, read))
        self.kept = tuple(n for n in saved if n in needed)  # of what forward had or made
        self.read = tuple(n for n in self.cotangents if n in read)
        self.full = FULL in read.values()
        self.outputs = tuple(o.name for o in program.outputs) if program else ()

    @cached_property
    def passed(self) -> tuple[str, ...]:
        """The tensors from which backward can be computed, wherever forward was."""
        return (*self.kept, *self.cotangents)

    @cached_property
    def whole(self) -> tuple[str, ...]:
        """Those of them that have x's shape, first the one that gradients lie in memory like."""
        axes = {**self.recipe.axes, **self.recipe.outputs}
        axes |= {COTANGENT + n: axes[n] for n in self.found.results}
        every = [n for n in self.passed if axes.get(n) == FULL]
        assert self.found.backward is not None
        read = [i.name for i in self.found.backward.inputs if i.name in every]
        return tuple(dict.fromkeys([*(n for n in every if n == "x"), *read, *every]))

    def places(
        self, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[tuple[int, torch.dtype] | None, ...]:
        """For each tensor that went in, which output is its gradient, and in which dtype."""
        gradients = self.found.gradients
        return tuple(
            (self.outputs.index(gradients[COTANGENT + name]), dtype)
            if COTANGENT + name in gradients
            else None
            for name, dtype in dtypes.items()
        )


def lent(recipe: Recipe, program: Program) -> str:
    """The tensor that stands for x where a program reads none of x's shape; empty if one is read.

    Outputs take shape, dtype and memory order from it.
    """
    if "x" in recipe.names or any(i.axes == FULL for i in program.inputs):
        return ""
    return recipe.names[recipe.full]


def lend(given: Tensors, name: str) -> Tensors:
    """The tensors, with one of them as x too."""
    return {**given, "x": given[name]}


def spread(
    outs: Sequence[Tensor], places: Iterable[tuple[int, torch.dtype] | None]
) -> list[Tensor | None]:
    """Gradients from what backward computes, each once, in the dtypes of their tensors."""
    return [place and to(outs[place[0]], place[1]) for place in places]


def to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes longer to find that it has it already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def kernels(recipe: Recipe, wrt: tuple[str, ...], target: Target) -> Built:
    """The kernels of a recipe, compiled once."""
    return built(recipe.formula, wrt, recipe.mode, target, recipe.steps)


@lru_cache(maxsize=4096)
def built(
    formula: Formula, wrt: tuple[str, ...], mode: Mode, target: Target, steps: Steps
) -> Built:
    """Kernels by what they depend on; ``built.cache_clear()`` forgets them."""
    return build(formula.definition, formula.label, formula.text, wrt, mode, target, steps)
