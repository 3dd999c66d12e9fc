"""replace_norms: the norms of a torch model become layers of a formula, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]

from normc.errors import FormulaError, NormcError, ShapeError
from normc.formula import Formula
from normc.language.axes import CHANNEL, Axis
from normc.language.definition import X
from normc.language.geometry import Groups
from normc.ops.dropin import activates, norm_of
from normc.ops.follower import follower
from normc.ops.grouping import Data, Grouping, Where, chosen_of
from normc.ops.layer import Layer
from normc.pipeline import programs

_OVER_CHANNELS = (nn.LayerNorm, nn.RMSNorm)
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, *_OVER_CHANNELS)
"""The norms of torch, which subclasses of other libraries belong to."""
_FORMER = "_normc_former"


class _Former(NamedTuple):
    """What stood in the place of a new module; inside a tuple, torch does not see the modules."""

    module: nn.Module
    layer: Layer | None  # whose weights and statistics go back to it


class _Settings(NamedTuple):
    formula: Formula
    groups: Callable[[nn.Module], Groups]
    eps: float | None
    momentum: float | None
    fuse: bool  # the activation is in the formula


def replace_norms(
    model: nn.Module,
    formula: Formula | str,
    *,
    groups: Grouping | Mapping[str, int] = "auto",
    eps: float | None = None,
    momentum: float | None = None,
    act: bool = True,
    data: Data | None = None,
    shape: Sequence[int] | None = None,
) -> nn.Module:
    """Replace every norm in a model by a `Layer` of the formula, in place; returns the model.

    Norms are torch's BatchNorm, SyncBatchNorm, InstanceNorm and GroupNorm, LayerNorm and RMSNorm
    over one dimension, which is the last one (dimension 1 if the class is named ``...2d``, as
    LayerNorm2d of torchvision and timm), and their subclasses. ``formula`` is a formula, its text,
    or a name in the zoo. None for ``eps`` and ``momentum``, and "auto" for ``groups``, keep what
    the norm has. A layer in place of SyncBatchNorm takes its statistics over all processes, too.

    ``groups="isometric"`` finds for each norm the number of groups that keeps the scale of
    gradients best: `normc.analysis.isometric_groups_of` runs the model once, on the first batch of
    ``data`` or a Gaussian one of ``shape``, to see which convolution feeds which norm, with a relu
    behind a formula that has no activation of its own. A mapping from paths to numbers, such as
    that function's result with other settings, is taken as well. Norms that neither has are "auto".

    weight is copied to a ``gamma`` that starts at 1, bias to a ``beta`` that starts at 0, and
    BatchNorm's running mean and variance to those of x in the formula. Other parameters start where
    the formula says. dtype, device, mode and requires_grad stay, shared modules stay shared. The
    parameters are new: make the optimizer afterwards. A `Layer` is not a
    norm here: revert before another replacement.

    If the formula contains an activation (it is not affine in x, given its statistics) and ``act``
    is true, the activation that follows a norm becomes nn.Identity. It is one of torch's, without
    gates such as nn.Sigmoid; it stands directly behind the norm in an nn.Sequential, or is the next
    child of the same parent, by name (bn1 and act1, norm and act, norm1 and relu1), and is applied
    once in its methods, to what the norm returns. An activation that is called as a function, or
    shared as torchvision's ``relu`` of a residual block, cannot be seen, and is left. A subclass
    with an ``act`` of its own, as timm's BatchNormAct2d, becomes one layer. Every norm gets the
    same formula, also one that no activation follows; and ``dyt``, not affine either, is meant with
    ``act=False``.

    Raises `NormcError`, naming the module's path, and then leaves the model as it was.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> [type(m).__name__ for m in replace_norms(net, "evonorm_s0")]
    ['Conv2d', 'Layer', 'Identity']
    """
    chosen = norm_of(formula)
    if isinstance(model, NORMS):
        raise NormcError("the model is itself a norm, which only its parent could replace")
    norms = {path: child for path, _, _, child in _slots(model) if isinstance(child, NORMS)}
    number = chosen_of(groups, chosen, model, norms, Where(data, shape))
    how = _Settings(chosen, number, eps, momentum, act and activates(chosen))
    for parent, name, new in list(_swaps(model, how)):  # all are made before one is put in
        parent.add_module(name, new)
    return model


def revert_norms(model: nn.Module) -> nn.Module:
    """Undo `replace_norms`: put the former modules back, in place; returns the model.

    What was copied to a layer is copied back, so that trained weights and statistics stay.
    """
    for _, parent, name, child in list(_slots(model)):
        former: _Former | None = getattr(child, _FORMER, None)
        if former is None:
            continue
        if former.layer is not None:
            _give_back(former.layer, former.module)
        parent.add_module(name, former.module.train(child.training))
    return model


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place of a child: its path, the parent, its name there, and the child."""
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():  # pyright: ignore[reportPrivateUsage]
            if child is not None:  # named_children would leave out a shared one
                yield (f"{path}.{name}" if path else name), parent, name, child


