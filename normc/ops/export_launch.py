"""The code of an exported file that launches a job's kernels, written out for its formula.

Of the schedules a kernel can have, an exported file brings along two, *resident* and *streaming*;
`_tiles`, which it brings along too, chooses between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from normc.backends.contract import Job
from normc.backends.tiles import source
from normc.backends.tiling import Dim, Form, sum_name, sums_of
from normc.language.axes import FULL, Axis, members
from normc.ops.export_names import arguments, bracketed, letters, local, sizes, unpacked, wrapped
from normc.program.program import Stat
from normc.schedule.plan import Kernel


def launch_function(name: str, doc: str, job: Job, results: Sequence[str]) -> str:
    """A function from the inputs of a job to ``results``, which launches its kernels."""
    program = job.plan.program
    body = [line for kernel in job.plan.kernels for line in _kernel(job, kernel)]
    body = [*_rooms(job, results), *_index(job), *body]
    body = [*sizes(body, "NGKSC"), *body]
    returned = f"return {unpacked([local(name) for name in results])}"
    head = arguments(f"def {name}(", ["call", *(local(i.name) for i in program.inputs)], "):")
    lines = [f"    {line}".rstrip() for line in [*body, returned]]
    return "\n".join([*head, f'    """{doc}"""', *lines])


def kernels(jobs: Sequence[Job]) -> tuple[str, list[str]]:
    """The functions that some jobs' kernels call, and per job its header and launched kernels."""
    shared: dict[str, str] = {}
    texts: list[str] = []
    for job in jobs:
        header, *blocks = source(job).rstrip().split("\n\n\n")
        named = {_defined(block): block.strip() for block in blocks}
        wanted = [named[name] for name in _launched(job)]
        shared |= _called(named, wanted)
        comment = [line for line in header.splitlines() if line.startswith("#")]
        texts.append("\n\n\n".join(["\n".join(comment), *wanted]))
    return "\n\n\n".join(shared.values()), texts


def _defined(block: str) -> str:
    """The name of the function that a block of a source defines."""
    found = re.search(r"^def (\w+)\(", block, re.MULTILINE)
    return found[1] if found else ""


def _called(named: dict[str, str], texts: Sequence[str]) -> dict[str, str]:
    """The functions that texts call, and those that these call, in the order of the source."""
    used: set[str] = set()
    waiting = list(texts)
    while waiting:
        text = waiting.pop()
        more = {n for n in named if n and n not in used and re.search(rf"\b{n}\b", text)}
        more -= {_defined(text)}
        used |= more
        waiting += [named[name] for name in more]
    printed = {_defined(text) for text in texts}
    return {name: text for name, text in named.items() if name in used - printed}


def forms(job: Job, kernel: Kernel) -> list[Form]:
    """The forms of a kernel that an exported file launches, the resident one first."""
    whole = Form(job, kernel, True)
    return [whole, Form(job, kernel, False)] if whole.free else [whole]


def _launched(job: Job) -> list[str]:
    names = [form.name for kernel in job.plan.kernels for form in forms(job, kernel)]
    sums = [sum_name(job, stats) for k in job.plan.kernels for stats in sums_of(k)]
    return [*names, *sums]


# --- the body of a launch function ---------------------------------------------------------------
def _rooms(job: Job, results: Sequence[str]) -> Iterator[str]:
    """Memory for what the kernels write: outputs, and statistics that go through memory."""
    program = job.plan.program
    every = [form for kernel in job.plan.kernels for form in forms(job, kernel)]
    passed = {v.name for form in every for v in form.pointers}.union(results)
    for out in program.outputs:
        room = "call.full()" if out.axes == FULL else f'call.room("{letters(out.axes)}")'
        yield f"{local(out.name)} = {room}"
    for stat in program.stats:
        if stat.name in passed:
            yield f'{local(stat.name)} = call.room("{letters(stat.kept)}")'


