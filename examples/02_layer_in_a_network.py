"""Layers written as text take the place of nn.BatchNorm2d and its activation, and are trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normc

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d + nn.ReLU": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "the same as text": lambda c: normc.Layer(normc.zoo["bn_relu"], c),
    "EvoNorm-B0": lambda c: normc.Layer(normc.zoo["evonorm_b0"], c),
    "EvoNorm-S0": lambda c: normc.Layer(normc.zoo["evonorm_s0"], c, groups=4),
}


def network(layer: Callable[[int], nn.Module]) -> nn.Module:
    """Two convolutions, each followed by a normalization-activation layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), layer(8), nn.Conv2d(8, 16, 3, stride=2), layer(16)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes in four directions, and which of the four."""
    chance = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (count,), generator=chance)
    phase = 6.28 * torch.rand(count, 1, 1, generator=chance)
    rows, columns = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    angle = (label * torch.pi / 4).view(-1, 1, 1)
    waves = torch.sin(1.5 * (rows * angle.sin() + columns * angle.cos()) + phase)
    noise = torch.randn(count, 10, 10, generator=chance)
    return (waves + 0.8 * noise)[:, None], label


def train(net: nn.Module, steps: int) -> float:
    """The accuracy on new images after a few steps."""
    optimiser = torch.optim.Adam(net.parameters(), lr=0.03)
    for step in range(steps):
        images, labels = stripes(32, seed=step)
        optimiser.zero_grad()
        cross_entropy(net(images), labels).backward()
        optimiser.step()
    net.eval()  # batch statistics are now the running ones
    images, labels = stripes(500, seed=-1)
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def main(steps: int = 40) -> None:
    """Train the same network with every layer; all start from the same convolutions."""
    for name, layer in LAYERS.items():
        torch.manual_seed(0)
        accuracy = train(network(layer), steps)
        print(f"{name:26} {accuracy:6.1%} of new images right after {steps} steps")


if __name__ == "__main__":
    main()
