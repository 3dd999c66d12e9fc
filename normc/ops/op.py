"""Op: a compiled formula as a function on tensors, with autograd through the compiled backward."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normc import config
from normc.backends import contract
from normc.errors import FormulaError, ShapeError, nearest
from normc.formula import Formula, formula_of, zoo
from normc.language.axes import FULL
from normc.language.geometry import Groups
from normc.ops.call import Call
from normc.ops.doors import Autograd, enter, foreign, transformed, watched
from normc.ops.explain import explain
from normc.ops.recipe import Recipe
from normc.ops.setting import MOST_CALLS, Ready, Setting, wanted
from normc.ops.traced import traced
from normc.pipeline import Built, Mode, Target, sources

if TYPE_CHECKING:
    from normc.ops.cost import Costs

Result = Tensor | tuple[Tensor, ...]


class Op:
    """A compiled formula: ``y = op(x, groups=8, v=v)``.

    Kernels are compiled when the first tensors of a new kind (dtype, device, memory order, wanted
    gradients) arrive, and kept.
    """

    def __init__(self, formula: Formula, backend: str = "auto") -> None:
        if not formula.reads_x:
            raise FormulaError(f"`{formula.text}` never reads `x`, the input{_meant(formula.text)}")
        self.formula = formula
        self.backend = backend
        if backend != "auto":
            contract.find(backend)
        _announce()
        self._full = [i.name for i in formula.inputs if i.axes == FULL]
        self._calls: dict[Any, tuple[Setting, Call]] = {}
        self._settings: dict[Any, Setting] = {}
        self._ready: Ready = {}

    def __repr__(self) -> str:
        chosen = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"normc.compile({self.formula.text!r}{chosen})"

    def __call__(
        self,
        /,
        x: Tensor,
        *inputs: Tensor,
        groups: Groups = "auto",
        eps: float = 1e-5,
        channel_dim: int = 1,
        **tensors: Tensor,
    ) -> Result:
        """Run the formula on x of rank 2 to 5; one tensor of x's shape per result.

        ``tensors`` are the formula's parameters, of shape (C,) or (), and inputs, of x's shape
        without the dimensions their declaration leaves out; ``inputs`` are those inputs by their
        place instead of their name. ``groups`` must divide the channels,
        "auto" is the largest divisor up to 32. Statistics are computed in float32 (float64 for
        float64 x). Raises `ShapeError` for whatever does not fit.
        """
        given = self.named(inputs, tensors) if inputs else tensors
        try:
            results = self.run(x, given, groups, eps, channel_dim)
        except (AttributeError, TypeError):
            check_tensors(x, given)  # costs no call that goes well
            raise
        return results[0] if len(results) == 1 else results

    def named(self, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, the first of them given as inputs in the order of the formula.

        Raises `ShapeError` for more than it has, and for one that is given twice.
        """
        names = [i.name for i in self.formula.inputs]
        if len(inputs) > len(names):
            takes = f"x and {', '.join(names)}" if names else "x alone"
            raise ShapeError(
                f"{1 + len(inputs)} tensors are given, but `{self.formula.text}` takes {takes}; "
                "parameters of an op are given by name"
            )
        by_place = dict(zip(names, inputs, strict=False))
        if twice := by_place.keys() & tensors.keys():
            raise ShapeError(f"`{min(twice)}` is given twice, by place and by name")
        return {**by_place, **tensors}

    def run(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        groups: Groups,
        eps: float,
        channel_dim: int,
        mode: Mode = "batch",
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """The results; in mode "track", then the batch's own value of each running statistic.

        ``buffers`` are the values of statistics that are inputs in this mode.
        """
        given = {"x": x, **tensors}
        if buffers:
            given |= buffers
        if self._full:
            given = self._uniform(given)
        if torch.compiler.is_compiling():
            how = (groups, eps, channel_dim, mode)
            return traced(self.formula, self.backend, given, *how)
        args = tuple(given.values())
        if transformed() or watched():
            return enter(self._setting((groups, channel_dim, mode), given), eps, args)
        here = self.backend if self.backend != "auto" else config.scope().get("backend", "auto")
        key = (here, groups, channel_dim, mode, torch.is_grad_enabled(), *given)
        for t in args:
            key += t.shape, t.stride(), t.dtype, t.device, t.requires_grad, type(t), t.is_neg()
        ready = self._calls.get(key)
        if ready is None:
            setting = self._setting((groups, channel_dim, mode), given)
            if foreign(args) or any(t.is_neg() for t in args):
                return enter(setting, eps, args)
            ready = self._calls[key] = setting, self._call(setting, given, eps, not buffers)
        setting, call = ready
        if call.gradient:
            return _apply(call, eps, setting, *args)
        done = call.forward(given, eps)
        return tuple([done[name] for name in call.names])

    def _setting(self, how: tuple[Any, ...], given: Mapping[str, Tensor]) -> Setting:
        groups, channel_dim, mode = how
        key = (config.scope().get("backend"), *how, *given)
        if key not in self._settings:
            recipe = Recipe(self.formula, tuple(given), mode, self.backend)
            self._settings[key] = Setting(recipe, groups, channel_dim, self._ready)
        return self._settings[key]

    def _call(
        self, setting: Setting, given: Mapping[str, Tensor], eps: float, tunable: bool
    ) -> Call:
        """Find or build the kernels; done once per kind of call."""
        args = tuple(given.values())
        call = setting.call(args, wanted(setting.recipe.names, args))
        if config.tune() and tunable:
            from normc.ops.tune import tune  # seldom wanted

            tune(self.formula, call, given, eps)
        if len(self._calls) >= MOST_CALLS:
            self._calls.clear()
        return call

    def _uniform(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of x's shape in one dtype: x's, under autocast the widest, as it promotes."""
        full = ["x", *(name for name in self._full if name in given)]
        dtypes = [given[name].dtype for name in full]
        dtype = dtypes[0]
        if all(other == dtype for other in dtypes):
            return given
        if torch.is_autocast_enabled(given["x"].device.type):
            for other in dtypes:
                dtype = torch.promote_types(dtype, other)
        return {**given, **{name: given[name].to(dtype) for name in full}}

    def use(self, built: Built, mode: Mode, target: Target, differentiable: bool) -> None:
        """Take these kernels for calls of their kind; with all gradients they serve any call."""
        self._ready[mode, target] = built, differentiable

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: object) -> Op:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Op, (self.formula, self.backend)

    def source(self, backend: str = "c", dtype: str = "float32") -> str:
        """The text of the kernels, forward and backward, that a backend would compile."""
        f = self.formula
        names = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
        made = list(sources(f.definition, f.label, f.text, names, Target(backend, dtype)))
        return contract.find(backend).unit([job for job, _ in made], [text for _, text in made])

    def explain(self, x: Tensor, groups: Groups = "auto", channel_dim: int = 1) -> str:
        """The programs and plans for tensors like x, and the bytes each plan moves."""
        return explain(self.formula, x, groups, channel_dim, self.backend)

    def cost(self, x: Tensor, groups: Groups = "auto", channel_dim: int = 1) -> Costs:
        """The operations and bytes of forward and backward for tensors like x.

        `torch.utils.flop_counter.FlopCounterMode` counts the same operations where it sees them.
        """
        from normc.ops.cost import costs  # seldom wanted

        return costs(self.formula, x, groups, channel_dim, self.backend)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write one Python file that computes the formula without normc; returns its path.

        The file needs torch and triton. It holds a function of x and the formula's inputs and
        parameters, named as the formula is in the zoo, else as the file; Triton kernels for forward
        and backward, resident and streaming, which store float32, float16 and bfloat16 and compute
        in float32; the same as plain torch operations, for the CPU and for float64; and a check of
        it all, which runs when the file does. A file that is there is overwritten. Raises
        `NormcError` for a formula that names a tensor like a result or a gradient, OSError where
        the file cannot be written.
        """
        from normc.ops.export import export  # brings sympy, which takes 0.3 s to import

        return export(self.formula, path)


def compile(formula: Formula | str, backend: str = "auto") -> Op:
    """Compile a formula, its text, or a name in the zoo, to an op.

    ``backend`` is auto, c, triton, tape or torch. "auto" takes Triton for CUDA tensors and C for
    CPU tensors where they can run, torch otherwise.
    Raises `FormulaError` for a text that is no formula, or one that never reads x, `BackendError`
    for an unknown backend.
    """
    return Op(formula_of(formula), backend)


def check_tensors(x: Any, given: Mapping[str, Any]) -> None:
    """Raise `ShapeError` unless x and all that is given by name are tensors."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"x must be a tensor, not {type(x).__name__}")
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise ShapeError(f"`{name}` must be a tensor, not {type(t).__name__}")


def _meant(text: str) -> str:
    """What a text without x may have meant: a name in the zoo, or a capital X."""
    if re.search(r"\bX\b", text):
        return ": it is a small letter"
    words = re.fullmatch(r"[\w\s-]+", text)
    near = nearest(re.sub(r"\W+", "_", text.strip().lower()), zoo) if words else ""
    return f": a name in the zoo is written as there{near}" if near else ""


@cache
def _announce() -> None:
    """Tell torch's counter of operations of ours, with the first op."""
    from normc.ops.cost import announce

    announce()


_base: Any = super(torch.autograd.Function, Autograd)
_apply: Any = _base.apply
"""What ``Autograd.apply`` comes to where no transform of torch.func is active, in half the time."""
