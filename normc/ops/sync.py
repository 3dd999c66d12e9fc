"""Sync: statistics of a batch that is spread over processes, for any formula.

    for each level of batch statistics    those that depend on no other, then those of these, ...
        kernels     the statistics of the samples that are here
        exchange    all processes' statistics and counts, in one all-reduce of a few numbers
        merge       into those of the whole batch, in float64
    kernels         the results, from x and the merged statistics

Every part can be differentiated, so autograd puts the backward pass together: what arrives at a
merged statistic is summed over processes, weighted, and handed to the kernels. Shards may differ in
size, and be empty. The sum of the processes' losses is what is differentiated, as by
nn.SyncBatchNorm; `DistributedDataParallel` divides by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normc.backends.memory import wide
from normc.program.running import Running


def apart(group: Any) -> bool:
    """Whether there are other processes to exchange statistics with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


Run = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]
"""The outputs of a formula in a mode, from the statistics known so far."""


@dataclass(frozen=True)
class Merged:
    """What `synced` finds out."""

    results: tuple[Tensor, ...]
    statistics: dict[str, Tensor]  # of the whole batch, by the names that programs give them
    counts: dict[str, Tensor]  # how many elements each was taken of, float64


def synced(
    rows: Sequence[Sequence[Running]],
    numbers: Mapping[str, Tensor],
    run: Run,
    count: Callable[[Running], int],
    group: Any,
) -> Merged:
    """The results of a formula whose batch is spread over the processes of a group.

    ``numbers`` are the counts of elements that the formula itself reads, of the whole batch.
    """
    known = dict(numbers)
    counts: dict[str, Tensor] = {}
    for level, some in enumerate(rows):
        outs = iter(run(f"local{level}", known))
        parts = [(r, [next(outs) for _ in range(1 + (r.op in _BESIDE))]) for r in some]
        sizes = [count(r) for r in some]
        gathered = _gathered([t for _, own in parts for t in own], sizes, group)
        totals = gathered.pop()
        for i, (r, own) in enumerate(parts):
            every, n = [gathered.pop(0) for _ in own], totals[:, i]
            known[r.stat] = _merge(r.op, every, n).to(own[0].dtype)
            counts[r.stat] = n.sum()
    return Merged(tuple(run("synced", known)), known, counts)


def summed(numbers: Mapping[str, int], group: Any, like: Tensor) -> dict[str, Tensor]:
    """Counts of all processes, each a scalar of the dtype in which statistics are computed."""
    if not numbers:
        return {}
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=like.device)
    dist.all_reduce(total, group=group)
    return dict(zip(numbers, total.to(wide(like.dtype)), strict=True))


# --- exchange ---------------------------------------------------------------------------------


def _gathered(parts: Sequence[Tensor], sizes: Sequence[int], group: Any) -> list[Tensor]:
    """Every process' tensors, each stacked, and last their sizes, (processes, number of sizes)."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = torch.tensor(sizes, dtype=torch.float64, device=parts[0].device)
    flat = torch.cat([*(t.double().flatten() for t in parts), counts])
    before, after = flat.new_zeros(rank, len(flat)), flat.new_zeros(world - rank - 1, len(flat))
    slots: Any = _Sum.apply(torch.cat([before, flat[None], after]), group)
    pieces = slots.split([*(t.numel() for t in parts), len(sizes)], 1)
    shaped = [p.reshape(world, *t.shape) for p, t in zip(pieces, parts, strict=False)]
    return [*shaped, pieces[-1].detach()]


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its derivative, as each process has a loss of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Sum.apply(grads[0].contiguous(), ctx.group), None


# --- merge ------------------------------------------------------------------------------------

_BESIDE = ("var", "max", "min")
"""Statistics that come with a second number, see `normc.program.running.local`."""


def _merge(op: str, parts: Sequence[Tensor], n: Tensor) -> Tensor:
    """One statistic of all parts from that of each, stacked; an empty part counts for nothing."""
    value = parts[0]
    n = n.reshape(-1, *[1] * (value.dim() - 1))
    if op in ("max", "min"):
        return _extreme(op, value, parts[1], n)
    value = torch.where(n > 0, value, 0.0)
    if op == "sum":
        return value.sum(0)
    share = n / n.sum().clamp(min=1)
    if op == "mean":
        return (share * value).sum(0)
    means = torch.where(n > 0, parts[1], 0.0)
    return (share * (value + (means - (share * means).sum(0)).square())).sum(0)


def _extreme(op: str, value: Tensor, ties: Tensor, n: Tensor) -> Tensor:
    """The largest or smallest of all; its gradient goes to equal elements in equal parts."""
    worst = float("-inf") if op == "max" else float("inf")
    value = torch.where(n > 0, value, worst)
    found = value.detach().amax(0) if op == "max" else value.detach().amin(0)
    hit = (value.detach() == found) & (n > 0)
    held = torch.where(hit, ties.detach(), 0.0)
    weighted: Any = _Weighted.apply(value, held / held.sum(0) * hit.sum(0))
    return weighted.amax(0) if op == "max" else weighted.amin(0)


class _Weighted(torch.autograd.Function):
    """The identity, whose gradient is multiplied by weights."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weights,) = ctx.saved_tensors
        return grads[0] * weights, None
