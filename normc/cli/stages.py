"""Stages: the text of every stage of one formula, as `normc show` prints it; nothing is run.

    parse . algebra . program . backward . plan . c . triton . ptx

Each stage is a function from a `Subject` to stable text; some have a brief form for the overview.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from normc.backends import contract
from normc.backends.contract import Job
from normc.errors import BackendError
from normc.formula import Formula
from normc.language import axes
from normc.language.axes import Axis
from normc.language.expr import Call, Const, Expr, Reduce, Var, children, postorder
from normc.language.geometry import declared
from normc.language.show import show as show_definition
from normc.language.show import show_expr
from normc.ops.derivative import DECLARATIONS, PATIENCE, latex_derivatives, show_derivatives
from normc.ops.explain import all_jobs, show_moved
from normc.pipeline import Target
from normc.program.canonical import canonical
from normc.program.latex import latex_definition
from normc.schedule.plan import Kernel
from normc.schedule.schedule import CHANNELS_FIRST

ARCH = "sm_90"
"""The GPU that ``ptx`` is for: any machine can compile for it."""


@dataclass(frozen=True)
class Subject:
    """A formula, and what its kernels are for."""

    formula: Formula
    dtype: str = "float32"
    order: tuple[Axis, ...] = CHANNELS_FIRST
    backend: str = "c"  # whose plans are shown

    def jobs(self, backend: str = "") -> list[Job]:
        """The forward and backward jobs, planned for a backend that has not seen them yet."""
        return all_jobs(self.formula, Target(backend or self.backend, self.dtype, self.order))


Stage = Callable[[Subject], str]


# --- from text to program ------------------------------------------------------------------------


def parse_brief(subject: Subject) -> str:
    """The formula in normc's own spelling, and its tensors."""
    definition = subject.formula.definition
    inputs = [f"input {declared(i)}" for i in definition.inputs]
    params = [f"param {declared(p)} = {p.init:g}" for p in definition.params]
    return "\n".join([result_text(subject.formula), "", *inputs, *params]).rstrip()


def result_text(formula: Formula) -> str:
    """The formula in normc's own spelling, without its declarations."""
    lines = formula.shown.splitlines()
    return "\n".join(line for line in lines if not line.startswith(DECLARATIONS))


def parse(subject: Subject) -> str:
    """The formula, its tensors, and every node of its expressions with the axes it varies over."""
    order = postorder(subject.formula.definition.results)
    names = {node: f"n{i}" for i, node in enumerate(order)}
    rows = [(f"{names[node]} = {_node(node, names)}", axes.show(node.axes)) for node in order]
    width = max(len(text) for text, _ in rows)
    nodes = [f"{text:{width}}  {over}".rstrip() for text, over in rows]
    return "\n".join([parse_brief(subject), "", *nodes])


def _node(node: Expr, names: dict[Expr, str]) -> str:
    below = [names[child] for child in children(node)]
    match node:
        case Const() | Var():
            return show_expr(node)
        case Call(fn):
            return " ".join([fn, *below])
        case Reduce(op, over):
            return f"{op}[{axes.show(over)}] {below[0]}"


def algebra_brief(subject: Subject) -> str:
    """The canonical formula and its gradients."""
    definition = subject.formula.definition
    form = show_definition(canonical(definition, PATIENCE))
    return f"{form}\n\n{show_derivatives(definition)}".rstrip()


def algebra(subject: Subject) -> str:
    """The canonical formula and its gradients, as text and in LaTeX."""
    definition = subject.formula.definition
    formulas = f"{latex_definition(definition)}\n\n{latex_derivatives(definition)}"
    return f"{algebra_brief(subject)}\n\n{formulas}".rstrip()


def program(subject: Subject) -> str:
    """The forward program."""
    return subject.jobs()[0].plan.program.show()


def backward(subject: Subject) -> str:
    """The backward program."""
    return "\n".join(job.plan.program.show() for job in subject.jobs()[1:]) or NOTHING


NOTHING = "nothing: no result depends on any tensor"


# --- from plan to machine code -------------------------------------------------------------------


def plan(subject: Subject) -> str:
    """Forward and backward plan, with what they move."""
    return "\n\n".join(
        f"{_cost(job, subject.backend)}\n{job.plan.show()}" for job in subject.jobs()
    )


def plan_brief(subject: Subject) -> str:
    """What the plans move, and what each sweep reads and stores."""
    lines: list[str] = []
    for job in subject.jobs():
        lines += [
            _cost(job, subject.backend),
            *(line for k in job.plan.kernels for line in _kernel(k)),
        ]
    return "\n".join(lines)


def _cost(job: Job, backend: str) -> str:
    short = {"forward": "fwd", "backward": "bwd"}
    return f"{short.get(job.part, job.part)}: {show_moved(job, backend)}"


def _kernel(kernel: Kernel) -> Iterator[str]:
    for i, sweep in enumerate(kernel.sweeps):
        head = f"{kernel.name} [{axes.show(kernel.grid)}]" if i == 0 else ""
        reads = " ".join(v.name for v in sweep.reads) or "nothing"
        yield f"  {head:12} {reads} -> {' '.join(v.name for v in sweep.stores)}"


def source(subject: Subject, backend: str) -> str:
    """The kernels as a backend prints them."""
    found = contract.find(backend)
    refused = found.why_not(subject.dtype, "cpu") if backend == "c" else ""
    if refused and not found.why_not("float32", "cpu"):
        raise BackendError(refused)  # it is the dtype: without a compiler C can still be printed
    jobs = subject.jobs(backend)
    return found.unit(jobs, [found.render(job) for job in jobs]).rstrip("\n")


def source_brief(subject: Subject, backend: str) -> str:
    """How long the kernels are."""
    found = contract.find(backend)
    made = [(job, found.render(job)) for job in subject.jobs(backend)]
    return "\n".join(f"{j.part}: {s.entry}, {len(s.text.splitlines())} lines" for j, s in made)


def ptx(subject: Subject) -> str:
    """The kernels of the Triton backend compiled for `ARCH`, with what each asks of the GPU."""
    from normc.backends.triton import compile_ahead

    texts: list[str] = []
    for job in subject.jobs("triton"):
        for name, made in compile_ahead(job, ARCH).items():
            asks = f"{made.registers} registers, {made.spills} bytes spilled, {made.shared} shared"
            texts.append(f"// {job.part} {name}: {asks}\n{_without_places(made.text)}")
    return "\n\n".join(texts)


def _without_places(text: str) -> str:
    """PTX without what only a debugger reads: it names files of this machine."""
    code, _, _ = text.partition("\t.section\t.debug")
    lines = [line for line in code.splitlines() if not line.strip().startswith((".file", ".loc"))]
    return "\n".join(line.rstrip() for line in lines).strip()
