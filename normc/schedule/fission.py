"""Fission: one kernel becomes several, so that programs which share an instance can meet.

What one program knows of a slice it keeps from sweep to sweep. Where several programs share the
slice, none knows a statistic of it before all are done, and what is certain of that is the end of a
launch. So a kernel is cut where its phases meet; phases that move small tensors only stay together.
"""

from __future__ import annotations

from dataclasses import replace

from normc.language.axes import FULL
from normc.schedule.plan import Kernel, Plan, Sweep


def fission(plan: Plan, kernel: Kernel) -> tuple[Plan, tuple[Kernel, ...]]:
    """The plan with ``kernel`` cut into one kernel per phase, and these kernels."""
    groups: list[list[Sweep]] = []
    for phase in kernel.phases:
        if groups and not any(map(moves_whole, (*groups[-1], *phase))):
            groups[-1] += phase
        else:
            groups.append(list(phase))
    parts = tuple(
        Kernel(f"{kernel.name}{chr(ord('a') + i)}", kernel.grid, tuple(sweeps))
        for i, sweeps in enumerate(groups)
    )
    if len(parts) == 1:
        return plan, (kernel,)
    cut = [part for k in plan.kernels for part in (parts if k is kernel else (k,))]
    return replace(plan, kernels=tuple(cut)), parts


def cut(plan: Plan) -> Plan:
    """The plan with every kernel cut."""
    for kernel in plan.kernels:
        plan, _ = fission(plan, kernel)
    return plan


def moves_whole(sweep: Sweep) -> bool:
    """Whether a sweep reads or writes any tensor of x's size."""
    return any(v.axes == FULL for v in (*sweep.reads, *sweep.stores))
