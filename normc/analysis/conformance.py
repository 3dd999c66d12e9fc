"""Conformance: an op under all that PyTorch does with a function; long, for it is 22 checks.

The table at the end names them. A check calls the op in one way and compares it with the oracle in
float64, which is called eagerly, one case after the other, and differentiated by torch's plain
reverse mode alone. It raises AssertionError where they differ, and lets through the error in which
a call ends. Everything is differentiated with respect to x and to all parameters and inputs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from normc.analysis.agreement import LAYOUTS, TOLERANCE, Case, draw
from normc.formula import Formula, formula_of
from normc.language.axes import CHANNEL, FULL, Axis
from normc.ops.op import compile
from normc.ops.recipe import Recipe
from normc.ops.setting import Setting
from normc.reference import reference

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]
Wrap = Callable[..., Function]
"""What a function goes through before it is called: nothing, or a compiler."""

SHAPE = (2, 4, 3, 2)
OTHERS = ((3, 4, 5, 4), (5, 4, 2, 7))
"""Shapes for which what was compiled for ``SHAPE`` must serve."""

GROUPS, EPS = 2, 1e-5


class Subject:
    """What is checked, and what it is compared with, as functions of the same tensors.

    ``args`` and ``tangents`` are float64 tensors in the order of ``names``: x of shape ``SHAPE``,
    then inputs and parameters as the formula declares them, drawn from fixed seeds. Raises
    `FormulaError` for a text that is no formula, `BackendError` for an unknown backend.
    """

    def __init__(self, formula: Formula | str, backend: str = "c") -> None:
        self.formula = formula_of(formula)
        self.backend = backend
        self.names = tuple(self._drawn(0, SHAPE))
        self.args, self.tangents = self.draw(), self.draw(seed=1)
        self.every = tuple(range(len(self.names)))
        self._op: Function = compile(self.formula, backend)
        self._oracle: Function = reference(self.formula)

    def _drawn(self, seed: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
        case = Case(LAYOUTS[0], shape, GROUPS, "float64", seed)
        return draw(self.formula.definition, case)[0]

    def draw(self, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensors:
        """Tensors for an x of that shape."""
        return tuple(self._drawn(seed, shape).values())

    def op(self, *args: Tensor) -> Tensors:
        """The results of the compiled formula."""
        return self._results(self._op, args)

    def oracle(self, *args: Tensor) -> Tensors:
        """The results of the oracle."""
        return self._results(self._oracle, args)

    def _results(self, call: Function, args: Tensors) -> Tensors:
        found = call(**dict(zip(self.names, args, strict=True)), groups=GROUPS)
        return (found,) if isinstance(found, Tensor) else found

    @property
    def layouts(self) -> tuple[Tensors, Tensors]:
        """The tensors as they are, and with channels last in memory."""
        last = [
            t.contiguous(memory_format=torch.channels_last) if t.dim() == len(SHAPE) else t
            for t in self.args
        ]
        return self.args, tuple(last)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of each tensor."""
        definition = self.formula.definition
        axes = {row.name: row.axes for row in (*definition.inputs, *definition.params)}
        return tuple(axes.get(name, FULL) for name in self.names)

    @property
    def samples(self) -> list[int | None]:
        """The dimension of samples in each tensor, None where it has none."""
        return [0 if axes & Axis.N else None for axes in self.axes]

    @cached_property
    def gradient(self) -> Tensors:
        """The oracle's gradients of `loss`."""
        return gradient(self.oracle, self.args)

    @cached_property
    def jacobian(self) -> tuple[Tensors, ...]:
        """The oracle's derivatives, of each result by each tensor."""
        return cast(Any, functional.jacobian(self.oracle, self.args))

    @cached_property
    def slopes(self) -> Tensors:
        """The oracle's derivative of each result along the tangents."""
        rows = [zip(row, self.tangents, strict=True) for row in self.jacobian]
        parts = [[torch.tensordot(d, t, t.dim()) for d, t in row] for row in rows]
        return tuple(torch.stack(some).sum(0) for some in parts)


