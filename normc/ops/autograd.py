"""Autograd: the compiled forward with the compiled backward, as one differentiable function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normc.backends.contract import Bound
from normc.backends.memory import result_strides
from normc.errors import NormcError
from normc.language.axes import FULL
from normc.language.geometry import Geometry
from normc.pipeline import COTANGENT, Built, Target, build_again, differentiated, past_name

Tensors = Mapping[str, Tensor]
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Origin:
    """Where the kernels of a call came from: what is needed to derive from them again."""

    label: str
    text: str
    target: Target


class Call:
    """What all calls of one kind share: kernels, names, dtypes and strides, found out once."""

    def __init__(
        self,
        built: Built,
        geometry: Geometry,
        given: Tensors,
        track: bool,
        gradient: bool,
        origin: Origin,
    ) -> None:
        found = built.programs
        self.built, self.origin = built, origin
        self._again: dict[tuple[str, ...], Call] = {}
        self.geometry = geometry
        self.gradient = gradient  # whether some tensor wants one
        self.inputs = tuple(given)
        extra = [r.output for r in found.running] if track else []
        self.tracked = len(extra)
        self.names = (*found.results, *extra)  # of what comes out
        x = next(t for t in given.values() if t.shape == geometry.shape_of())  # x, if it is there
        self.shape, self.strides = x.shape, result_strides(x.stride(), geometry)
        self.dtype, self.device = x.dtype, x.device
        self.bound: dict[str, Bound] = {}
        read = {i.name: i.axes for i in found.backward.inputs} if found.backward else {}
        saved = dict.fromkeys((*self.inputs, *found.results, *found.saved))
        self.kept = tuple(n for n in saved if n in read)
        self.cotangents = tuple(COTANGENT + n for n in found.results)
        self.read = tuple(n for n in self.cotangents if n in read)
        self.blank = FULL not in read.values()
        outputs = [o.name for o in found.backward.outputs] if found.backward else []
        self.outputs = tuple(outputs)
        self.places = tuple(
            (outputs.index(found.gradients[COTANGENT + name]), t.dtype)
            if COTANGENT + name in found.gradients
            else None
            for name, t in given.items()
        )

    def forward(self, given: Tensors, eps: float) -> dict[str, Tensor]:
        """Run the forward kernels: results and saved statistics by name."""
        bound = self.bound.get("forward")
        if bound is None:
            bound = self.bound["forward"] = self.built.forward.bind(self.geometry, given)
        return bound(given, eps)

    def backward(self, given: dict[str, Tensor], eps: float) -> tuple[Tensor, ...]:
        """Run the backward kernels: the outputs of the backward program."""
        self._lay(given, self.read)
        if self.blank:  # nothing of x's shape is read, but the gradients take its shape
            given["x"] = self._room()
        bound = self.bound.get("backward")
        if bound is None:
            assert self.built.backward is not None
            bound = self.bound["backward"] = self.built.backward.bind(self.geometry, given)
        done = bound(given, eps)
        return tuple([done[name] for name in self.outputs])

    def again(self, given: Tensors) -> Call:
        """The call that computes the gradients from the inputs and cotangents, differentiably."""
        wanted = tuple(name for name, t in given.items() if t.requires_grad)
        if wanted not in self._again:
            wrt = tuple(n for n, place in zip(self.inputs, self.places, strict=True) if place)
            found = differentiated(self.built.programs, wrt, wanted)
            missing = [i.name for i in found.source.inputs if i.name not in given]
            frozen = {r.stat for r in found.running}
            if any(name not in frozen for name in missing):
                raise NormcError(
                    f"backward has not kept `{missing[0]}`, which a second derivative needs: "
                    "use normc.reference(formula) where it is wanted"
                )
            built = build_again(found, self.origin.label, self.origin.text, self.origin.target)
            arguments = (built, self.geometry, given, False, bool(wanted), self.origin)
            self._again[wanted] = Call(*arguments)
        return self._again[wanted]

    def gradients(self, given: dict[str, Tensor], frozen: Tensors, eps: float) -> Gradients:
        """The gradients, to be differentiated again; by the places that backward gives them."""
        self._lay(given, self.cotangents)
        call = self.again(given)
        given = {name: given[name] for name in call.inputs}
        outs = iter(Autograd.apply(call, eps, dict(frozen), *given.values()))
        return [place and _to(next(outs), place[1]) for place in self.places]

    def _lay(self, given: dict[str, Tensor], names: Iterable[str]) -> None:
        """Let cotangents lie in memory as x does, and small ones densely: as kernels are bound."""
        for name in names:
            if given[name].shape != self.shape:
                given[name] = given[name].contiguous()
            elif given[name].stride() != self.strides:
                given[name] = self._room().copy_(given[name])

    def _room(self) -> Tensor:
        dtype, device = self.dtype, self.device
        return torch.empty_strided(self.shape, self.strides, dtype=dtype, device=device)


class Autograd(torch.autograd.Function):
    """Results with the gradients of all inputs."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, eps: float, frozen: dict[str, Tensor], *args: Tensor
    ) -> tuple[Tensor, ...]:
        given = dict(zip(call.inputs, args, strict=True)) | frozen
        done = call.forward(given, eps)
        ctx.call, ctx.eps, ctx.frozen = call, eps, frozen
        ctx.save_for_backward(*[done[n] if n in done else given[n] for n in call.kept])
        outs = tuple([done[name] for name in call.names])
        if call.tracked:
            ctx.mark_non_differentiable(*outs[-call.tracked :])
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if not call.outputs:  # no result depends on what wants a gradient
            return (None,) * (3 + len(call.inputs))
        given = dict(zip(call.kept, ctx.saved_tensors, strict=True))
        if torch.is_grad_enabled():
            found = call.built.programs
            past = {name: past_name(found.level, name) for name in found.results}
            known = {name: name for name in call.inputs} | past
            given = {known[name]: t for name, t in given.items() if name in known}
            given |= dict(zip(call.cotangents, grads, strict=False))
            return None, None, None, *call.gradients(given, ctx.frozen, ctx.eps)
        given |= ctx.frozen
        for name, grad in zip(call.cotangents, grads, strict=False):
            if name in call.read:
                given[name] = grad
        done = call.backward(given, ctx.eps)
        return None, None, None, *[place and _to(done[place[0]], place[1]) for place in call.places]


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
