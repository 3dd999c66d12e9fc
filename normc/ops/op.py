"""Op: a compiled formula as a function on tensors, with autograd through the compiled backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normc import config
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
        self._calls: dict[Any, _Call] = {}

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
        given = {"x": x, **tensors}
        backend = config.backend() if self.backend == "auto" else self.backend
        how = (backend, groups, channel_dim, mode, torch.is_grad_enabled())
        key = (*how, *map(_kind, given.items()))
        call = self._calls.get(key)
        if call is None:
            call = self._call(given, groups, channel_dim, mode)
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[key] = call
        frozen = {name: t.detach() for name, t in buffers.items()} if buffers else {}
        found = call.built.programs
        if found.backward is None and not call.gradient and not _transformed():
            done = call.built.forward(call.geometry, given | frozen, eps)
            outs = tuple(done[name] for name in call.names)
        else:
            outs = _Autograd.apply(call, eps, tuple(given), frozen, *given.values())
        if mode != "track":
            return outs, {}
        count = len(found.results)
        return outs[:count], {r.name: t for r, t in zip(found.running, outs[count:], strict=True)}

    def _call(
        self, given: Mapping[str, Tensor], groups: Groups, channel_dim: int, mode: Mode
    ) -> _Call:
        """Check a call and build its kernels; done once per kind of call."""
        x, definition = given["x"], self.formula.definition
        tensors = {name: t for name, t in given.items() if name != "x"}
        geometry = check(definition, x, tensors, groups, channel_dim)
        missing = [p.name for p in definition.params if p.name not in tensors]
        if missing:
            raise ShapeError(f"the parameter `{missing[0]}` is missing: pass {missing[0]}=...")
        if not self._splits and geometry.g != 1:
            geometry = Geometry.of(x.shape, 1, channel_dim)
        full = [given[i.name] for i in self.formula.inputs if i.axes == FULL]
        wrt = _wanted(given)
        built = _build(self.formula, wrt, mode, target_of(self.backend, x, full, geometry))
        found = built.programs
        extra = [r.output for r in found.running] if mode == "track" else []
        return _Call(built, geometry, (*found.results, *extra), len(extra), bool(wrt))

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: object) -> Op:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Op, (self.formula, self.backend)

    def source(self, backend: str = "c", dtype: str = "float32") -> str:
        """The text of the kernels, forward and backward, that a backend would compile."""
        f = self.formula
        names = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
        made = list(sources(f.definition, f.label, f.text, names, Target(backend, dtype)))
        return contract.find(backend).unit([job for job, _ in made], [text for _, text in made])

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


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which autograd's own door has to refuse."""
    functorch = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    return functorch or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


_MOST_CALLS = 4096
"""Kinds of calls an op remembers before it forgets them all."""


def _kind(item: tuple[str, Tensor]) -> tuple[Any, ...]:
    """What decides which kernels a tensor needs, and whether it fits."""
    name, t = item
    return name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad


@dataclass(frozen=True)
class _Call:
    """What all calls of one kind share."""

    built: Built
    geometry: Geometry
    names: tuple[str, ...]  # of what comes out: results, then tracked statistics
    tracked: int
    gradient: bool  # whether some tensor wants one


class _Autograd(torch.autograd.Function):
    """The compiled forward with the compiled backward."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        eps: float,
        names: tuple[str, ...],
        frozen: dict[str, Tensor],
        *args: Tensor,
    ) -> tuple[Tensor, ...]:
        given = dict(zip(names, args, strict=True)) | frozen
        done = call.built.forward(call.geometry, given, eps)
        ctx.call, ctx.eps, ctx.names, ctx.frozen = call, eps, names, frozen
        ctx.save_for_backward(*args, *[done[name] for name in call.built.programs.saved])
        outs = tuple(done[name] for name in call.names)
        if call.tracked:
            ctx.mark_non_differentiable(*outs[-call.tracked :])
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        found = call.built.programs
        if call.built.backward is None or found.backward is None:  # no result depends on them
            return (None,) * (4 + len(ctx.names))
        given = dict(zip((*ctx.names, *found.saved), ctx.saved_tensors, strict=True)) | ctx.frozen
        for name, grad in zip(found.results, grads, strict=False):
            given[COTANGENT + name] = grad
        run = _Gradients.apply if torch.is_grad_enabled() else _gradients
        done = run(call, ctx.eps, tuple(given), *given.values())
        gradients = dict(zip((o.name for o in found.backward.outputs), done, strict=True))
        return None, None, None, None, *[gradients.get(COTANGENT + name) for name in ctx.names]


def _gradients(
    call: _Call, eps: float, names: tuple[str, ...], *args: Tensor
) -> tuple[Tensor, ...]:
    """Run the compiled backward: the gradients, each in the dtype of what it belongs to."""
    program, run = call.built.programs.backward, call.built.backward
    assert program is not None and run is not None
    given = dict(zip(names, args, strict=True))
    x = given["x"]
    read = {i.name: given[i.name] for i in program.inputs}
    for name in call.built.programs.results:
        if COTANGENT + name in read:
            read[COTANGENT + name] = _like(read[COTANGENT + name], x)
    done = run(call.geometry, {"x": x, **read}, eps)
    outs = [(o.name, done[o.name]) for o in program.outputs]
    return tuple(g.to(given[name.removeprefix(COTANGENT)].dtype) for name, g in outs)


class _Gradients(torch.autograd.Function):
    """The compiled backward; to differentiate it again is an error, not a silent zero."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, eps: float, names: tuple[str, ...], *args: Tensor
    ) -> tuple[Tensor, ...]:
        return _gradients(call, eps, names, *args)

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
