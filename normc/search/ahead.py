"""Ahead: the kernels that an evaluation will launch on a GPU, compiled by a process without one.

The networks are gone through once with tensors that have shapes and no content, in each way an
evaluation uses them: a step of training, the two derivatives of a step of stability, and judging.
What normc is asked for meanwhile is noted, and compiled. Triton's cache on the disk then hands the
kernels to the process that trains.

What is launched depends on how many processors a GPU has. One with fewer than `MACHINES` has for
its architecture may want other kernels, and compiles them when it meets them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from normc.errors import NormcError
from normc.formula import parse
from normc.language.geometry import Geometry
from normc.ops import library
from normc.ops.call import Back
from normc.ops.layer import Layer
from normc.ops.target import choose, order_of, target_ahead
from normc.pipeline import render
from normc.search.data import Images
from normc.search.evaluate import AFFINE
from normc.search.nets import Layers, build
from normc.search.setting import Setting
from normc.search.stability import length
from normc.search.training import AT_ONCE

Options = tuple[str, str, int, int, float]
"""What normc's operators are told beside tensors: recipe, wrt, groups, channel_dim, eps."""


@dataclass(frozen=True)
class Noted:
    """One kind of call."""

    part: str  # "forward" or "backward"
    options: Options
    shape: tuple[int, ...]  # of the tensor that tells shape and strides of all
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Ahead:
    """Compiles for one setting and one GPU."""

    setting: Setting
    images: Images
    target: str  # as Triton calls the architecture; empty if there is nothing to compile

    @staticmethod
    def of(setting: Setting, images: Images) -> Ahead:
        """For the GPU of the setting, which is asked what it is and not used."""
        triton = choose(setting.backend, "float32", "cuda") == "triton"
        return Ahead(setting, images, architecture(setting.device) if triton else "")

    def __call__(self, text: str) -> int:
        """Compile what a formula needs; how many kinds of calls were compiled for."""
        if not self.target:
            return 0
        return sum(self._compiled(call) for call in self.calls(text))

    def calls(self, text: str) -> list[Noted]:
        """Every kind of call that the evaluation of a formula makes, each once."""
        how = self.setting
        noted = _Noting()
        with FakeTensorMode(), noted:
            for place, name in enumerate(how.architectures):
                net = self._net(name, text)
                self._train(net)
                if how.stability.steps and place < how.stability.networks:
                    self._ascend(net)
                self._judge(net)
        return list(noted.calls)

    def _net(self, name: str, text: str) -> nn.Module:
        how, formula, affine = self.setting, parse(text), parse(AFFINE)
        options: dict[str, Any] = {"groups": how.groups, "eps": how.eps, "backend": how.backend}
        layers = Layers(
            lambda channels: Layer(formula, channels, **options),
            lambda channels: Layer(affine, channels, **options),
        )
        shape = self.images.classes, self.images.channels
        return build(name, layers, how.scale, *shape, seed=how.evolution.seed)

    def _loss(self, net: nn.Module, batch: int) -> Tensor:
        sides = [self.images.crop or side for side in self.images.train.shape[2:]]
        x = torch.empty(batch, self.images.channels, *sides)
        return F.cross_entropy(net.train()(x), torch.zeros(batch, dtype=torch.long))

    def _train(self, net: nn.Module) -> None:
        self._loss(net, self.setting.recipe.batch).backward()

    def _ascend(self, net: nn.Module) -> None:
        weights = list(net.parameters())
        loss = self._loss(net, self.setting.stability.batch)
        grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        there: list[Any] = [*filter(lambda g: g is not None, grads)]
        torch.autograd.grad(length(there), weights, allow_unused=True)

    @torch.no_grad()
    def _judge(self, net: nn.Module) -> None:
        images = len(self.images.test)
        for batch in {min(AT_ONCE, images - first) for first in range(0, images, AT_ONCE)}:
            net.eval()(torch.empty(batch, *self.images.test.shape[1:]))

    def _compiled(self, call: Noted) -> bool:
        """Compile for a call; what Triton refuses will be refused again where it is launched."""
        from normc.backends.triton import compile_ahead

        recipe, wrt, groups, channel_dim, eps = call.options
        setting = library.setting_of(recipe, groups, channel_dim)
        geometry = Geometry.of(call.shape, setting.groups, channel_dim)
        like = torch.empty_strided(call.shape, call.strides, device="meta")
        r, f = setting.recipe, setting.recipe.formula
        target = target_ahead(f, "triton", "float32", geometry, order_of(like, geometry))
        names = tuple(wrt.split())
        jobs = render(f.definition, f.label, f.text, names, r.mode, target, r.steps).jobs
        try:
            compile_ahead(jobs[call.part == "backward"], self.target, geometry, eps)
        except NormcError:
            return False
        return True


class _Noting(TorchDispatchMode):
    """Notes what normc's operators are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Noted, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "normc":
            tensors, *options = args
            part = func.name().removeprefix("normc::")
            like = _like(part, tensors, *options)
            self.calls[Noted(part, tuple(options), tuple(like.shape), like.stride())] = None
        return func(*args, **(kwargs or {}))


def _like(part: str, tensors: list[Tensor], *options: Any) -> Tensor:
    """The tensor that the others are like."""
    setting, found = library.described(*options)
    if part == "forward":
        return tensors[setting.recipe.full]
    back = Back(setting.recipe, found)
    return dict(zip(back.passed, tensors, strict=True))[back.whole[0]]


def architecture(device: str) -> str:
    """What Triton calls the architecture of a GPU; empty if normc knows it not."""
    from normc.backends.triton import TARGETS

    found: Any = torch.cuda.get_device_properties(torch.device(device))
    name = f"sm_{found.major}{found.minor}"
    if torch.version.hip is not None:
        name = str(found.gcnArchName).partition(":")[0]
    return name if name in TARGETS else ""
