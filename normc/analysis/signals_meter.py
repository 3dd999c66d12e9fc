"""What measures signals: a watch that finds residual blocks, and one that measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normc.analysis.trace import Watch, tensors
from normc.errors import NormcError, ShapeError

INPUT = "(input)"
"""The row of what enters the first block."""


BRANCH = "branch"
"""A child of this name, whose output has the shape of the block's, is a block's branch."""


class _Finder(Watch):
    """Notes which modules add, and in which order modules finish."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.adding: set[str] = set()
        self.finished: dict[str, None] = {}
        self._shapes: dict[str, Any] = {}  # of the outputs of branches, by their path

    def added(self, branch: Tensor) -> None:
        self.adding.add(self.working[-1])

    def left(self, name: str, out: Any) -> None:
        self.finished[name] = None
        shape = next((t.shape for t in tensors(out)), None)
        if name.endswith(f".{BRANCH}"):
            self._shapes[name] = shape
        if self._shapes.pop(f"{name}.{BRANCH}", None) == shape is not None:
            self.adding.add(name)


def find_blocks(model: nn.Module, x: Tensor) -> list[str]:
    """The paths of the residual blocks, in the order in which they finish.

    What one is, `signal_propagation` says. Runs the model on a batch, under `untouched`. Raises
    `NormcError` if there is none.
    """
    finder = _Finder(model)
    finder.run(x)
    kinds = {type(model.get_submodule(name)) for name in finder.adding if name}
    found = [n for n in finder.finished if n and type(model.get_submodule(n)) in kinds]
    if not found:
        where = "only the model's own forward method adds" if finder.adding else "nothing is added"
        raise NormcError(f"no residual block was found, as {where}: name them, blocks=[...]")
    return found


@dataclass(frozen=True)
class Channels:
    """Count, mean and sum of squared distances from it, per channel."""

    count: int
    mean: Tensor
    squares: Tensor

    @staticmethod
    def of(t: Tensor, channel_dim: int) -> Channels:
        rows = t.detach().movedim(channel_dim, 0).flatten(1)
        rows = rows.to("cpu" if t.device.type == "mps" else t.device).double()
        mean = rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        return Channels(rows.shape[1], mean.cpu(), squares.cpu())

    def __add__(self, other: Channels) -> Channels:
        """Both together (Chan, Golub, LeVeque)."""
        n, apart = self.count + other.count, other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * (self.count * other.count / n)
        return Channels(n, self.mean + apart * (other.count / n), squares)

    @property
    def squared_mean(self) -> float:
        return float(self.mean.square().mean())

    @property
    def variance(self) -> float:
        return float(self.squares.mean() / self.count)


class Meter(Watch):
    """Measures the outputs of blocks and their branches, all batches together."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], ends: Mapping[str, str], channel_dim: int
    ) -> None:
        super().__init__(model)
        self.names, self.ends, self.dim = set(names), ends, channel_dim
        self.calls: dict[str, int] = {}
        self.outputs: dict[str, Channels] = {}
        self.residuals: dict[str, Channels] = {}
        self._last: dict[str, Channels] = {}  # of a block at work

    def entered(self, name: str, args: Sequence[Any]) -> None:
        if name in self.names and not self.calls:
            self._note(self.outputs, INPUT, self._first(args, name))
        if name in self.names:
            self.calls[name] = self.calls.get(name, 0) + 1

    def added(self, branch: Tensor) -> None:
        block = next((n for n in reversed(self.working) if n in self.names), None)
        if block is not None and block not in self.ends.values():
            self._last[block] = self._measured(branch, block)  # a later sum takes its place

    def left(self, name: str, out: Any) -> None:
        if name in self.ends:
            self._last[self.ends[name]] = self._first(out, name)
        if name in self.names:
            key = name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"
            self._note(self.outputs, key, self._first(out, name))
            if name in self._last:
                self._note(self.residuals, key, self._last.pop(name))

    def rows(self) -> list[tuple[str, float, float, float | None]]:
        """Name, squared mean, variance and residual variance; `NormcError` if no block ran."""
        if not self.outputs:
            raise NormcError("no block ran: the model does not call the modules named")
        found = {name: c.variance for name, c in self.residuals.items()}
        return [(n, c.squared_mean, c.variance, found.get(n)) for n, c in self.outputs.items()]

    def _first(self, value: Any, name: str) -> Channels:
        found = next(tensors(value), None)
        if found is None or found.dim() < 2:
            raise NormcError(
                f"`{name}` has no tensor with channels to measure: choose other blocks"
            )
        return self._measured(found, name)

    def _measured(self, t: Tensor, name: str) -> Channels:
        if not -t.dim() <= self.dim < t.dim():
            shape = tuple(t.shape)
            raise ShapeError(f"channel_dim={self.dim} is not there at `{name}`, of shape {shape}")
        if t.is_meta:
            raise NormcError("the model is on the meta device, without numbers to be measured")
        return Channels.of(t, self.dim)

    @staticmethod
    def _note(room: dict[str, Channels], name: str, found: Channels) -> None:
        room[name] = room[name] + found if name in room else found
