"""Tile sums: the kernel that adds up what programs have carried over the grid."""

from __future__ import annotations

from collections.abc import Sequence

from normc.backends.contract import Job
from normc.backends.emit import write
from normc.backends.tile_spelling import spelling
from normc.backends.tile_states import finished
from normc.backends.tiling import sum_name
from normc.language.axes import show
from normc.language.expr import var
from normc.language.reductions import count
from normc.program.program import Stat


def carried_sums(job: Job, stats: Sequence[Stat]) -> str:
    """The kernel that adds up the parts of carried sums over the same axes, always in one order."""
    names, real = [s.name for s in stats], f"tl.{job.wide}"
    tensors = [*(f"{name}_parts" for name in names), *(f"{name}_ptr" for name in names)]
    what = ", ".join(f"{s.name} = {s.op}[{show(s.over)}]" for s in stats)
    lines = [
        f'"""{what}: what the programs\' parts add up to, always in the same order."""',
        "i = tl.program_id(0)*BLOCK + tl.arange(0, BLOCK)[None, :]",
        *(f"{name} = tl.zeros([BLOCK_PARTS, BLOCK], {real})" for name in names),
        "for first in range(0, PARTS, BLOCK_PARTS):",
        "    part = first + tl.arange(0, BLOCK_PARTS)[:, None]",
        "    inside = (part < PARTS) & (i < SIZE)",
        *(f"    {n} = {n} + tl.load({n}_parts + part*SIZE + i, inside, 0.0)" for n in names),
    ]
    for stat in stats:
        lines.append(f"{stat.name} = tl.sum({stat.name}, 0, keep_dims=True)")
        lines.append(f"tl.store({stat.name}_ptr + i, {_value(job, stat)}, i < SIZE)")
    head = [
        "@triton.jit",
        f"def {sum_name(job, stats)}(",
        f"    {', '.join(tensors)},",
        "    PARTS, SIZE, COUNT, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr,",
        "):",
    ]
    return "\n".join([*head, *(f"    {line}" for line in lines)])


def _value(job: Job, stat: Stat) -> str:
    over, total = count(stat.over), var(stat.name)
    (f,) = stat.state.folds
    names = {id(total): stat.name, id(over): f"tl.cast(COUNT, tl.{job.wide})"}
    return write(finished(stat, {f.name: total}), spelling(job.dtype), names)
