"""C places: where a tensor's element lies, at the loop indices that are in scope.

Two kinds of loops go through here. In most, one index runs over each axis. In a loop over *lanes*,
one index ``base + i`` runs over the axes that are contiguous in memory, (G, K) or S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from normc.backends.c_spelling import HALF, NARROW, WIDE
from normc.backends.c_text import Lines, index
from normc.backends.contract import Job
from normc.backends.emit import Spelling, expand, write
from normc.language.axes import CHANNEL, FULL, NONE, Axis, members
from normc.language.expr import Expr, Var, variables
from normc.program.program import is_scalar

LANE = "base + i"
"""The position of a lane in the axes that are contiguous."""


@dataclass
class Places:
    """How the variables of one job are read and written."""

    job: Job
    out: Lines
    grid: Axis = NONE  # of the kernel
    lanes: Axis = NONE  # the axes whose loop is one over lanes
    group: str = f"({LANE})/K"  # the index over G where only G is left of the lanes

    @property
    def spelling(self) -> Spelling:
        return WIDE if self.job.wide == "float64" else NARROW

    @property
    def half(self) -> bool:
        """Whether full-size tensors are stored in fewer bits than they are computed in."""
        return self.job.dtype in HALF

    @cached_property
    def kept(self) -> set[str]:
        """The values of a slice that one sweep computes and others read."""
        return {k.name for k in self.job.plan.keeps}

    @cached_property
    def stats(self) -> set[str]:
        """The tensors that are contiguous over (N, G, K, S)."""
        return {s.name for s in self.job.plan.program.stats} | set(self.job.dense)

    def ordered(self, axes: Axis) -> list[Axis]:
        """Axes from the outermost in memory to the innermost."""
        return [a for a in self.job.plan.order if a & axes]

    def load(self, v: Var) -> str:
        """The text that reads a variable."""
        if v.name.startswith("|"):
            return f"(real)({'*'.join(v.name.strip('|'))})"
        if is_scalar(v.name):
            return "eps"
        narrow = self.half and v.axes == FULL and v.name not in self.kept
        return f"widen_({self.place(v)})" if narrow else self.place(v)

    def place(self, v: Var) -> str:
        """The element of a tensor."""
        if v.name in self.kept:
            return f"{v.name}[{self.inside()}]"
        return f"{v.name}_ptr[{self.offset(v)}]"

    def inside(self) -> str:
        """The position in an instance's slice, which is dense in the order of the loops."""
        loops = self.ordered(FULL & ~self.grid & ~self.lanes)
        sizes = [str(a.name) for a in loops] + ["width"] * bool(self.lanes)
        steps = ["*".join([index(a), *sizes[i + 1 :]]) for i, a in enumerate(loops)]
        return " + ".join([*steps, f"{LANE} - first"] if self.lanes else steps)

    def offset(self, v: Var) -> str:
        """Where an element lies; the axis that is known to be contiguous needs no stride."""
        unit = self.contiguous(v)
        loops = members(v.axes & ~self.lanes)
        steps = [f"{index(a)}*{v.name}_{index(a)}" for a in loops if a != unit]
        ends = [index(unit)] if unit and unit & ~self.lanes else []
        return " + ".join([*steps, *self._lane(v, unit), *ends]) or "0"

    def _lane(self, v: Var, unit: Axis | None) -> list[str]:
        """The part of an offset that runs over the lanes."""
        shared = v.axes & self.lanes
        if not shared:
            return []
        last = members(shared)[-1]
        at = self.group if shared == Axis.G else f"({LANE})%K" if shared == Axis.K else LANE
        if last == unit:
            return [at]
        return [f"({at})*{v.name}_{index(last)}"]

    def contiguous(self, v: Var) -> Axis | None:
        """The axis along which a tensor surely has stride 1, if there is one."""
        if v.axes == FULL:
            return self.job.plan.order[-1] if self.job.unit else None
        if v.axes & CHANNEL and v.axes & (Axis.N | Axis.S) and v.name not in self.stats:
            return None  # a user's tensor: which of its axes is inside depends on channel_dim
        return members(v.axes)[-1] if v.axes else None

    def text(self, expr: Expr, spelling: Spelling, known: Mapping[Expr, str], prefix: str) -> str:
        """An expression over a state's numbers, each variable spelled with a prefix."""
        names = {id(e): text for e, text in known.items()}
        (body,) = expand([expr], spelling)
        for v in variables([body]):
            names.setdefault(id(v), prefix + v.name)
        return write(body, spelling, names)
