"""GPU rows: what the table of the GPU measures, the bytes that have to move, and what is aimed at.

A is the bytes of x. The floor of a pass is so many times A at the speed of a copy; an efficiency is
the floor over a time. Aims are those of one H200, whose copy moves 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch

from benchmarks.rows import IMAGES, LAST, MAPS, SEED, TOKENS
from normc.analysis.agreement import Case, Layout
from normc.formula import Formula, parse, zoo
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.cost import moved

FORWARD, BACKWARD = "forward", "backward"
PASSES = (FORWARD, BACKWARD)

COMPILE, EAGER, LIGER, QUACK = "compile", "eager", "liger", "quack"
"""What ours is compared with: torch.compile, the layer as one writes it in torch, two libraries."""

FLAT = Layout("rows", 2, 1)  # (B, C)

Pair = tuple[float | None, float | None]
"""Of forward and of backward."""


@dataclass(frozen=True)
class Row:
    """One layer on tensors of one shape."""

    id: str  # "C1/evonorm_s0": the shape's name in the table of targets, and the layer
    text: str  # a formula, or its name in the zoo
    layout: Layout
    shape: tuple[int, ...]
    aims: tuple[float, float]  # the efficiency of forward and of backward
    rank: int  # what is more important is measured first: 1, 2, ...
    beats: Mapping[str, Pair] = field(default_factory=dict)  # at least so many times as fast as
    peer: str = ""  # its name in `benchmarks.gpu_peers`, if not the layer's
    moves: tuple[int, int] = (2, 3)  # in A
    groups: int = 1
    dtype: str = "bfloat16"
    host: bool = False  # so small that the time of a call on the host is what counts

    @property
    def name(self) -> str:
        """The layer."""
        return self.id.split("/")[1]

    @property
    def formula(self) -> Formula:
        """The formula, parsed."""
        return zoo[self.text] if self.text in zoo else parse(self.text)

    @property
    def eps(self) -> float:
        """The zoo's epsilon."""
        return self.formula.eps

    @property
    def case(self) -> Case:
        """The tensors."""
        return Case(self.layout, self.shape, self.groups, self.dtype, SEED)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return getattr(torch, self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """A."""
        return prod(self.shape) * self.itemsize

    def floors(self, speed: float) -> dict[str, float]:
        """The floor of each pass in microseconds where a copy moves ``speed`` GB/s."""
        pairs = zip(PASSES, self.moves, strict=True)
        return {name: times * self.bytes / speed / 1e3 for name, times in pairs}

    def traffic(self) -> dict[str, int]:
        """The bytes of each pass, with parameters, their gradients and the statistics saved.

        Partial sums are not counted: how many there are is a kernel's own choice.
        """
        geometry = self.case.geometry
        least = [
            moved(job.plan, job.dense).floor
            for job in all_jobs(self.formula, Target("torch", self.dtype))
        ]
        small = [t.bytes(geometry, self.itemsize) - t.full * self.bytes for t in least]
        every = zip(PASSES, self.moves, small, strict=True)
        return {name: times * self.bytes + extra for name, times, extra in every}


# --- the table -----------------------------------------------------------------------------------

SEARCHED = "tanh(x)*sigmoid(v*x)/{}_std(x)*gamma + beta"


def _both(**times: float) -> dict[str, Pair]:
    """As many times as fast in forward as in backward."""
    return {who: (least, least) for who, least in times.items()}


# What is to be beaten, and how many times as fast in forward and in backward. cuDNN's BatchNorm and
# ATen's GroupNorm are what eager torch calls.
_ROWS: dict[str, Pair] = {QUACK: (1.0, None), LIGER: (None, 2.0), COMPILE: (None, 1.0)}
_LONG: dict[str, Pair] = {COMPILE: (1.4, None), LIGER: (3.0, None)}
_SUMS: dict[str, Pair] = {LIGER: (1.1, 1.7), COMPILE: (1.0, 1.1)}
_COLD: dict[str, Pair] = {EAGER: (1.6, 2.5)}
_SEARCHED: dict[str, Pair] = {COMPILE: (None, 1.4), EAGER: (8.0, 8.0)}
_CHANNELS: dict[str, Pair] = {COMPILE: (1.35, 1.5)}
_GROUPS: dict[str, Pair] = {COMPILE: (1.0, 1.4)}

_T1, _C1, _C4, _K = (8, 4096, 4096), (64, 256, 56, 56), (8, 320, 64, 64), (112, 64, 512, 512)


@dataclass(frozen=True)
class _Place:
    """A shape with its layers; what it leaves open is each layer's own, see `_CNN`."""

    id: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    aims: tuple[float, float] | None = None
    beats: Mapping[str, Pair] | None = None
    rank: int | None = None
    layout: Layout = IMAGES


_TOKENS = (
    _Place("T1", _T1, ("layer_norm", "rms_norm", "dyt"), (0.97, 0.92), _ROWS, 1, TOKENS),
    _Place("T2", (4, 2048, 8192), ("layer_norm", "rms_norm"), (0.96, 0.90), _ROWS, 3, TOKENS),
    _Place("T3", (16, 1024, 768), ("layer_norm", "dyt"), (0.87, 0.80), _COLD, 2, TOKENS),
    _Place("T4", (2048, 65536), ("layer_norm", "rms_norm"), (0.92, 0.85), _LONG, 3, FLAT),
)
_SMALL = ((1, 1), (16, 3), (128, 2))
"""The batches of T5, and how important they are."""


def _tokens() -> list[Row]:
    rows = [
        Row(f"{at.id}/{name}", "layer_norm_tokens" if name == "layer_norm" else name, at.layout,
            at.shape, at.aims or (0, 0), at.rank or 1, at.beats or {})
        for at in _TOKENS for name in at.layers
    ]  # fmt: skip
    sums = Row("T1/add_rms_norm", "add_rms_norm", TOKENS, _T1, (0.96, 0.91), 2, _SUMS, moves=(4, 4))
    rows.insert(3, sums)
    small = Row("T5/rms_norm", "rms_norm", TOKENS, (), (0, 0), 1, host=True)
    rows += [replace(small, id=f"{small.id}/{n}", shape=(n, 1, 4096), rank=k) for n, k in _SMALL]
    return rows


_CNN = (
    # name, text, groups, aims on C1, what is to be beaten there, rank
    ("batch_norm_relu", "bn_relu", 1, (0.87, 0.80), _CHANNELS | _both(eager=1.2), 1),
    ("evonorm_b0", "evonorm_b0", 1, (0.87, 0.80), _CHANNELS | _both(eager=8), 2),
    ("group_norm_silu", "gn_silu", 32, (0.94, 0.88), _GROUPS | _both(eager=4), 1),
    ("evonorm_s0", "evonorm_s0", 32, (0.94, 0.88), _GROUPS | _both(eager=8), 1),
    ("instance_norm", "instance_norm", 1, (0.94, 0.88), _GROUPS, 2),
    ("frn_tlu", "frn_tlu", 1, (0.94, 0.88), _GROUPS, 2),
)
_EVERY = tuple(name for name, *_ in _CNN)
_SILU = ("group_norm_silu",)
_PLACES = (
    _Place("C1", _C1, _EVERY),
    _Place("C1", _C1, _EVERY, (0.80, 0.72), _both(eager=3, compile=1.3), 3, LAST),
    _Place("C2", (32, 64, 112, 112), ("batch_norm_relu", *_SILU), (0.88, 0.81), None, 3),
    _Place("C3", (64, 2048, 7, 7), _EVERY, (0.70, 0.64), _both(eager=2), 3),
    _Place("C4", _C4, _SILU, (0.81, 0.73), _both(eager=3, compile=1.2), 2),
    _Place("C4", _C4, _SILU, (0.81, 0.73), _both(eager=3, compile=1.2), 2, LAST),
    _Place("C5", (1, 128, 1024, 1024), _SILU, (0.83, 0.75),
           {COMPILE: (1.25, 1.3), EAGER: (5.0, 5.0)}, 2),
)  # fmt: skip


def _images() -> list[Row]:
    rows: list[Row] = []
    for at in _PLACES:
        for name, text, groups, aims, beats, rank in _CNN:
            if name in at.layers:
                id = f"{at.id}/{name}{'/last' if at.layout is LAST else ''}"
                beats = beats if at.beats is None else at.beats
                row = Row(id, text, at.layout, at.shape, at.aims or aims, at.rank or rank, beats)
                rows.append(replace(row, groups=groups))
    return rows


def _others() -> list[Row]:
    streamed = _both(compile=1.4)  # torch.compile reads x twice
    return [
        Row("GRN/grn", "grn", MAPS, (64, 56, 56, 256), (0.82, 0.75), 2, {COMPILE: (1.3, 1.4)}),
        Row("X/searched", SEARCHED.format("group"), IMAGES, _C1, (0.94, 0.88), 2, _SEARCHED,
            groups=32),
        Row("X/searched/tokens", SEARCHED.format("channel"), TOKENS, _T1, (0.94, 0.88), 3,
            _SEARCHED, "searched_tokens"),
        Row("K/instance_norm", "(x - instance_mean(x))/instance_std(x)", IMAGES, _K, (0.90, 0.85),
            4, streamed, "plain_instance_norm", dtype="float32"),
        Row("K/group_norm", "group_norm", IMAGES, _K, (0.90, 0.85), 4, streamed,
            groups=8, dtype="float32"),
        Row("K/rms_norm", "x/channel_rms(x)", IMAGES, _K, (0.90, 0.85), 4, streamed,
            "plain_rms_norm", dtype="float32"),
        Row("K/layer_norm", "(x - layer_mean(x))/layer_std(x)", IMAGES, (16, 64, 256, 256),
            (0.83, 0.78), 3, _both(eager=25, compile=2), "plain_layer_norm", dtype="float32"),
        # A channel is larger than the chip: x is read once more.
        Row("K/batch_norm", "batch_norm", IMAGES, (64, 64, 512, 512), (0.91, 0.88), 4,
            _both(compile=1), moves=(3, 5), dtype="float32"),
    ]  # fmt: skip


ROWS = {row.id: row for row in (*_tokens(), *_images(), *_others())}
"""By id, in the order of the table."""

GEOMETRIC = (0.85, 0.78)
"""The efficiency of forward and of backward aimed at in the geometric mean."""
