"""What a call costs beside the kernels: ``python -m benchmarks.calls``, from the root.

    overhead    the op and a layer against nn.GroupNorm on a tensor so small that kernels hardly
                count, without gradients and with backward
    penalty     a training step with a gradient penalty, which differentiates backward again,
                against the same formula as plain torch operations

All take turns in one process; ratios are medians over the rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import normc
from normc.analysis.machine import environment
from normc.analysis.timing import Samples, Thunk, interleave

DATA = Path(__file__).parent.parent / "docs" / "benchmarks" / "calls.json"
SMALL, GROUPS = (2, 32, 8, 8), 8
STEP = (16, 64, 28, 28)
Call = Callable[..., Tensor]


def overhead() -> Mapping[str, Mapping[str, Thunk]]:
    """GroupNorm by torch, by an op and by a layer: forward alone, and with backward."""
    x, cotangent = torch.randn(SMALL), torch.randn(SMALL)
    theirs = nn.GroupNorm(GROUPS, SMALL[1])
    formula = normc.zoo["group_norm"]
    op, layer = normc.compile(formula), normc.Layer(formula, SMALL[1], groups=GROUPS)
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    calls: dict[str, tuple[Call, list[Tensor]]] = {
        "torch": (theirs, list(theirs.parameters())),
        "op": (lambda t: op(t, groups=GROUPS, **params), list(params.values())),
        "layer": (layer, list(layer.parameters())),
    }
    leaf = x.clone().requires_grad_()

    def both(call: Call, own: list[Tensor]) -> Thunk:
        return lambda: torch.autograd.grad(call(leaf), [leaf, *own], cotangent)

    return {
        "no_grad": {name: _alone(call, x) for name, (call, _) in calls.items()},
        "backward": {name: both(call, own) for name, (call, own) in calls.items()},
    }


def _alone(call: Call, x: Tensor) -> Thunk:
    return lambda: call(x)


def penalty(dtype: torch.dtype) -> Mapping[str, Callable[[], tuple[Tensor, ...]]]:
    """Steps of convolution and EvoNorm-S0: the norm of the input's gradient is driven to 1."""
    torch.manual_seed(0)
    formula, channels = normc.zoo["evonorm_s0"], STEP[1]
    conv = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
    x = torch.randn(STEP, dtype=dtype)
    names = [p.name for p in formula.params]
    params = {n: torch.rand(channels, dtype=dtype).requires_grad_() for n in names}

    def step(call: Call) -> tuple[Tensor, ...]:
        image = x.clone().requires_grad_()
        loss = call(conv(image), groups=GROUPS, **params).square().mean()
        (grad,) = torch.autograd.grad(loss, image, create_graph=True)
        total = loss + 10 * (grad.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(total, [*conv.parameters(), *params.values()])

    compiled, eager = normc.compile(formula), normc.reference(formula)
    return {"normc": lambda: step(compiled), "eager": lambda: step(eager)}


def difference(steps: Mapping[str, Callable[[], tuple[Tensor, ...]]]) -> float:
    """The largest difference between two steps' gradients, relative to the largest gradient."""
    found, want = (step() for step in steps.values())
    pairs = zip(found, want, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _row(samples: Samples, to: str) -> dict[str, Any]:
    rows = {name: {"us": round(1e6 * samples.median(name), 2)} for name in samples.seconds}
    for name, row in rows.items():
        row["ratio"] = round(samples.ratio(name, to), 3)
    return rows


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 101,
    steps: Annotated[int, typer.Option(min=3, help="Rounds of the gradient penalty.")] = 15,
    output: Annotated[Path, typer.Option(help="The JSON.")] = DATA,
) -> None:
    """Measure, print, and write the numbers."""
    exact = difference(penalty(torch.float64))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    every = overhead()
    with torch.no_grad():
        alone = interleave(every["no_grad"], rounds)
    both = interleave(every["backward"], rounds)
    torch.set_num_threads(threads)
    record = {
        "environment": environment("system"), "dtype": "float32",
        "overhead": {"shape": SMALL, "groups": GROUPS, "threads": 1, "formula": "group_norm",
                     "no_grad": _row(alone, "torch"), "backward": _row(both, "torch")},
        "penalty": {"shape": STEP, "threads": threads, "formula": "evonorm_s0",
                    "difference in float64": exact,
                    "step": _row(interleave(penalty(torch.float32), steps), "normc")},
    }  # fmt: skip
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
