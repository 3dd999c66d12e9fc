"""Signals: how large activations are along a network, block by block: a signal propagation plot.

Three curves of Brock, De and Smith, "Characterizing signal propagation to close the performance gap
in unnormalized ResNets", arXiv 2101.08692, at the output of every residual block:

    squared mean    mean over channels of the square of the channel's mean
    variance        mean over channels of the channel's biased variance
    residual        the same variance of the branch, before it is scaled and added

Means and variances of a channel are over samples and positions, of all batches together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normc.analysis.batches import batches as batches_of
from normc.analysis.batches import taken
from normc.analysis.signals_meter import BRANCH, Meter, find_blocks
from normc.analysis.trace import untouched
from normc.errors import NormcError, nearest
from normc.ops.grouping import Data

Blocks = Sequence[str] | Callable[[str, nn.Module], bool]
"""The paths of the blocks, or what says of a path and a module whether it is one."""

Branches = str | Mapping[str, str]
"""The module whose output is the branch: its path in each block, or by the block's path."""


@dataclass(frozen=True)
class Block:
    """The signal behind one block; the first, ``(input)``, is what enters the first block."""

    name: str  # the module's path, with #2 for its second call in one run
    squared_mean: float
    variance: float
    residual: float | None  # None where no branch was found


@dataclass(frozen=True)
class Signals:
    """What `signal_propagation` found, in the order in which blocks finish."""

    label: str
    source: str  # what went in
    blocks: tuple[Block, ...]

    def show(self) -> str:
        """A table as text, one line per block."""
        width = max(len(b.name) for b in self.blocks)
        head = f"{'block':{width}} {'squared mean':>13} {'variance':>10} {'residual':>10}"
        lines = [f"{self.label or 'signals'}, {self.source}", head]
        for b in self.blocks:
            residual = "-" if b.residual is None else f"{b.residual:.4g}"
            lines.append(
                f"{b.name:{width}} {b.squared_mean:13.4g} {b.variance:10.4g} {residual:>10}"
            )
        return "\n".join(lines)


def signal_propagation(
    model: nn.Module,
    data: Data | None = None,
    *,
    shape: Sequence[int] | None = None,
    blocks: Blocks | None = None,
    branches: Branches | None = None,
    batches: int = 4,
    seed: int = 0,
    training: bool = True,
    channel_dim: int = 1,
    label: str = "",
) -> Signals:
    """Run a model and measure its signal at each residual block.

    ``data`` is a batch or an iterable of batches, of which at most ``batches`` are read (of a tuple
    the first tensor), in the model's dtype unless they are whole numbers; without it, so many unit
    Gaussian ones of ``shape`` (N, C, H, W). The model runs in training mode by default, so that
    BatchNorm uses its batch as at the start of training, but without dropout and stochastic depth.
    It is left as it was.

    **Blocks.** A residual block is a module whose own forward method adds two tensors of one shape
    that both come from the model's input, one of them through more convolutions or matrix products
    than the other; and so is every module of the same class. The branch is the tensor that has come
    through more, before it was multiplied by numbers and parameters: before a SkipInit gain, alpha
    or LayerScale. The last such sum of a block counts. What is added within one compiled formula
    cannot be seen, so a module may also say what its branch is: it is a block, if a child of it is
    called ``branch`` and returns the shape that it returns. ``blocks`` names other modules, and
    ``branches`` the modules whose outputs are the branches.

    Raises `NormcError` if no block is found, for a name that the model does not have, for data of
    which none can be measured, or if the model does not run on one tensor.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> [b.name for b in signal_propagation(net, shape=(2, 3, 8, 8), blocks=["0", "1"]).blocks]
    ['(input)', '0', '1']
    """
    found = batches_of(model, data, shape, batches, seed)
    with untouched(model, training, seed):
        names = _chosen(model, blocks) if blocks is not None else find_blocks(model, found[0][:2])
        meter = Meter(model, names, _branches(model, names, branches), channel_dim)
        for x in found:
            meter.calls.clear()
            meter.run(x)
    size = "x".join(map(str, found[0].shape))
    source = f"{'unit Gaussian' if data is None else 'data'}, {len(found)} batches of {size}"
    return Signals(label, source, tuple(Block(*row) for row in meter.rows()))


def compare_signals(
    models: Mapping[str, nn.Module], data: Data | None = None, *, batches: int = 4, **how: Any
) -> tuple[Signals, ...]:
    """`signal_propagation` of several models, by label, on the same batches.

    ``how`` are its arguments. To compare layers in one network, copy it and let
    `normc.replace_norms` put each formula in. Raises `NormcError` as it does, and without models.
    """
    if not hasattr(models, "items") or not models:
        raise NormcError('compare what? Give a mapping from names to models, as {"before": net}')
    if data is not None:
        data = taken(data, batches)  # an iterator could be read only once
    how["batches"] = batches
    return tuple(signal_propagation(m, data, label=label, **how) for label, m in models.items())


# --- what to measure -----------------------------------------------------------------------------


def _chosen(model: nn.Module, blocks: Blocks) -> list[str]:
    modules = dict(model.named_modules())
    names: list[Any]
    if isinstance(blocks, nn.Module):  # which is callable, too
        names = [blocks]
    elif callable(blocks):
        names = [name for name, module in modules.items() if name and blocks(name, module)]
    else:
        names = list(blocks)
    if isinstance(blocks, str) or not all(isinstance(name, str) for name in names):
        raise NormcError('blocks takes a list of paths, as ["layer1.0"]: see model.named_modules()')
    for name in names:
        if name not in modules:
            raise NormcError(f"the model has no module `{name}`{nearest(name, modules)}")
    if not names:
        raise NormcError("no module was chosen as a block: see model.named_modules()")
    return names


def _branches(model: nn.Module, names: Sequence[str], given: Branches | None) -> dict[str, str]:
    """The block of each module that is a branch, by its path."""
    if given is None:
        return {f"{n}.{BRANCH}": n for n in names if hasattr(model.get_submodule(n), BRANCH)}
    pairs = [(f"{n}.{given}", n) for n in names] if isinstance(given, str) else [
        (path, name) for name, path in given.items()
    ]  # fmt: skip
    modules = dict(model.named_modules())
    for path, block in pairs:
        if block not in names:
            raise NormcError(f"`{block}` is no block{nearest(block, names)}")
        if path not in modules and not isinstance(given, str):
            raise NormcError(f"the model has no module `{path}`{nearest(path, modules)}")
    found = {path: block for path, block in pairs if path in modules}
    if not found:
        known = {path for n in names for path, _ in model.get_submodule(n).named_modules()}
        raise NormcError(f"no block has a module `{given}`{nearest(str(given), known)}")
    return found


__all__ = [
    "Block",
    "Blocks",
    "Branches",
    "Signals",
    "compare_signals",
    "find_blocks",
    "signal_propagation",
]
