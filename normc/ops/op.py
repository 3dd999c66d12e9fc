"""Op: a compiled formula as a function on tensors, with autograd through the compiled backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normc.backends import contract
from normc.errors import NormcError, ShapeError
from normc.formula import Formula, parse
from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Geometry, Groups, check
from normc.ops.explain import explain
from normc.ops.target import target_of
from normc.pipeline import COTANGENT, Built, Mode, Target, build, sources

Result = Tensor | tuple[Tensor, ...]


class Op:
    """A compiled formula: ``y = op(x, groups=8, v=v)``.

    Kernels are compiled when the first tensors of a new kind (dtype, device, memory order, wanted
    gradients) arrive, and kept.
    """

    def __init__(self, formula: Formula, backend: str = "auto") -> None:
        self.formula = formula
        self.backend = backend
        if backend != "auto":
            contract.find(backend)
        self._splits = _splits_channels(formula)

    def __repr__(self) -> str:
        chosen = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"normc.compile({self.formula.text!r}{chosen})"

    def __call__(
        self,
        x: Tensor,
        *,
        groups: Groups = "auto",
        eps: float = 1e-5,
        channel_dim: int = 1,
        **tensors: Tensor,
    ) -> Result:
        """Run the formula on x of rank 2 to 5; one tensor of x's shape per result.

        ``tensors`` are the formula's parameters, of shape (C,) or (), and inputs, of x's shape
        without the dimensions their declaration leaves out. ``groups`` must divide the channels,
        "auto" is the largest divisor up to 32. Statistics are computed in float32 (float64 for
        float64 x). Raises `ShapeError` for whatever does not fit.
        """
        results, _ = self.run(x, tensors, groups, eps, channel_dim)
        return results[0] if len(results) == 1 else results

    def run(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        groups: Groups,
        eps: float,
        channel_dim: int,
        mode: Mode = "batch",
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The results and, in mode "track", the batch's own value of each running statistic."""
        definition = self.formula.definition
        geometry = check(definition, x, tensors, groups, channel_dim)
        missing = [p.name for p in definition.params if p.name not in tensors]
        if missing:
            raise ShapeError(f"the parameter `{missing[0]}` is missing: pass {missing[0]}=...")
        if not self._splits and geometry.g != 1:
            geometry = Geometry.of(x.shape, 1, channel_dim)
        given = {"x": x, **tensors}
        wrt = _wanted(given)
        call = _Call(self._built(x, given, geometry, wrt, mode), geometry, float(eps), mode)
        names = tuple(given)
        frozen = {name: t.detach() for name, t in (buffers or {}).items()}
        outs = _Autograd.apply(call, names, frozen, *given.values())
        count = len(call.built.programs.results)
        rows = call.built.programs.running if mode == "track" else ()
        return outs[:count], {r.name: t for r, t in zip(rows, outs[count:], strict=True)}

    def _built(
        self,
        x: Tensor,
        given: Mapping[str, Tensor],
        geometry: Geometry,
        wrt: tuple[str, ...],
        mode: Mode,
    ) -> Built:
        full = [given[i.name] for i in self.formula.inputs if i.axes == FULL]
        return _build(self.formula, wrt, mode, target_of(self.backend, x, full, geometry))

    def source(self, backend: str = "c", dtype: str = "float32") -> str:
        """The text of the kernels, forward and backward, that a backend would compile."""
        f = self.formula
        names = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
        found = sources(f.definition, f.label, f.text, names, Target(backend, dtype))
        return "\n".join(source.text for _, source in found)

    def explain(self, x: Tensor, groups: Groups = "auto", channel_dim: int = 1) -> str:
        """The programs and plans for tensors like x, and the bytes each plan moves."""
        return explain(self.formula, x, groups, channel_dim, self.backend)


def compile(formula: Formula | str, backend: str = "auto") -> Op:
    """Compile a formula, or its text, to an op; ``backend`` is auto, c, triton or torch.

    "auto" takes Triton for CUDA tensors and C for CPU tensors where they can run, torch otherwise.
    Raises `FormulaError` for a text that is no formula, `BackendError` for an unknown backend.
    """
    return Op(parse(formula) if isinstance(formula, str) else formula, backend)


@lru_cache(maxsize=4096)
def _build(formula: Formula, wrt: tuple[str, ...], mode: Mode, target: Target) -> Built:
    return build(formula.definition, formula.label, formula.text, wrt, mode, target)


def _splits_channels(formula: Formula) -> bool:
    """Whether any statistic treats groups and the channels in them differently."""
    nodes = postorder(formula.definition.results)
    return any(isinstance(e, Reduce) and e.over & CHANNEL not in (CHANNEL, Axis(0)) for e in nodes)


def _wanted(given: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tensors whose gradient autograd will ask for."""
    if not torch.is_grad_enabled():
        return ()
    return tuple(name for name, t in given.items() if t.requires_grad)


@dataclass
class _Call:
    """What forward and backward of one call share."""

    built: Built
    geometry: Geometry
    eps: float
    mode: Mode


class _Autograd(torch.autograd.Function):
    """The compiled forward with the compiled backward; first order."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, names: tuple[str, ...], frozen: dict[str, Tensor], *args: Tensor
    ) -> tuple[Tensor, ...]:
        found = call.built.programs
        given = dict(zip(names, args, strict=True))
        done = call.built.forward(call.geometry, given | frozen, call.eps)
        ctx.call, ctx.names, ctx.frozen = call, names, frozen
        ctx.save_for_backward(*args, *(done[name] for name in found.saved))
        results = [done[name] for name in found.results]
        tracked = [done[r.output] for r in found.running] if call.mode == "track" else []
        ctx.mark_non_differentiable(*tracked)
        return (*results, *tracked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        found = call.built.programs
        if call.built.backward is None or found.backward is None:  # no result depends on them
            return (None,) * (3 + len(ctx.names))
        given = dict(zip((*ctx.names, *found.saved), ctx.saved_tensors, strict=True)) | ctx.frozen
        for name, grad in zip(found.results, grads, strict=False):
            given[COTANGENT + name] = grad
        done = _Gradients.apply(call, tuple(given), *given.values())
        gradients = dict(zip((o.name for o in found.backward.outputs), done, strict=True))
        return None, None, None, *(gradients.get(COTANGENT + name) for name in ctx.names)


class _Gradients(torch.autograd.Function):
    """The compiled backward; to differentiate it again is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, call: _Call, names: tuple[str, ...], *args: Tensor) -> tuple[Tensor, ...]:
        program, run = call.built.programs.backward, call.built.backward
        assert program is not None and run is not None
        given = dict(zip(names, args, strict=True))
        x = given["x"]
        read = {i.name: given[i.name] for i in program.inputs}
        for name in call.built.programs.results:
            if COTANGENT + name in read:
                read[COTANGENT + name] = _like(read[COTANGENT + name], x)
        done = run(call.geometry, read or {"x": x}, call.eps)
        outs = [(o.name, done[o.name]) for o in program.outputs]
        return tuple(g.to(given[name.removeprefix(COTANGENT)].dtype) for name, g in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NormcError(
            "second derivatives of a compiled formula are not there yet: "
            "use normc.reference(formula) where they are needed"
        )


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in x's memory format, copied only where it is not."""
    target = torch.empty_like(x, device="meta")
    if grad.stride() == target.stride():
        return grad
    return torch.empty_like(x, dtype=grad.dtype).copy_(grad)
