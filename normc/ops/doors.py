"""Doors: the ways into a compiled computation, by who is watching.

    1  nobody                                  the kernels
    2  autograd                                a Function that costs little per call
    3  torch.func, forward-mode autograd       a Function with rules for vjp, jvp and vmap
    4  torch.compile, torch.export, dispatch   an opaque operator of torch's library
       modes, subclasses of Tensor
    5  torch.compile of a torch.func,          plain torch operations, for the compiler to transform
       torch.jit.trace                         or to be written down

One Function cannot serve all: torch.library's autograd has no forward mode, of which nothing warns,
and a Function with forward mode cannot be traced by torch.compile. Doors 1 to 4 run the same
kernels. `enter` knows the first four; the fifth, `normc.ops.composite`, is chosen with the fourth
in `normc.ops.traced`, and serves the vmap of older interfaces, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normc.ops import library
from normc.ops.batching import Batched
from normc.ops.call import Call, spread, to
from normc.ops.composite import plainly
from normc.ops.setting import Setting, wanted

Outs = tuple[Tensor, ...]


def enter(setting: Setting, eps: float, args: Sequence[Tensor]) -> Outs:
    """All outputs, through whichever door leads to what is watching; not for a compiler's trace."""
    args = [t.resolve_neg() if t.is_neg() else t for t in args]  # kernels read memory as it is
    if batched(args) or _tracing():
        return plainly(setting, eps, args)
    if transformed():
        return Functional.apply(setting, eps, *args)
    if foreign(args):
        return library.outputs(setting, eps, args)
    wrt = wanted(setting.recipe.names, args)
    call = setting.call(args, wrt)
    return Autograd.apply(call, eps, setting, *args) if wrt else run(call, eps, args)


def run(call: Call, eps: float, args: Sequence[Tensor]) -> Outs:
    """Door 1."""
    done = call.forward(dict(zip(call.inputs, args, strict=True)), eps)
    return tuple([done[name] for name in call.names])


class Autograd(torch.autograd.Function):
    """Door 2: forward saves what the compiled backward reads."""

    @staticmethod
    def forward(ctx: Any, call: Call, eps: float, setting: Setting, *args: Tensor) -> Outs:
        given = dict(zip(call.inputs, args, strict=True))
        done = call.forward(given, eps)
        ctx.how = call, eps, setting
        ctx.save_for_backward(*[given[n] for n in call.kept_given],
                              *[done[n] for n in call.kept_made])  # fmt: skip
        outs = tuple([done[name] for name in call.names])
        if call.tracked:
            ctx.mark_non_differentiable(*outs[-call.tracked :])
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Call
        call, eps, setting = ctx.how
        if not call.outputs:  # no result depends on what wants a gradient
            return (None,) * (3 + len(call.inputs))
        given = dict[str, Tensor]()
        if call.kept:  # once freed, saved tensors may not be asked for, be they none
            given.update(zip(call.kept, ctx.saved_tensors, strict=True))
        if torch.is_grad_enabled() or transformed() or foreign(grads) or batched(grads):
            wrt = [n for n, place in zip(call.inputs, call.places, strict=True) if place]
            found, args = setting.pulled(wrt, given, grads)
            outs = iter(enter(found, eps, args))
            return None, None, None, *[p and to(next(outs), p[1]) for p in call.places]
        for name, grad in zip(call.cotangents, grads, strict=False):
            if name in call.read:
                given[name] = grad
        return None, None, None, *spread(call.backward(given, eps), call.places)


class Functional(torch.autograd.Function):
    """Door 3: every rule is a program derived from the program, and enters again."""

    @staticmethod
    def forward(setting: Setting, eps: float, *args: Tensor) -> Outs:
        if foreign(args):
            return library.outputs(setting, eps, args)
        return run(setting.call(args, ()), eps, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outs) -> None:
        setting, eps, *args = inputs
        results = len(setting.recipe.results)
        ctx.setting, ctx.eps, ctx.dtypes = setting, eps, [t.dtype for t in args]
        ctx.save_for_backward(*args, *output[:results])
        ctx.save_for_forward(*args)
        ctx.mark_non_differentiable(*output[results:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        names, results = setting.recipe.names, setting.recipe.results
        wrt = [n for n, need in zip(names, ctx.needs_input_grad[2:], strict=True) if need]
        wrt = [n for n in wrt if n in setting.reads]
        if not wrt:
            return (None,) * (2 + len(names))
        known = dict(zip((*names, *results), ctx.saved_tensors, strict=True))
        found, args = setting.pulled(wrt, known, grads)
        outs = dict(zip(wrt, enter(found, ctx.eps, args), strict=True))
        dtypes = zip(names, ctx.dtypes, strict=True)
        return None, None, *[to(outs[n], d) if n in outs else None for n, d in dtypes]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        setting: Setting = ctx.setting
        names, blank = setting.recipe.names, len(setting.recipe.outputs)
        along = {n: t for n, t in zip(names, tangents[2:], strict=True) if t is not None}
        found, args = setting.pushed(along, ctx.saved_tensors[: len(names)])
        outs = enter(found, ctx.eps, args)
        return *outs, *[None] * (blank - len(outs))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        setting, eps, *tensors = args
        batched = Batched(setting, info.batch_size, in_dims[2:], tensors)
        return batched.run(lambda one, given: enter(one, eps, given))


def transformed() -> bool:
    """Whether torch.func or forward-mode autograd is at work."""
    functorch = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    return functorch or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def foreign(args: Sequence[Tensor]) -> bool:
    """Whether someone watches operators, or a tensor may have no memory that kernels can read."""
    return watched() or not all(type(t) in PLAIN for t in args)


def watched() -> bool:
    """Whether a mode of torch's dispatcher is active, as in FakeTensorMode or FlopCounterMode, or
    torch.jit.trace is."""
    modes = torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage]
    return modes or _tracing()


def batched(args: Sequence[Tensor]) -> bool:
    """Whether the vmap before torch.func is at work, that of ``is_grads_batched``; no Function has
    a rule for it, so the operations of the program are gone through one by one."""
    return any(_legacy(t) for t in args)


_tracing: Callable[[], bool] = torch._C._is_tracing  # pyright: ignore  # torch.jit.trace's
_functorch: Any = sys.modules["torch._C._functorch"]  # which torch's stubs leave out
_legacy: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor

PLAIN = (Tensor, torch.nn.Parameter)
