"""Tile sums: the kernel that adds up the parts of a sum carried over the grid by programs."""

from __future__ import annotations

from normc.backends.contract import Job
from normc.backends.emit import write
from normc.backends.tile_spelling import spelling
from normc.backends.tile_states import finished
from normc.backends.tiling import sum_name
from normc.language.axes import show
from normc.language.expr import var
from normc.language.reductions import count
from normc.program.program import Stat

_SUM = '''\
@triton.jit
def {name}(
    {stat}_parts, {stat}_ptr, PARTS, SIZE, COUNT, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """{what}: what the programs' parts add up to, always in the same order."""
    i = tl.program_id(0)*BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK_PARTS, BLOCK], {real})
    for first in range(0, PARTS, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        inside = (part < PARTS) & (i < SIZE)
        total = total + tl.load({stat}_parts + part*SIZE + i, inside, 0.0)
    total = tl.sum(total, 0, keep_dims=True)
    tl.store({stat}_ptr + i, {value}, i < SIZE)'''


def carried_sum(job: Job, stat: Stat) -> str:
    """The kernel that adds up the parts of a carried sum."""
    real, over = f"tl.{job.wide}", count(stat.over)
    (f,) = stat.state.folds
    total = var("total")
    names = {id(total): "total", id(over): f"tl.cast(COUNT, {real})"}
    value = write(finished(stat, {f.name: total}), spelling(job.dtype), names)
    what = f"{stat.name} = {stat.op}[{show(stat.over)}]"
    return _SUM.format(name=sum_name(job, stat), stat=stat.name, what=what, real=real, value=value)