def loss(call: Function, *args: Tensor) -> Tensor:
    """A number on which all results bear, none as another one does."""
    return torch.stack([((i + 1) * y.sin()).sum() for i, y in enumerate(call(*args))]).sum()


def gradient(call: Function, args: Sequence[Tensor], score: Function = loss) -> Tensors:
    """The gradients of ``score`` by all tensors, as ``backward()`` leaves them."""
    leaves = _wanting(args)
    score(call, *leaves).backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def _wanting(args: Sequence[Tensor]) -> Tensors:
    return tuple(t.detach().clone().requires_grad_() for t in args)


def _close(found: Any, want: Any) -> None:
    """Equal but for the rounding of float64."""
    torch.testing.assert_close(found, want, rtol=TOLERANCE["float64"], atol=TOLERANCE["float64"])


# --- as it is, or compiled: `wrap` says -----------------------------------------------------------


def _forward(subject: Subject, wrap: Wrap) -> None:
    call = wrap(subject.op)
    for args in subject.layouts:
        _close(call(*args), subject.oracle(*args))


def _backward(subject: Subject, wrap: Wrap) -> None:
    call = wrap(subject.op)
    for args in subject.layouts:
        _close(call(*_wanting(args)), subject.oracle(*args))
        _close(gradient(call, args), subject.gradient)


def _grad(subject: Subject, wrap: Wrap) -> None:
    def call(*args: Tensor) -> Any:
        return torch.func.grad(partial(loss, subject.op), argnums=subject.every)(*args)

    _close(wrap(call)(*subject.args), subject.gradient)


def _jvp(subject: Subject, wrap: Wrap) -> None:
    def call(args: Tensors, tangents: Tensors) -> Any:
        return torch.func.jvp(subject.op, args, tangents)

    want = (subject.oracle(*subject.args), subject.slopes)
    _close(wrap(call)(subject.args, subject.tangents), want)


def _vmap(subject: Subject, wrap: Wrap) -> None:
    """The batch in each tensor's last dimension; as it is, also in x alone, and in all but x."""
    last, more = [t.dim() for t in subject.args], len(subject.args) - 1
    _batched(subject, wrap, last)
    if wrap is _as_it_is:
        _batched(subject, wrap, [0, *[None] * more])
        _batched(subject, wrap, [None, *[0] * more] if more else last)


def _batched(subject: Subject, wrap: Wrap, dims: list[int | None] | list[int]) -> None:
    """Three calls as one, with the batch of a tensor where ``dims`` says, the same where None."""
    some = [subject.draw(seed) for seed in (2, 3, 4)]
    calls = [[some[0][k] if d is None else one[k] for k, d in enumerate(dims)] for one in some]
    joined = [
        ts[0] if d is None else torch.stack(ts, d) for *ts, d in zip(*calls, dims, strict=True)
    ]

    def call(*args: Tensor) -> Any:
        return torch.func.vmap(subject.op, in_dims=tuple(dims))(*args)

    each = [subject.oracle(*one) for one in calls]
    _close(wrap(call)(*joined), tuple(torch.stack(ys) for ys in zip(*each, strict=True)))


def _per_sample(subject: Subject, wrap: Wrap) -> None:
    """The gradients of each sample, as differential privacy wants them."""
    dims, args = subject.samples, subject.args

    def score(call: Function, *one: Tensor) -> Tensor:
        return loss(call, *[t if d is None else t[None] for t, d in zip(one, dims, strict=True)])

    def call(*args: Tensor) -> Any:
        grad = torch.func.grad(partial(score, subject.op), argnums=subject.every)
        return torch.func.vmap(grad, in_dims=tuple(dims))(*args)

    both = list(zip(args, dims, strict=True))
    ones = [[t if d is None else t[i] for t, d in both] for i in range(SHAPE[0])]
    want = zip(*[gradient(subject.oracle, one, score) for one in ones], strict=True)
    _close(wrap(call)(*args), tuple(torch.stack(grads) for grads in want))


