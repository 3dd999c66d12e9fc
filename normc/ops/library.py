"""Library: forward and backward as operators of ``torch.library``, opaque to whoever traces.

    normc::forward(tensors, recipe, wrt, groups, channel_dim, eps)    outputs, then saved statistics
    normc::backward(tensors, recipe, wrt, groups, channel_dim, eps)   gradients, each once

They serve any formula: ``recipe`` is a text, which says what to compute (`normc.ops.recipe`), and
``wrt`` names the tensors whose gradients are wanted, separated by spaces. A graph that holds them
can be saved, and loaded where normc is. ``groups`` 0 stands for "auto".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from normc.backends.memory import full_input, walkable, wide
from normc.language.axes import FULL, Axis
from normc.language.geometry import Geometry
from normc.ops.batching import Batched, one_by_one
from normc.ops.call import Back, lend, lent, spread
from normc.ops.recipe import read
from normc.ops.setting import Setting, wanted
from normc.pipeline import Programs

_ARGUMENTS = "(Tensor[] tensors, str recipe, str wrt, int groups, int channel_dim, float eps)"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("normc", "DEF")

Options = tuple[str, str, int, int, float]
"""An operator's arguments but for the tensors."""


@lru_cache(maxsize=4096)
def setting_of(recipe: str, groups: int, channel_dim: int) -> Setting:
    """The setting that an operator's arguments describe."""
    return Setting(read(recipe), groups or "auto", channel_dim)


def described(
    recipe: str, wrt: str, groups: int, channel_dim: int, *_: Any
) -> tuple[Setting, Programs]:
    """The setting and the programs that an operator's arguments describe."""
    setting = setting_of(recipe, groups, channel_dim)
    return setting, setting.recipe.programs(tuple(wrt.split()))


