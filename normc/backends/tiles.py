"""Tiles: a Job becomes the text of Triton kernels, every kernel of its plan under every schedule.

    source ::= header, {function}, {kernel under a schedule}, {finish}, {carried sum}

`tile_kernel` prints one kernel under one schedule; which of them is launched, and with tiles of
what size, is decided when tensors come (`tile_choice`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from normc.backends.contract import Job
from normc.backends.tile_functions import functions
from normc.backends.tile_kernel import Printer
from normc.backends.tile_shares import MEET, finish_kernel
from normc.backends.tile_sums import carried_sums
from normc.backends.tiling import Form, sums_of
from normc.schedule.fission import fission
from normc.schedule.plan import Kernel


def source(job: Job) -> str:
    """The text of a job, for tensors of any size: a Python file that imports nothing but triton."""
    return printed(job, [f for k in job.plan.kernels for fs in forms(job, k).values() for f in fs])


def printed(job: Job, wanted: Sequence[Form]) -> str:
    """The text of some forms of a job, and of what they need beside them."""
    kernels = [Printer(form).kernel() for form in wanted]
    finishes = [
        finish_kernel(form, i)
        for form in wanted
        if form.schedule == "split"
        for i, sweep in enumerate(form.kernel.sweeps)
        if sweep.folds
    ]
    carried = dict.fromkeys(stats for form in wanted for stats in sums_of(form.kernel))
    sums = [carried_sums(job, stats) for stats in carried]
    body = "\n\n\n".join([*kernels, *finishes, *sums])
    return "\n\n\n".join([header(job), *_used(job, body), body]) + "\n"


def forms(job: Job, kernel: Kernel) -> dict[str, tuple[Form, ...]]:
    """A kernel under every schedule that it has; split may be several kernels, in order."""
    whole, loops = Form(job, kernel, True), Form(job, kernel, False)
    if not whole.free:
        return {"resident": (whole,)}
    return {
        "streaming": (loops,),
        "resident": (whole,),
        "cluster": (replace(whole, shared=True),),
        "split": _split(job, kernel),
    }


def _split(job: Job, kernel: Kernel) -> tuple[Form, ...]:
    """One form per phase; what reads small tensors only is not worth sharing."""
    plan, parts = fission(job.plan, kernel)
    cut = replace(job, plan=plan)
    shared = [Form(cut, part, False, True) for part in parts]
    return tuple(f if f.large else replace(f, shared=False) for f in shared)


def _used(job: Job, body: str) -> Iterable[str]:
    """The functions that the kernels call."""
    known = {name: text.strip() for name, text in functions(job.dtype).items()} | {"meet": MEET}
    return [text for name, text in known.items() if re.search(rf"\b{name}\b", body)]


def header(job: Job) -> str:
    """What stands above the kernels: formula, cost, plan, names, imports."""
    return "\n".join(
        [
            *[f"# {line}".rstrip() for line in job.header],
            "#",
            "# n, g, k, s: sample, group, channel in its group, position; c = g*K + k.",
            f"# Computed in {job.wide}; loads cast up, stores cast down.",
            "",
            "import triton",
            "import triton.language as tl",
        ]
    )


__all__ = ["Form", "Printer", "carried_sums", "forms", "header", "printed", "source"]
