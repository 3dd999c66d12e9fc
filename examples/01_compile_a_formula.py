"""A formula is compiled, called, differentiated, and compared with plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import normc

FORMULA = "x*sigmoid(v*x)/group_std(x)*gamma + beta"  # EvoNorm-S0, arXiv 2004.02967


def by_hand(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, groups: int) -> Tensor:
    """The same layer in plain torch."""
    v, gamma, beta = (t.view(1, -1, 1, 1) for t in (v, gamma, beta))
    parts = x.unflatten(1, (groups, -1))
    std = (parts.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt()
    return (parts * torch.sigmoid(v * x).view_as(parts) / std).view_as(x) * gamma + beta


def main() -> None:
    """Print how far the compiled layer is from plain torch, value and gradients."""
    torch.manual_seed(0)
    op = normc.compile(FORMULA)
    x = torch.randn(4, 16, 12, 12, requires_grad=True)
    v, gamma, beta = (torch.randn(16, requires_grad=True) for _ in range(3))

    y = op(x, groups=4, v=v, gamma=gamma, beta=beta)
    want = by_hand(x, v, gamma, beta, groups=4)
    print(
        f"{op!r}\n{tuple(y.shape)}, largest difference {float((y - want).detach().abs().max()):.1e}"
    )

    names = {"x": x, "v": v, "gamma": gamma, "beta": beta}
    cotangent = torch.randn_like(y)
    ours = torch.autograd.grad(y, names.values(), cotangent)
    theirs = torch.autograd.grad(want, names.values(), cotangent)
    for name, a, b in zip(names, ours, theirs, strict=True):
        print(f"d_{name:5} largest difference {float((a - b).abs().max() / b.abs().max()):.1e}")


if __name__ == "__main__":
    main()
