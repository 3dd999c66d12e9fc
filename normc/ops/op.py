"""Op: a compiled formula as a function on tensors, with autograd through the compiled backward."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normc import config
from normc.backends import contract
from normc.errors import ShapeError
from normc.formula import Formula, parse
from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.expr import Reduce, postorder
from normc.language.geometry import Geometry, Groups, check
from normc.ops.autograd import Autograd, Call, Origin
from normc.ops.explain import explain
from normc.ops.target import target_of
from normc.pipeline import Built, Mode, Target, build, sources

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
        self._calls: dict[Any, Call] = {}
        self._ready: dict[tuple[Mode, Target], tuple[Built, bool]] = {}

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
        how = (backend, groups, channel_dim, mode, torch.is_grad_enabled(), *given)
        every = [*given.values(), *buffers.values()] if buffers else given.values()
        key = (*how, *[(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in every])
        call = self._calls.get(key)
        if call is None:
            call = self._call(given, groups, channel_dim, mode)
            if config.tune() and not buffers and not _transformed():
                from normc.ops.tune import tune  # seldom wanted

                tune(self.formula, call, given, eps)
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[key] = call
        frozen = {name: t.detach() for name, t in buffers.items()} if buffers else {}
        if call.gradient or _transformed():
            outs = Autograd.apply(call, eps, frozen, *given.values())
        else:
            done = call.forward(given | frozen if frozen else given, eps)
            outs = tuple([done[name] for name in call.names])
        if mode != "track":
            return outs, {}
        found = call.built.programs
        count = len(found.results)
        return outs[:count], {r.name: t for r, t in zip(found.running, outs[count:], strict=True)}

    def _call(
        self, given: Mapping[str, Tensor], groups: Groups, channel_dim: int, mode: Mode
    ) -> Call:
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
        target = target_of(self.formula, self.backend, x, full, geometry)
        built, differentiable = self._ready.get((mode, target), (None, False))
        if built is None or (wrt and not differentiable):
            built = _build(self.formula, wrt, mode, target)
        origin = Origin(self.formula.label, self.formula.text, target)
        return Call(built, geometry, given, mode == "track", bool(wrt), origin)

    def use(self, built: Built, mode: Mode, target: Target, differentiable: bool) -> None:
        """Take these kernels for calls of their kind; with all gradients they serve any call."""
        self._ready[mode, target] = built, differentiable

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

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write one Python file that computes the formula without normc; returns its path.

        The file needs torch and triton. It holds a function of x and the formula's inputs and
        parameters, named as the formula is in the zoo, else as the file; Triton kernels for forward
        and backward, resident and streaming, which store float32, float16 and bfloat16 and compute
        in float32; the same as plain torch operations, for the CPU and for float64; and a check of
        it all, which runs when the file does. A file that is there is overwritten. Raises
        `NormcError` for a formula that reads no tensor or names one like a result or a gradient,
        OSError where the file cannot be written.
        """
        from normc.ops.export import export  # brings sympy, which takes 0.3 s to import

        return export(self.formula, path)


def compile(formula: Formula | str, backend: str = "auto") -> Op:
    """Compile a formula, or its text, to an op; ``backend`` is auto, c, triton, tape or torch.

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
