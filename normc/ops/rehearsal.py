"""Rehearsal: a call on its own tensors, run as often as one likes, and what the oracle says of it.

Results, statistics that are handed out and, where gradients are wanted, those too: all that a call
computes is compared, whichever part of it is on trial, as backward reads what forward has stored.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from normc.backends import contract
from normc.backends.calls import Runner
from normc.formula import Formula
from normc.ops.call import Call
from normc.ops.judge import Change, Expected, Tensors, amplification, expect, gradients, results
from normc.pipeline import COTANGENT
from normc.reference import reference


@dataclass(frozen=True)
class Rehearsal:
    """One kind of call, with tensors and eps."""

    formula: Formula
    call: Call
    given: Tensors
    eps: float

    def outcome(self, call: Call) -> Tensors:
        """All that a call of this kind computes; what it leaves out is NaN."""
        with _nothing_left():
            done = call.forward(self.given, self.eps)
            outs = call.backward(self.passed(done), self.eps) if self.cotangents else ()
        names = call.built.programs.results
        found = results(tuple(done[name] for name in names))
        found |= {name: done[name] for name in call.names[len(names) :]}
        places = zip(call.inputs, call.places, strict=True) if outs else ()
        return found | {COTANGENT + name: outs[place[0]] for name, place in places if place}

    def run(self, call: Call, part: str) -> object:
        """One part of a call."""
        if part == "forward":
            return call.forward(self.given, self.eps)
        return call.backward(self.passed(self.saved), self.eps)

    def under(self, part: str, runner: Runner) -> Call:
        """The call with other kernels for one part."""
        other = copy(self.call)
        other.built = replace(self.call.built, **{part: runner})
        other.bound = {}
        return other

    def passed(self, done: Mapping[str, Tensor]) -> Tensors:
        """What backward is given."""
        kept = {n: done[n] if n in done else self.given[n] for n in self.call.kept}
        return kept | {n: self.cotangents[n] for n in self.call.read}

    @cached_property
    def saved(self) -> Tensors:
        """What forward leaves."""
        call = copy(self.call)
        call.bound = {}
        return call.forward(self.given, self.eps)

    @cached_property
    def cotangents(self) -> Tensors:
        """Random numbers, without a trace in anyone's generator; none if no gradient is wanted."""
        call = self.call
        if not (call.gradient and call.outputs):
            return {}
        chance = torch.Generator(call.device).manual_seed(0)

        def normal() -> Tensor:
            how: dict[str, Any] = {"dtype": call.dtype, "device": call.device}
            return torch.empty_strided(call.shape, call.strides, **how).normal_(generator=chance)

        return {name: normal() for name in call.cotangents}

    # --- the oracle ----------------------------------------------------------------------------
    @cached_property
    def expected(self) -> Expected:
        """What the oracle says, in float64."""
        dtype = str(self.call.dtype).removeprefix("torch.")
        large = amplification(self.formula.definition, self.call.geometry, self.eps)
        return expect(lambda change: self._oracle(change) | self._handed_out(change), dtype, large)

    def _oracle(self, change: Change) -> Tensors:
        geometry, oracle = self.call.geometry, reference(self.formula)
        how: dict[str, Any] = {"groups": geometry.g, "channel_dim": geometry.channel_dim}
        how["eps"] = self.eps
        given = {name: change(t) for name, t in self.given.items()}
        if not self.cotangents:
            return results(oracle(**given, **how))
        cotangents = [change(t) for t in self.cotangents.values()]
        found = gradients(lambda **t: oracle(**t, **how), given, cotangents)
        places = zip(self.call.inputs, self.call.places, strict=True)
        unwanted = {COTANGENT + name for name, place in places if not place}
        return {name: t for name, t in found.items() if name not in unwanted}

    def _handed_out(self, change: Change) -> Tensors:
        """Statistics of the batch, which the oracle keeps to itself: those of plain torch ops."""
        names = self.call.names[len(self.call.built.programs.results) :]
        if not names:
            return {}
        given = {name: change(t) for name, t in self.given.items()}
        runner: Any = self.call.built.forward
        job = replace(runner.job, dtype=str(given["x"].dtype).removeprefix("torch."))
        (run,) = contract.find("torch").load([job], [])
        done = run(self.call.geometry, given, self.eps)
        return {name: done[name] for name in names}


@contextmanager
def _nothing_left() -> Generator[None, None, None]:
    """New memory holds NaN: what a kernel leaves out is not there from one that ran before."""
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("warn")
        settings.fill_uninitialized_memory = True
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
