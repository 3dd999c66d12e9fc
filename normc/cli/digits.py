"""Digits: the demo's experiment, a small convolutional net on 1,797 real images of 8 x 8 pixels.

Nothing here knows a layer: the net is given a function from a number of channels to a module, which
it puts after each convolution. Split, batches and weights follow from the seed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normc.errors import NormcError
from normc.formula import Formula
from normc.reference import reference

MakeLayer = Callable[[int], nn.Module]
"""From a number of channels to the layer that follows a convolution."""

GROUPS = 8
BATCH = 64
RATE = 4e-3
TEST = 360  # images, a fifth of all
WARM_UP = 3  # steps before the first one that is timed


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) from 0 to 1 with their classes, split once and for all."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


def load() -> Digits:
    """The digits that come with scikit-learn; `NormcError` where it is missing."""
    try:
        from sklearn import datasets
    except ImportError:
        raise NormcError(
            "the demo's images come with scikit-learn, which is missing: pip install scikit-learn"
        ) from None
    found: Any = datasets.load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    classes = torch.tensor(found.target)[order]
    return Digits(images[TEST:], classes[TEST:], images[:TEST], classes[:TEST])


def net(layer: MakeLayer) -> nn.Sequential:
    """Three convolutions, each followed by the layer; mean over positions; linear."""
    modules: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1)):
        modules += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), layer(after)]
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@contextmanager
def one_thread() -> Generator[None]:
    """Torch and the kernels on one thread: on images this small, more would measure waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Eager(nn.Module):
    """A formula as plain torch operations: what one has without a compiler."""

    def __init__(self, formula: Formula, channels: int) -> None:
        super().__init__()
        self.oracle = reference(formula)
        for p in formula.params:
            start = torch.full((channels,) if p.axes else (), p.init)
            self.register_parameter(p.name, nn.Parameter(start))

    def forward(self, x: Tensor) -> Tensor:
        """The formula's result, with statistics of the batch."""
        tensors: dict[str, Any] = dict(self.named_parameters(recurse=False))
        result = self.oracle(x, groups=GROUPS, **tensors)
        assert isinstance(result, Tensor), "the demo's formulas have one result"
        return result


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of test images that a model in evaluation gets right."""
    model.eval()
    with torch.no_grad():
        right = model(digits.test).argmax(1) == digits.test_classes
    return float(right.double().mean())


@dataclass(frozen=True)
class Training:
    """How long a net is trained, and what is told of it."""

    epochs: int
    seed: int = 0
    batches: int | None = None  # where each epoch ends early
    progress: Callable[[], object] = lambda: None  # called after each epoch


def train(layer: MakeLayer, digits: Digits, how: Training) -> float:
    """Train one net (Adam, cosine schedule) and return its accuracy on the test images."""
    torch.manual_seed(how.seed)
    model = net(layer)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    steps = -(-len(digits.train) // BATCH)
    steps = min(how.batches or steps, steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * steps)
    for _ in range(how.epochs):
        model.train()
        for chosen in torch.randperm(len(digits.train)).split(BATCH)[:steps]:
            step(model, optimizer, digits.train[chosen], digits.train_classes[chosen])
            schedule.step()
        how.progress()
    return accuracy(model, digits)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, classes: Tensor
) -> None:
    """One training step."""
    optimizer.zero_grad()
    F.cross_entropy(model(images), classes).backward()
    optimizer.step()


def milliseconds(
    layers: Mapping[str, MakeLayer], digits: Digits, *, rounds: int
) -> dict[str, float]:
    """The median time of a training step with each layer, all measured in turns in one run."""
    images, classes = digits.train[:BATCH], digits.train_classes[:BATCH]
    models = {name: net(layer) for name, layer in layers.items()}
    optimizers = {
        name: torch.optim.Adam(model.parameters(), RATE) for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(WARM_UP + rounds):
        for name, model in models.items():
            began = time.perf_counter()
            step(model, optimizers[name], images, classes)
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: median(each) for name, each in times.items()}