def _dynamic(subject: Subject, wrap: Wrap) -> None:
    """Samples and positions of any number: one compilation for three shapes."""
    from torch._dynamo import mark_dynamic
    from torch._dynamo.utils import counters

    call, made = wrap(subject.op, dynamic=True), list[int]()
    for shape in (SHAPE, *OTHERS):
        args = _wanting(subject.draw(shape=shape))
        for tensor, axes in zip(args, subject.axes, strict=True):
            channel = bool(axes & Axis.N) if axes & CHANNEL else None
            mark_dynamic(tensor, [d for d in range(tensor.dim()) if d != channel])
        found = call(*args)
        _close(found, subject.oracle(*args))
        grads = torch.autograd.grad(loss(lambda *_, found=found: found, *args), args)
        _close(grads, gradient(subject.oracle, args))
        made.append(counters["stats"]["unique_graphs"])
    assert len(set(made)) == 1, f"compiled again for another shape: {made} graphs so far"


# --- as it is only --------------------------------------------------------------------------------


def _jacobian(transform: Function, subject: Subject, _: Wrap) -> None:
    _close(transform(subject.op, argnums=subject.every)(*subject.args), subject.jacobian)


def _hessian(subject: Subject, _: Wrap) -> None:
    every, call = subject.every, partial(loss, subject.op)
    found = torch.func.jacrev(torch.func.jacrev(call, argnums=every), argnums=every)
    _close(found(*subject.args), functional.hessian(partial(loss, subject.oracle), subject.args))


class _Program(nn.Module):
    """What is exported."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, *args: Tensor) -> Tensors:
        return self.subject.op(*args)


def _export(subject: Subject, _: Wrap) -> None:
    """Saved and loaded, it computes the same, and has the same gradients."""
    for strict in (True, False):
        program = torch.export.export(_Program(subject), _wanting(subject.args), strict=strict)
        file = BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        _close(loaded(*subject.args), subject.oracle(*subject.args))
        _close(gradient(loaded, subject.args), subject.gradient)


def _checkpoint(subject: Subject, _: Wrap) -> None:
    """Computed again in backward; a policy that saves the operator runs it once."""
    for reentrant in (False, True):
        call = partial(checkpoint, subject.op, use_reentrant=reentrant)
        _close(gradient(call, subject.args), subject.gradient)
    saved = partial(create_selective_checkpoint_contexts, [torch.ops.normc.forward.default])
    call = partial(checkpoint, subject.op, use_reentrant=False, context_fn=saved)
    _close(gradient(call, subject.args), subject.gradient)
    with _Watch() as watch:
        _close(gradient(call, subject.args), subject.gradient)
    names = [str(func) for func, _ in watch.calls]
    assert names == ["normc.forward.default", "normc.backward.default"], f"it ran {names}"


def _gradcheck(subject: Subject, _: Wrap) -> None:
    how = {"check_batched_grad": True, "check_batched_forward_grad": True}
    torch.autograd.gradcheck(subject.op, _wanting(subject.args), check_forward_ad=True, **how)


def _gradgradcheck(subject: Subject, _: Wrap) -> None:
    torch.autograd.gradgradcheck(
        subject.op,
        _wanting(subject.args),
        gen_non_contig_grad_outputs=True,
        check_fwd_over_rev=True,
    )


# --- the operators, as they are called ------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """What of normc's operators is called while it is active, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[tuple[Any, tuple[Any, ...]]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "normc":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _opcheck_forward(subject: Subject, _: Wrap) -> None:
    for args in subject.layouts:
        with _Watch() as watch:
            _close(subject.op(*_wanting(args)), subject.oracle(*args))
        op, (tensors, *options) = watch.calls[-1]
        torch.library.opcheck(op, (list(_wanting(tensors)), *options))


