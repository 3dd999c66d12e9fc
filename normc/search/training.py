"""Training: a network and its optimizer, taken so many steps at a time; all from one seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normc.ops.layer import Layer
from normc.search.data import Images
from normc.search.setting import Recipe

AT_ONCE = 512
"""Images that are judged at a time."""

LOOK = 20
"""Steps after which the loss is looked at: seldom, as a GPU has to be waited for."""


@dataclass
class Training:
    """A network on its way; ``done`` steps of the recipe are behind it."""

    net: nn.Module
    images: Images
    recipe: Recipe
    seed: int = 0
    device: str = "cpu"
    done: int = 0
    losses: list[Tensor] = field(default_factory=list[Tensor])  # since the last look

    def __post_init__(self) -> None:
        # On a CPU, convolutions of images this small are faster with the channels last in memory.
        self.order = torch.channels_last if self.device == "cpu" else torch.contiguous_format
        placed: Any = self.net.to(self.device)
        placed.to(memory_format=self.order)
        how = self.recipe
        self.optimizer = torch.optim.SGD(
            groups(self.net, how.decay), how.rate, how.momentum, nesterov=how.momentum > 0
        )
        schedules: Any = torch.optim.lr_scheduler
        falling = how.schedule == "cosine"
        self.schedule = (
            schedules.CosineAnnealingLR(self.optimizer, how.steps)
            if falling
            else schedules.ConstantLR(self.optimizer, 1.0)
        )
        self.chance = torch.Generator().manual_seed(self.seed)

    def advance(self, until: int) -> bool:
        """Train up to so many steps in all; False, at once, if a loss is not finite."""
        self.net.train()
        while self.done < min(until, self.recipe.steps):
            images, classes = self.batch(self.recipe.batch)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.net(images), classes)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.done += 1
            self.losses.append(loss.detach())
            if self.done % LOOK == 0 and not self._finite():
                return False
        return self._finite()

    def _finite(self) -> bool:
        found = all(bool(loss.isfinite()) for loss in self.losses)
        self.losses.clear()
        return found

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """The next batch: drawn with replacement from the images to train with."""
        chosen = torch.randint(len(self.images.train), (size,), generator=self.chance)
        images, classes = self.images.batch(chosen, self.chance)
        return self._placed(images), classes.to(self.device)

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(device=self.device, memory_format=self.order)

    def accuracy(self) -> float:
        """The share of images kept for judging that the network, in evaluation, gets right."""
        self.net.eval()
        right = 0
        with torch.no_grad():
            parts = zip(
                self.images.test.split(AT_ONCE),
                self.images.test_classes.split(AT_ONCE),
                strict=True,
            )
            for images, classes in parts:
                found = self.net(self._placed(self.images.prepared(images)))
                # A network whose outputs are not finite knows nothing.
                sound = found.isfinite().all(1)
                right += int(((found.argmax(1) == classes.to(self.device)) & sound).sum())
        return right / len(self.images.test)


def groups(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: those of layers, and biases, do not decay, as in the paper."""
    own = {id(p) for m in net.modules() if isinstance(m, Layer) for p in m.parameters()}
    every = list(net.parameters())
    kept = [p for p in every if id(p) in own or p.dim() < 2]
    rest = [p for p in every if id(p) not in own and p.dim() >= 2]
    return [{"params": rest, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}]
