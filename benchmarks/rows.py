"""Rows: what the table measures, on which tensors, and what is aimed at."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import peers
from normc.analysis.agreement import Case, Layout
from normc.analysis.providers import Call
from normc.formula import Formula, parse, zoo

TOKENS = Layout("tokens", 3, -1)  # (B, 1024, 768)
IMAGES = Layout("contiguous", 4, 1)  # (N, 128, 56, 56)
LAST = Layout("channels_last", 4, 1, lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1))
MAPS = Layout("maps", 4, -1)  # (N, 56, 56, 128): channels last by shape

OTHER = "normc, channels first"
"""Beside channels-last: our kernels on the same numbers in the usual layout."""

SEED = 20


@dataclass(frozen=True)
class Target:
    """What is aimed at for forward with backward."""

    over_floor: float  # at most; the floor is what a copy needs to move the same bytes
    inductor: float  # at least so many times as fast as torch.compile
    eager: float


@dataclass(frozen=True)
class Row:
    """One layer of the table."""

    name: str
    text: str  # a formula, or its name in the zoo
    layout: Layout
    peer: Call
    target: Target
    groups: int = 1
    native: bool = False  # the peer is torch's own fused function
    floor: int | None = None  # full-size tensors moved forward and backward, if not the programs'

    @property
    def formula(self) -> Formula:
        """The formula, parsed."""
        return zoo[self.text] if self.text in zoo else parse(self.text)

    @property
    def eps(self) -> float:
        """The zoo's epsilon."""
        return self.formula.eps

    def layouts(self) -> list[str]:
        """The layouts that it can be measured in; tokens and maps have their own alone."""
        return ["contiguous", *(["channels_last"] if self.layout is IMAGES else [])]

    def case(self, size: int, dtype: str, layout: str) -> Case:
        """Tensors of about ``size`` MB in float32."""
        place = LAST if layout == "channels_last" else self.layout
        if self.layout is TOKENS:
            shape = (max(1, size * 8 // 25), 1024, 768)
        elif self.layout is MAPS:
            shape = (max(1, size * 16 // 25), 56, 56, 128)
        else:
            shape = (max(1, size * 16 // 25), 128, 56, 56)
        return Case(place, shape, self.groups, dtype, SEED)


ROWS = {
    row.name: row
    for row in (
        Row("layer_norm", "layer_norm_tokens", TOKENS, peers.layer_norm,
            Target(1.15, 2.2, 1.4), native=True),
        Row("rms_norm", "rms_norm", TOKENS, peers.rms_norm, Target(1.15, 2.2, 3), native=True),
        # The sum is a result, so backward may read it in place of x and residual, whose gradients
        # are one tensor: 4A forward, 4A backward.
        Row("add_rms_norm", "add_rms_norm", TOKENS, peers.add_rms_norm,
            Target(1.2, 2, 4), floor=8),
        Row("dyt", "dyt", TOKENS, peers.dyt, Target(1.3, 2, 4)),
        Row("group_norm_silu", "gn_silu", IMAGES, peers.group_norm_silu,
            Target(1.25, 1.3, 2), 32, native=True),
        Row("instance_norm", "instance_norm", IMAGES, peers.instance_norm,
            Target(1.25, 1.3, 2), native=True),
        Row("batch_norm_relu", "bn_relu", IMAGES, peers.batch_norm_relu,
            Target(1.25, 5, 2.5), native=True),
        Row("evonorm_s0", "evonorm_s0", IMAGES, peers.evonorm_s0, Target(1.15, 3, 14), 32),
        Row("frn_tlu", "frn_tlu", IMAGES, peers.frn_tlu, Target(1.15, 1.5, 10)),
        Row("searched", "tanh(x)*sigmoid(v*x)/group_std(x)*gamma + beta", IMAGES, peers.searched,
            Target(1.15, 2, 8), 32),
        Row("evonorm_b0", "evonorm_b0", IMAGES, peers.evonorm_b0, Target(1.4, 2, 15)),
        Row("grn", "grn", MAPS, peers.grn, Target(1.4, 2, 8)),
    )
}  # fmt: skip
"""By name, in the order of the table."""

GEOMETRIC = 2.5
"""How many times as fast as torch.compile the rows are to be in the geometric mean."""
