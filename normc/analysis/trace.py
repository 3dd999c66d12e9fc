"""Trace: what every tensor of a model has come through, learned by watching a run.

Hooks say which module is at work, and a torch function mode sees the operations on tensors, also
those that are written in a forward method. The model is left as it was: modes and hooks, buffers
such as running statistics, torch's random state.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from normc.analysis.batches import dtype_name
from normc.errors import NormcError

_WEIGHTED = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    *("multi_head_attention_forward", "scaled_dot_product_attention"),
}
_QUIET = {"dim", "size", "stride", "numel", "is_floating_point", "is_contiguous"}  # no tensors
_ADD = {"add", "add_"}
_SCALE = {"mul", "mul_", "multiply", "multiply_", "div", "div_", "divide", "true_divide"}
_DROPS = re.compile("dropout|droppath|dropblock|stochasticdepth", re.IGNORECASE)


@dataclass(frozen=True)
class Trail:
    """What a tensor has come through since it entered the model."""

    depth: int  # convolutions and products with matrices, on the way that has most of them
    fed: str | None  # the path of the module that did the last of them
    plain: Tensor | None = None  # itself before products with numbers and parameters, if any


class Watch(TorchFunctionMode):
    """Watches runs of a model; what is done about it, subclasses say by three methods."""

    way_out = "wrap it in a module that takes one tensor"
    """What may help where the model does not run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.working: list[str] = []  # paths of the modules at work, the innermost last
        self._trails = WeakTensorKeyDictionary()

    def entered(self, name: str, args: Sequence[Any]) -> None:
        """A module is about to run; ``name`` is its path, "" the model's own."""

    def left(self, name: str, out: Any) -> None:
        """A module has returned."""

    def added(self, branch: Tensor) -> None:
        """A residual branch is about to be added, in ``working[-1]``; before it was scaled."""

    def trail(self, tensor: Tensor) -> Trail | None:
        """What is known of a tensor; nothing, if it does not come from the model's input."""
        return self._trails.get(tensor)

    def run(self, x: Tensor) -> None:
        """Run the model on a batch, under `untouched`; `NormcError` says why it does not run."""
        try:
            self._run(x)
        except NormcError:
            raise
        except Exception as error:
            lines = [type(error).__name__, *str(error).strip().splitlines()[:1]]
            raise NormcError(
                f"the model does not run on one tensor of shape {tuple(x.shape)}, {dtype_name(x)}: "
                f"{': '.join(lines)}; {_unwrapped(self.model) or self.way_out}"
            ) from error

    def _run(self, x: Tensor) -> None:
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.working.clear()
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                before, after = partial(self._enter, name), partial(self._leave, name)
                for handle in (
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after, with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            x = x.clone()  # the model may work in place
            self._trails[x] = Trail(0, None)
            stack.enter_context(self)
            functional_call(self.model, buffers, (x,))

    # --- modules ---------------------------------------------------------------------------------

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.working.append(name)
        self.entered(name, [*args, *kwargs.values()])

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """What comes out of kernels, which the mode does not see into, comes from what went in."""
        deepest = self._deepest(tensors((args, tuple(kwargs.values()))))
        if deepest is not None:
            weights = any(p.dim() > 1 for p in module.parameters(recurse=False))
            made = Trail(deepest.depth + weights, name if weights else deepest.fed)
            for t in tensors(out):
                if t not in self._trails:
                    self._trails[t] = made
        self.left(name, out)
        self.working.pop()

    # --- operations ------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        quiet = name in _QUIET
        deepest = None if quiet else self._deepest(tensors((args, tuple(given.values()))))
        if deepest is None:
            return func(*args, **given)
        if name in _ADD:
            self._add([*args, *given.values()])
        plain = self._unscaled(args) if name in _SCALE else None
        if plain is not None and name.endswith("_"):
            plain = plain.clone()  # its own memory is about to change
        out = func(*args, **given)
        if args and out is args[0] and not name.endswith("_"):
            return out  # as from contiguous()
        weights = name in _WEIGHTED
        fed = self.working[-1] if weights and self.working else deepest.fed
        for t in tensors(out):
            self._trails[t] = Trail(deepest.depth + weights, fed, plain)
        return out

    def _deepest(self, found: Iterable[Tensor]) -> Trail | None:
        trails = [trail for t in found if (trail := self.trail(t)) is not None]
        return max(trails, key=lambda trail: trail.depth, default=None)

    def _add(self, args: Sequence[Any]) -> None:
        """Report a branch: of two tensors of one shape, what has come through more weights."""
        pair = [t for t in args[:2] if isinstance(t, Tensor) and t.dim() > 1]
        trails = [self.trail(t) for t in pair]
        if len(pair) < 2 or pair[0].shape != pair[1].shape or not all(trails):
            return
        (depth, plain, branch), (other, *_) = sorted(
            ((r.depth, r.plain, t) for r, t in zip(trails, pair, strict=True) if r),
            key=lambda row: -row[0],
        )
        if depth > other:
            self.added(branch if plain is None else plain)

    def _unscaled(self, args: Sequence[Any]) -> Tensor | None:
        """The one operand that comes from the model's input, before it was scaled at all."""
        moving = [t for t in tensors(args) if self.trail(t) is not None]
        if len(moving) != 1 or any(t.numel() > moving[0].numel() for t in tensors(args)):
            return None
        trail = self.trail(moving[0])
        return trail.plain if trail and trail.plain is not None else moving[0]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from tensors(item)


@contextmanager
def untouched(model: nn.Module, training: bool, seed: int) -> Generator[None]:
    """Set the mode, without dropout of any kind, seed torch, and put everything back at the end.

    Raises `NormcError` for a model with lazy modules, whose first call changes them for good.
    """
    tensors_of = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors_of)):
        raise NormcError("the model has lazy modules without shapes: call it once on a batch first")
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({t.device.index or 0 for t in tensors_of if t.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
        if any(_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for generator in (torch.default_generator, *map(_generator, devices)):
            generator.manual_seed(seed)
        try:
            for module, _ in modes:  # train() may have been given another meaning
                module.training = training and not _drops(module)
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _unwrapped(model: nn.Module) -> str:
    """What to do about wrappers that hooks and torch.func do not go through."""
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return "give model.module, which nn.DataParallel wraps"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "give the model as it was before torch.jit"
    return ""


def _generator(device: int) -> torch.Generator:
    torch.cuda.init()
    return torch.cuda.default_generators[device]


def _drops(module: nn.Module) -> bool:
    """nn.Dropout and its kin, timm's DropPath, torchvision's StochasticDepth, by their names."""
    return _DROPS.search(type(module).__name__) is not None


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