def outputs(setting: Setting, eps: float, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a setting, by way of the operator."""
    recipe = setting.recipe
    groups = 0 if setting.asked == "auto" else setting.asked
    wrt = " ".join(wanted(recipe.names, args))
    options = (recipe.text, wrt, groups, setting.channel_dim, float(eps))
    outs = torch.ops.normc.forward(list(args), *options)
    return tuple(outs[: len(recipe.outputs)])


# --- what they compute ------------------------------------------------------------------------


def _forward(tensors: list[Tensor], *options: Any) -> list[Tensor]:
    recipe, wrt, groups, channel_dim, eps = cast(Options, options)
    setting = setting_of(recipe, groups, channel_dim)
    call = setting.call(tensors, tuple(wrt.split()))
    done = call.forward(dict(zip(call.inputs, tensors, strict=True)), eps)
    return [done[name] for name in (*call.names, *call.built.programs.saved)]


def _backward(tensors: list[Tensor], *options: Any) -> list[Tensor]:
    recipe, wrt, groups, channel_dim, eps = cast(Options, options)
    call = setting_of(recipe, groups, channel_dim).back(tensors, tuple(wrt.split()))
    return list(call.backward(dict(zip(call.inputs, tensors, strict=True)), eps))


# --- what they would return: shapes, strides and dtypes, symbols allowed -------------------------


def _fake_forward(tensors: list[Tensor], *options: Any) -> list[Tensor]:
    setting, found = described(*cast(Options, options))
    geometry, names = setting.checked(tensors), setting.recipe.names
    given, name = dict(zip(names, tensors, strict=True)), lent(setting.recipe, found.forward)
    like = full_input(found.forward, lend(given, name) if name else given)
    stats = {s.name: s.kept for s in found.forward.stats}
    saved = [_statistic(stats[name], geometry, like) for name in found.saved]
    return [*(_room(o.axes, geometry, like) for o in found.source.outputs), *saved]


def _fake_backward(tensors: list[Tensor], *options: Any) -> list[Tensor]:
    setting, found = described(*cast(Options, options))
    back = Back(setting.recipe, found)
    like = dict(zip(back.passed, tensors, strict=True))[back.whole[0]]
    geometry = Geometry.of(like.shape, setting.groups, setting.channel_dim)
    assert found.backward is not None
    return [_room(o.axes, geometry, like) for o in found.backward.outputs]


def _room(axes: Axis, geometry: Geometry, like: Tensor) -> Tensor:
    """An output, as the backends allocate it."""
    if axes != FULL:
        return like.new_empty(geometry.shape_of(axes), dtype=wide(like.dtype))
    return torch.empty_like(walkable(torch.empty_like(like), FULL, geometry))


def _statistic(kept: Axis, geometry: Geometry, like: Tensor) -> Tensor:
    return like.new_empty(geometry.sizes(kept), dtype=wide(like.dtype))


# --- how they are differentiated -----------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *options = inputs
    setting, found = described(*cast(Options, tuple(options)))
    ctx.options, ctx.setting, ctx.found = options, setting, found
    ctx.dtypes = dict(zip(setting.recipe.names, [t.dtype for t in tensors], strict=True))
    made = dict(zip((*setting.recipe.outputs, *found.saved), output, strict=True))
    given = dict(zip(setting.recipe.names, tensors, strict=True)) | made
    ctx.back = Back(setting.recipe, found)
    ctx.save_for_backward(*[given[n] for n in ctx.back.kept])
    ctx.mark_non_differentiable(*output[len(setting.recipe.results) :])


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    back: Back = ctx.back
    names, nothing = ctx.setting.recipe.names, (None,) * 5
    if not back.outputs:
        return [None] * len(names), *nothing
    cotangents = grads[: len(back.cotangents)]
    if torch.is_grad_enabled():
        return _again(ctx, cotangents), *nothing
    outs = torch.ops.normc.backward([*ctx.saved_tensors, *cotangents], *ctx.options)
    return spread(outs, back.places(ctx.dtypes)), *nothing


def _again(ctx: Any, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients by way of an operator that can be differentiated."""
    places = ctx.back.places(ctx.dtypes)
    names = ctx.setting.recipe.names
    wrt = [n for n, place in zip(names, places, strict=True) if place]
    known = dict(zip(ctx.back.kept, ctx.saved_tensors, strict=True))
    setting, args = ctx.setting.pulled(wrt, known, cotangents)
    outs = iter(outputs(setting, ctx.options[-1], args))
    return [place and next(outs).to(place[1]) for place in places]


# --- how they are batched ------------------------------------------------------------------------


def _batch_forward(
    info: Any, in_dims: tuple[Any, ...], tensors: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[int | None]]:
    recipe, wrt, groups, channel_dim, eps = cast(Options, options)
    call = partial(_each, torch.ops.normc.forward, options)
    if wrt:  # what is saved is for a backward that is batched on its own
        return one_by_one(info.batch_size, in_dims[0], tensors, call)
    setting = setting_of(recipe, groups, channel_dim)
    batched = Batched(setting, info.batch_size, in_dims[0], tensors)
    outs, dims = batched.run(lambda one, given: outputs(one, eps, given))
    return list(outs), list(dims)


def _batch_backward(
    info: Any, in_dims: tuple[Any, ...], tensors: list[Tensor], *options: Any
) -> tuple[list[Tensor], list[int | None]]:
    call = partial(_each, torch.ops.normc.backward, options)
    return one_by_one(info.batch_size, in_dims[0], tensors, call)


def _each(op: Any, options: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    return op(list(tensors), *options)


def _register() -> None:
    every = {"forward": (_forward, _fake_forward, _batch_forward)}
    every["backward"] = (_backward, _fake_backward, _batch_backward)
    for name, (run, fake, batch) in every.items():
        library.define(f"{name}{_ARGUMENTS} -> Tensor[]", tags=_TAGS)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"normc::{name}", fake, lib=library)
        torch.library.register_vmap(f"normc::{name}", batch, lib=library)
    torch.library.register_autograd(
        "normc::forward", _differentiate, setup_context=_setup_context, lib=library
    )


_register()
