"""Layer: a formula as a torch module, with parameters, running statistics and two modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from normc.errors import FormulaError, NormcError, ShapeError
from normc.formula import Formula, formula_of
from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.geometry import Geometry
from normc.ops.grouping import Grouping, chosen
from normc.ops.op import Op, Result, check_tensors
from normc.ops.setting import splits_channels
from normc.ops.sync import apart, summed, synced
from normc.pipeline import batch_counts, batch_levels, programs
from normc.program.running import Running


class Layer(nn.Module):
    """A formula over ``num_channels`` channels, in place of a normalization(-activation) layer.

    ``formula`` is one of `normc.parse`, its text, or a name in the zoo; ``eps`` is the zoo's, or
    1e-5, if None.

    Its parameters carry the formula's names. Statistics over the batch have running buffers,
    updated in training as nn.BatchNorm does (``momentum``, None for a cumulative average; the
    variance unbiased) and used in evaluation; ``track_running_stats=False`` uses the batch in both.
    With ``sync``, training takes them over the batches of all processes of ``process_group`` (None
    for all there are), as nn.SyncBatchNorm does.

    ``groups`` is a number, "auto" (the largest divisor of the channels up to 32), or "isometric":
    the number that keeps the scale of gradients best behind the convolution or linear layer
    ``after``, as `normc.analysis.isometric_groups` measures it at initial values.

    >>> layer = Layer("x*sigmoid(v*x)/group_std(x)*gamma + beta", 64, groups=8)
    >>> sorted(name for name, _ in layer.named_parameters())
    ['beta', 'gamma', 'v']
    """

    def __init__(
        self,
        formula: Formula | str,
        num_channels: int,
        *,
        groups: Grouping = "auto",
        after: nn.Module | None = None,
        eps: float | None = None,
        momentum: float | None = 0.1,
        channel_dim: int = 1,
        track_running_stats: bool = True,
        sync: bool = False,
        process_group: Any = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.op = Op(formula_of(formula), backend)
        eps = self.formula.eps if eps is None else eps
        _check_numbers(num_channels, eps, momentum)
        self.num_channels = int(num_channels)
        number = chosen(groups, self.formula, self.num_channels, after)
        self.groups = Geometry.of((1, self.num_channels), number).g
        self.eps = float(eps)
        self.momentum = None if momentum is None else float(momentum)
        self.channel_dim = channel_dim
        self.sync, self.process_group = sync, process_group
        found = programs(self.formula.definition, ()).running if track_running_stats else ()
        self.running: tuple[Running, ...] = found
        self._results = len(self.formula.definition.results)
        self._check_names()
        for p in self.formula.params:
            shape = (num_channels,) if p.axes else ()
            self.register_parameter(
                p.name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
        for r in self.running:
            room = torch.empty(self._shape(r), device=device, dtype=dtype)
            self.register_buffer(r.name, room)
        self.counts = batch_counts(self.formula.definition) if self.running else {}
        for name in self.counts:  # the formula itself counts samples: batch_sum(x)/batch_sum(1)
            self.register_buffer(f"running_{name}", torch.empty((), device=device, dtype=dtype))
        if self.running:
            counter = torch.tensor(0, dtype=torch.long, device=device)
            self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    @property
    def formula(self) -> Formula:
        """The formula this layer computes."""
        return self.op.formula

    def _check_names(self) -> None:
        """Raise `FormulaError` for names that torch's modules, or this layer, use themselves."""
        buffers = {*(r.name for r in self.running), "num_batches_tracked"} if self.running else ()
        taken = [p.name for p in self.formula.params if hasattr(self, p.name) or p.name in buffers]
        taken += [i.name for i in self.formula.inputs if i.name == "self"]
        if taken:
            raise FormulaError(f"`{taken[0]}` is an attribute of every Layer: give it another name")

    def _shape(self, r: Running) -> tuple[int, ...]:
        if r.kept & ~CHANNEL:
            raise FormulaError(
                f"{r.op} over the batch varies over positions, so it has no running value: "
                "use track_running_stats=False"
            )
        sizes = {Axis.G: self.groups, Axis.K: self.num_channels // self.groups}
        if r.kept == CHANNEL:
            return (self.num_channels,)
        return (sizes[r.kept],) if r.kept else ()

    def reset_running_stats(self) -> None:
        """Put running statistics back to where they start."""
        for r in self.running:
            self.get_buffer(r.name).fill_(r.start)
        for name in self.counts:
            self.get_buffer(f"running_{name}").fill_(1.0)
        if self.running:
            self.get_buffer("num_batches_tracked").zero_()

    def reset_parameters(self) -> None:
        """Put parameters and running statistics back to where they start."""
        self.reset_running_stats()
        for p in self.formula.params:
            nn.init.constant_(self.get_parameter(p.name), p.init)

    def forward(self, x: Tensor, *by_place: Tensor, **inputs: Tensor) -> Result:
        """Run the formula on x, ``num_channels`` along ``channel_dim``, and its other inputs.

        These are given by name, or by place in the order of the formula.
        """
        dim = self.channel_dim
        if by_place:
            inputs = self.op.named(by_place, inputs)
        if (
            not isinstance(x, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
            or not -x.dim() <= dim < x.dim()
            or x.shape[dim] != self.num_channels
            or inputs
        ):
            self._check(x, inputs)
        given: Any = {**self._parameters, **inputs} if inputs else self._parameters
        if self.sync and self.training and apart(self.process_group):
            results = self._synced(x, given)
        elif not self.running:
            results = self.op.run(x, given, self.groups, self.eps, dim)
        elif not self.training:
            buffers: Any = {r.stat: self._buffers[r.name] for r in self.running}
            for name in self.counts:
                buffers[name] = self._buffers[f"running_{name}"]
            mode = "synced" if self.counts else "frozen"
            results = self.op.run(x, given, self.groups, self.eps, dim, mode, buffers)
        else:
            results = self.op.run(x, given, self.groups, self.eps, dim, "track")
            geometry = Geometry.of(x.shape, self.groups, dim)
            counts = [geometry.count(r.over) for r in self.running] if x.numel() else []
            numbers = {name: geometry.count(axes) for name, axes in self.counts.items()}
            self._update(results[self._results :], counts, numbers)
        return results[0] if self._results == 1 else results[: self._results]

    def _check(self, x: Tensor, inputs: dict[str, Tensor]) -> None:
        check_tensors(x, inputs)
        dim = self.channel_dim
        if -x.dim() <= dim < x.dim() and x.shape[dim] != self.num_channels:
            raise ShapeError(
                f"x has {x.shape[dim]} channels along dimension {dim} (shape {tuple(x.shape)}), "
                f"but the layer was made for {self.num_channels}"
            )
        own = {p.name for p in self.formula.params} & inputs.keys()
        if own:
            raise ShapeError(f"`{min(own)}` is a parameter of the layer; it takes only inputs")

    def _synced(self, x: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The results with the statistics of all processes' batches."""
        definition, group = self.formula.definition, self.process_group
        geometry = Geometry.of(x.shape, self.groups, self.channel_dim)
        full = ["x", *(i.name for i in definition.inputs if i.axes == FULL)]
        half, tensors = x.dtype.itemsize < 4, {"x": x, **given}
        if half:  # gradients of several kernels are added up: they are rounded once, at the end
            tensors |= {n: tensors[n].float() for n in full if n in tensors}
        wide = tensors.pop("x")

        def run(mode: str, known: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            return self.op.run(wide, tensors, self.groups, self.eps, self.channel_dim, mode, known)

        numbers = {n: geometry.count(axes) for n, axes in batch_counts(definition).items()}
        found = synced(
            batch_levels(definition),
            summed(numbers, group, x),
            run,
            lambda r: geometry.count(r.over),
            group,
        )
        if self.running:
            counts = [found.counts[r.stat] for r in self.running]
            now = [found.statistics[r.stat] for r in self.running]
            self._update(now, counts, {name: found.statistics[name] for name in self.counts})
        return tuple([t.to(x.dtype) for t in found.results]) if half else found.results

    @torch.no_grad()
    def _update(
        self,
        now: Sequence[Tensor],
        counts: Sequence[int | Tensor],
        numbers: Mapping[str, int | Tensor],
    ) -> None:
        """One step of the moving averages, as nn.BatchNorm takes it.

        ``counts`` are those of the elements of each statistic, ``numbers`` those that the formula
        itself reads. An empty batch, which has none, is one more batch and no more, as in torch.
        """
        seen = self.get_buffer("num_batches_tracked").add_(1)
        rate = 1 / seen.double() if self.momentum is None else self.momentum
        if not counts:
            return
        rows = zip(self.running, now, counts, strict=True)
        fresh = [(r.name, v * _unbiased(n) if r.unbiased else v, n) for r, v, n in rows]
        fresh += [(f"running_{name}", n, n) for name, n in numbers.items()]
        for name, value, n in fresh:
            buffer = self.get_buffer(name)
            mixed = rate * value + (1 - rate) * buffer  # in the dtype of statistics
            buffer.copy_(torch.where(n > 0, mixed, buffer) if isinstance(n, Tensor) else mixed)

    def extra_repr(self) -> str:
        """What recreates the layer, but for dtype and device."""
        crosses = bool(programs(self.formula.definition, ()).running)
        said = {
            "groups": self.groups if splits_channels(self.formula) else None,
            "eps": self.eps,
            "channel_dim": self.channel_dim,
            "momentum": repr(self.momentum) if self.running else None,
            "track_running_stats": False if crosses and not self.running else None,
            "sync": self.sync or None,
            "backend": None if self.op.backend == "auto" else repr(self.op.backend),
        }
        options = [f"{name}={value}" for name, value in said.items() if value is not None]
        return ", ".join([repr(self.formula.text), str(self.num_channels), *options])


def _check_numbers(num_channels: Any, eps: Any, momentum: Any) -> None:
    """Raise `ShapeError` for no number of channels, `NormcError` for other numbers out of range."""
    if not isinstance(num_channels, Integral) or int(num_channels) < 0:  # torch allows none
        raise ShapeError(f"num_channels must be a whole number, not {num_channels!r}")
    if not isinstance(eps, Real) or not 0 <= float(eps) < inf:
        raise NormcError(f"eps must be a number from 0 on, not {eps!r}")
    if momentum is not None and not (isinstance(momentum, Real) and isfinite(momentum)):
        raise NormcError(f"momentum must be None or a number, not {momentum!r}")


def _unbiased(n: int | Tensor) -> float | Tensor:
    """n/(n - 1), and 1 for one element, whose variance has no unbiased estimate."""
    if isinstance(n, Tensor):
        return torch.where(n > 1, n / (n - 1), 1.0)
    return n / (n - 1) if n > 1 else 1.0