def _opcheck_backward(subject: Subject, _: Wrap) -> None:
    for args in subject.layouts:
        with _Watch() as watch:
            _close(gradient(subject.op, args), subject.gradient)
        op, (tensors, *options) = watch.calls[-1]
        torch.library.opcheck(op, ([t.detach() for t in tensors], *options))


def _opcheck_tangent(subject: Subject, _: Wrap) -> None:
    start = Setting(Recipe(subject.formula, subject.names, backend=subject.backend), GROUPS, 1)
    for args in subject.layouts:
        along = dict(zip(subject.names, subject.tangents, strict=True))
        setting, tensors = start.pushed(along, args)
        recipe, op = setting.recipe, torch.ops.normc.forward.default
        options = (recipe.text, " ".join(recipe.names), GROUPS, 1, EPS)
        given = list(_wanting(tensors))
        _close(tuple(op(given, *options)[: len(recipe.results)]), subject.slopes)
        torch.library.opcheck(op, (given, *options))


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    number: int
    name: str
    function: Callable[[Subject, Wrap], None]
    compiled: bool = False

    def __call__(self, subject: Subject, compiler: str = "inductor") -> None:
        """Raise if the subject fails it; ``compiler`` is a backend of `torch.compile`, by name.

        What torch.compile has compiled before is forgotten.
        """
        with _quiet():
            if self.compiled:
                with _compiling(compiler) as wrap:
                    self.function(subject, wrap)
            else:
                self.function(subject, _as_it_is)


CHECKS = (
    Check(1, "forward", _forward),
    Check(2, "func.grad", _grad),
    Check(3, "jvp", _jvp),
    Check(4, "jacrev", partial(_jacobian, torch.func.jacrev)),
    Check(5, "jacfwd", partial(_jacobian, torch.func.jacfwd)),
    Check(6, "vmap", _vmap),
    Check(7, "per-sample grad", _per_sample),
    Check(8, "reverse-over-reverse Hessian", _hessian),
    Check(9, "compile forward", _forward, compiled=True),
    Check(10, "compile forward + backward", _backward, compiled=True),
    Check(11, "compile dynamic shapes", _dynamic, compiled=True),
    Check(12, "compile of func.grad", _grad, compiled=True),
    Check(13, "compile of jvp", _jvp, compiled=True),
    Check(14, "compile of vmap", _vmap, compiled=True),
    Check(15, "compile of vmap(grad)", _per_sample, compiled=True),
    Check(16, "export", _export),
    Check(17, "checkpoint", _checkpoint),
    Check(18, "gradcheck with forward AD and batched", _gradcheck),
    Check(19, "gradgradcheck", _gradgradcheck),
    Check(20, "opcheck of forward", _opcheck_forward),
    Check(21, "opcheck of backward", _opcheck_backward),
    Check(22, "opcheck of tangent", _opcheck_tangent),
)


@dataclass(frozen=True)
class Result:
    """What became of one check; ``error`` is empty if it passed."""

    check: str
    ok: bool
    error: str
    seconds: float


def conformance(formula: Formula | str, compiler: str = "inductor") -> list[Result]:
    """One result per check, in order; an error of any kind is a result, never raised."""
    subject: Subject | None = None
    results: list[Result] = []
    for check in CHECKS:
        start, error = time.perf_counter(), ""
        try:
            subject = subject or Subject(formula)
            check(subject, compiler)
        except Exception as found:  # whatever it is, it is the finding
            error = f"{type(found).__name__}: {found}"
        results.append(Result(check.name, not error, error, time.perf_counter() - start))
    return results


def _as_it_is(function: Function) -> Function:
    return function


@contextmanager
def _compiling(compiler: str) -> Generator[Wrap]:
    """`torch.compile` without graph breaks, for one shape unless told otherwise."""
    import torch._dynamo  # takes seconds
    from torch._dynamo.utils import counters
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    counters.clear()
    # What it keeps on disk knows an operator by name, not by what it was when that was written.
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        yield partial(torch.compile, fullgraph=True, backend=compiler, dynamic=False)


@contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        # torch scripts functions of its own when forward mode or Inductor is imported
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        yield