def _swaps(model: nn.Module, how: _Settings) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The new modules, each with its parent and its name there."""
    made: dict[int, nn.Module] = {}
    for path, parent, name, child in _slots(model):
        if not isinstance(child, NORMS):
            continue
        if id(child) not in made:
            made[id(child)] = _replacement(child, path, model, how)
        yield parent, name, made[id(child)]
        behind = follower(parent, name) if how.fuse and not _own_act(child) else None
        if behind is not None:
            nothing = nn.Identity()
            setattr(nothing, _FORMER, _Former(parent.get_submodule(behind), None))
            yield parent, behind, nothing


def _replacement(norm: nn.Module, path: str, model: nn.Module, how: _Settings) -> nn.Module:
    """The module to stand in the place of a norm, with its state."""
    try:
        layer = _layer(norm, model, how)
    except NormcError as error:
        kind = FormulaError if isinstance(error, FormulaError) else ShapeError
        raise kind(f"{path} ({type(norm).__name__}): {error}") from error
    for theirs, ours in _pairs(norm, layer):
        value = getattr(norm, theirs)
        if isinstance(value, nn.Parameter):
            setattr(layer, ours, nn.Parameter(value.detach().clone(), value.requires_grad))
        else:
            setattr(layer, ours, value.detach().clone())
    new: nn.Module = layer
    own = _own_act(norm)
    if own is not None and not how.fuse:
        new = nn.Sequential(OrderedDict(norm=layer, act=own))
    new.train(norm.training)
    setattr(new, _FORMER, _Former(norm, layer))
    return new


def _layer(norm: nn.Module, model: nn.Module, how: _Settings) -> Layer:
    """A layer with a norm's settings, its parameters as they start."""
    like = _tensor_of(norm, model)
    groups, eps, momentum = how.groups(norm), how.eps, how.momentum
    if groups == "auto" and isinstance(norm, nn.GroupNorm):
        groups = norm.num_groups
    if eps is None:  # RMSNorm without one takes the dtype's
        own: float | None = getattr(norm, "eps", None)
        eps = torch.finfo(like.dtype).eps if own is None else own
    if momentum is None:
        momentum = getattr(norm, "momentum", 0.1)
    last = isinstance(norm, _OVER_CHANNELS) and not type(norm).__name__.endswith("2d")
    layer = Layer(
        how.formula,
        _channels(norm),
        groups=groups,
        eps=eps,
        momentum=momentum,
        channel_dim=-1 if last else 1,
        track_running_stats=not isinstance(norm, _BatchNorm) or norm.track_running_stats,
        sync=isinstance(norm, nn.SyncBatchNorm),
        process_group=getattr(norm, "process_group", None),
        device=like.device,
        dtype=like.dtype,
    )
    theirs = list(norm.parameters(recurse=False))
    return layer.requires_grad_(not theirs or any(p.requires_grad for p in theirs))


def _channels(norm: nn.Module) -> int:
    shape: Any = getattr(norm, "normalized_shape", None)
    if shape is not None:
        if len(shape) != 1:
            raise ShapeError(f"it normalizes {len(shape)} dimensions {tuple(shape)}, not channels")
        return shape[0]
    count: int = norm.num_channels if isinstance(norm, nn.GroupNorm) else getattr(
        norm, "num_features", 0
    )  # fmt: skip
    if not count:
        raise ShapeError("it has no channel count yet: call the model once, then replace")
    return count


def _tensor_of(norm: nn.Module, model: nn.Module) -> Tensor:
    """A tensor with the dtype and device that a norm works in, its own or the model's."""
    for t in (*norm.parameters(), *norm.buffers(), *model.parameters()):
        if t.is_floating_point():
            return t
    return torch.empty(0)


def _own_act(norm: nn.Module) -> nn.Module | None:
    """The activation inside of timm's BatchNormAct2d and its like."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None


def _pairs(norm: nn.Module, layer: Layer) -> Iterator[tuple[str, str]]:
    """The tensors that mean the same: the norm's name, the layer's name."""
    params = {p.name: p for p in layer.formula.params}
    for theirs, ours, start in (("weight", "gamma", 1.0), ("bias", "beta", 0.0)):
        p = params.get(ours)  # where 1 + gamma is the gain, gamma starts at 0 and is no weight
        if getattr(norm, theirs, None) is not None and p and (p.axes, p.init) == (CHANNEL, start):
            yield theirs, ours
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or not layer.running:
        return
    stats = {s.name: s for s in programs(layer.formula.definition, ()).source.stats}
    for r in layer.running:
        of_x = stats[r.stat].arg is X and r.over == Axis.N | Axis.S
        if of_x and r.op in ("mean", "var"):
            yield f"running_{r.op}", r.name
    yield "num_batches_tracked", "num_batches_tracked"


def _give_back(layer: Layer, norm: nn.Module) -> None:
    """Copy to a norm what it shares with its layer, and move the rest of it along."""
    at = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    if at is not None:
        norm.to(at)
    for theirs, ours in _pairs(norm, layer):
        target, value = getattr(norm, theirs), getattr(layer, ours)
        target.data = value.detach().clone()  # the same parameter, as the norm's owner knows it
        target.requires_grad_(value.requires_grad)
