"""Objectives: what a layer is judged by once its networks are trained; scores are to be large.

    accuracy    on each network, of images it was not trained on: one score per network
    bytes       memory read and written by forward and backward, in tensors of the size of x
    latency     time of forward and backward, in copies of such a tensor; differs from run to run
    error       of forward and backward in float32: how many decimal digits are right at worst

One more is a function of what was trained:

>>> Objective("short", lambda trained: -len(trained.formula.text)).name
'short'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from normc.errors import NormcError, nearest
from normc.formula import Formula
from normc.ops.cost import costs

if TYPE_CHECKING:
    from normc.search.setting import Setting

SHAPE = (16, 64, 28, 28)
"""Of the tensor that bytes and latency are counted for, channels first, float32."""

ROUNDS = 9
"""Samples of a latency, taken in turns with copies; the median counts."""


@dataclass(frozen=True)
class Trained:
    """A layer, its networks after training, and how often those are right."""

    formula: Formula
    setting: Setting
    networks: Mapping[str, nn.Module]
    accuracies: Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """A name and a measure, of which more is better; worker processes import it by its name."""

    name: str
    measure: Callable[[Trained], float]


def moved(trained: Trained) -> float:
    """Less the bytes moved by forward and backward, in tensors of the size of x."""
    x = torch.empty(SHAPE)
    found = costs(trained.formula, x, trained.setting.groups, backend=trained.setting.backend)
    total = found.forward.bytes + (found.backward.bytes if found.backward else 0)
    return -total / x.nbytes


def latency(trained: Trained) -> float:
    """Less the time of forward and backward, in that of a copy; medians, taken in turns."""
    from normc.analysis.timing import interleave
    from normc.ops.layer import Layer

    how = trained.setting
    layer = Layer(trained.formula, SHAPE[1], groups=how.groups, eps=how.eps, backend=how.backend)
    layer.to(how.device)
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=chance).to(how.device).requires_grad_()
    room, weights = torch.empty_like(x), torch.ones_like(x)

    def both() -> None:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], weights, allow_unused=True)
        _wait(how.device)

    def copy() -> None:
        room.copy_(x.detach())
        _wait(how.device)

    return -interleave({"layer": both, "copy": copy}, ROUNDS).ratio("layer", "copy")


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def digits(trained: Trained) -> float:
    """The decimal digits that are right at worst, of results and gradients in float32."""
    from normc.analysis.agreement import cases, compare

    how = trained.setting
    backend = "auto" if how.device == "cpu" else how.backend
    worst = 0.0
    for case in cases(0, 2, [4], ["float32"]):
        errors = compare(trained.formula, case, backend, eps=how.eps)
        worst = max(worst, *(e.error for e in errors))
    return -math.log10(max(worst, 1e-16))


OBJECTIVES: dict[str, Callable[[Trained], float]] = {
    "bytes": moved,
    "latency": latency,
    "error": digits,
}
"""Those with one score, by the name that a setting has for them."""

ACCURACY = "accuracy"
"""The one with a score for each network."""


def score_names(setting: Setting) -> tuple[str, ...]:
    """What each score of an outcome is of."""
    found: list[str] = []
    for name in setting.objectives:
        each = [f"{name} {net}" for net in setting.architectures]
        found += each if name == ACCURACY else [name]
    return tuple(found)


def expand(setting: Setting, given: Sequence[Objective] = ()) -> list[Objective]:
    """The measures of a setting, one per score; those that are not of the table are passed."""
    own = {o.name: o for o in given}
    found: list[Objective] = []
    for name in setting.objectives:
        if name == ACCURACY:
            found += [_accuracy(net) for net in setting.architectures]
        elif name in own:
            found.append(own[name])
        elif name in OBJECTIVES:
            found.append(Objective(name, OBJECTIVES[name]))
        else:
            known = [ACCURACY, *OBJECTIVES]
            raise NormcError(
                f"no objective is called `{name}`{nearest(name, known)}: there are "
                f"{', '.join(known)}; one of your own is passed as an Objective, also to a resume"
            )
    return found


def _accuracy(net: str) -> Objective:
    return Objective(f"{ACCURACY} {net}", lambda trained: trained.accuracies[net])