def _index(job: Job) -> list[str]:
    every = [v for kernel in job.plan.kernels for v in forms(job, kernel)[0].pointers]
    full = dict.fromkeys(local(v.name) for v in every if v.axes == FULL)
    return [f"index = call.index({', '.join(full)})"]


def _kernel(job: Job, kernel: Kernel) -> Iterator[str]:
    """The launch of one kernel, and of those that add up the sums it carries."""
    every = forms(job, kernel)
    yield ""
    yield f"# {_describe(kernel)}"
    yield from _choice(every[0])
    for stat in kernel.carries:
        size = "*".join(["how.programs", *(str(a.name) for a in members(stat.kept))])
        yield f"{stat.name}_parts = call.parts({size})"
    yield from _either(every)
    for stats in sums_of(kernel):
        yield from _sum(job, stats)


def _either(every: Sequence[Form]) -> list[str]:
    """The launch of the form that was chosen; both may take the same tensors, or not."""
    if len(every) == 1:
        return _launch(every[0], every[0].name)
    whole, loops = every
    if whole.pointers == loops.pointers:
        chosen = [
            "kernel = (",
            f"    {whole.name}",
            "    if how.resident",
            f"    else {loops.name}",
        ]
        return [*chosen, ")", *_launch(whole, "kernel")]
    first, second = (_launch(form, form.name, "    ") for form in every)
    return ["if how.resident:", *first, "else:", *second]


def _describe(kernel: Kernel) -> str:
    stored = [v.name for sweep in kernel.sweeps for v in sweep.stores]
    return f"{kernel.name}: {', '.join(stored)}"


def _choice(form: Form) -> list[str]:
    """The choice of a kernel's form and of the extents of its tiles."""
    sweeps = [_letters(form.looped(sweep)) for sweep in form.kernel.sweeps]
    full = sum(v.axes == FULL for v in form.kernel.reads)
    folds = max(len(sweep.folds) for sweep in form.kernel.sweeps)
    items = [
        f'"{_letters(form.dims)}"',
        bracketed([d.size for d in form.dims]),
        f'"{_letters(form.grid)}"',
        bracketed([f'"{walked}"' for walked in sweeps]),
        f"tensors={full}",
        f"values={full + folds}",
        "width=call.dtype.itemsize",
        *(["most=PARTS"] if form.kernel.carries else []),
    ]
    return arguments("how = _tiles(", items, ")")


def _letters(dims: Sequence[Dim]) -> str:
    return "".join(d.letter for d in dims)


def _launch(form: Form, called: str, indent: str = "") -> list[str]:
    """One launch: tensors, parts of sums, strides, sizes, and what Triton compiles into it."""
    full = [local(v.name) for v in form.pointers if v.axes == FULL]
    tensors = [local(v.name) for v in form.pointers]
    tensors += [f"{stat.name}_parts" for stat in form.kernel.carries]
    steps = [f"*_steps({', '.join(full)})"] if full else []
    rows = [tensors, [*steps, *(d.size for d in form.sizes)], _CONSTANTS]
    filled = [f"{indent}    {line}" for row in rows for line in wrapped(row, len(indent) + 4)]
    return [f"{indent}{called}[(how.programs,)](", *filled, f"{indent})"]


_CONSTANTS = ["EPS=call.eps", "INDEX=index", "**how.options"]


def _sum(job: Job, stats: Sequence[Stat]) -> list[str]:
    """The launch that adds up the programs' parts of sums."""
    size, count = _product(stats[0].kept), _product(stats[0].over)
    tensors = [*(f"{stat.name}_parts" for stat in stats), *(local(stat.name) for stat in stats)]
    items = [*tensors, "how.programs", size, count, "**SUM"]
    return arguments(f'{sum_name(job, stats)}[(triton.cdiv({size}, SUM["BLOCK"]),)](', items, ")")


def _product(axes: Axis) -> str:
    return "*".join(str(a.name) for a in members(axes)) or "1"
