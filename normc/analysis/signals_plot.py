"""Signals drawn: the curves of one or more networks in one figure, and one table of them as text.

The figure needs matplotlib, the extra ``normc[bench]``; the table needs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from itertools import zip_longest
from typing import Any

from normc.analysis.signals import Signals
from normc.errors import NormcError

Values = Sequence[float | None]

CURVES = ("squared mean", "variance", "residual")
"""Average channel squared mean and variance behind a block, and the variance of its branch."""

_COLOURS = ("#0b6e99", "#d1603d", "#5a8f29", "#8e5ea2", "#e0a030", "#606060")


def curve(signals: Signals, name: str) -> Values:
    """The values of one of `CURVES`, one per block."""
    return [getattr(block, name.replace(" ", "_")) for block in signals.blocks]


def table(*signals: Signals, name: str = "variance") -> str:
    """One of `CURVES` for several networks side by side, a line per block.

    The lines are named as the blocks of the longest one.
    """
    _check(signals, name)
    longest = max(signals, key=lambda s: len(s.blocks))
    labels = [s.label or f"#{i}" for i, s in enumerate(signals)]
    wide = [max(10, len(label)) for label in labels]
    first = max(len(name), *(len(b.name) for b in longest.blocks))
    head = [f"{label:>{w}}" for label, w in zip(labels, wide, strict=True)]
    lines = ["  ".join([f"{name:{first}}", *head])]
    rows = zip_longest(*(curve(s, name) for s in signals))
    for block, row in zip(longest.blocks, rows, strict=True):
        cells = ["-" if v is None else f"{v:.4g}" for v in row]
        cells = [f"{cell:>{w}}" for cell, w in zip(cells, wide, strict=True)]
        lines.append("  ".join([f"{block.name:{first}}", *cells]))
    return "\n".join(lines)


def figure(*signals: Signals, expected: Values | None = None, title: str = "") -> Any:
    """A matplotlib Figure with a panel per curve and a line per network, over the block's number.

    ``expected`` are variances that theory predicts, one per block, drawn as a dashed line. Nothing
    is registered with pyplot. Raises `NormcError` without matplotlib.
    """
    _check(signals, "variance")
    drawn = _matplotlib("figure").Figure(figsize=(11, 3.2), layout="constrained")
    for name, panel in zip(CURVES, drawn.subplots(1, len(CURVES)), strict=True):
        for i, s in enumerate(signals):
            points = [(at, v) for at, v in enumerate(curve(s, name)) if v is not None]
            places, values = [at for at, _ in points], [v for _, v in points]
            style = {"color": _COLOURS[i % len(_COLOURS)], "linewidth": 1.3, "label": s.label}
            panel.plot(places, values, marker="." if len(s.blocks) < 30 else None, **style)
        if expected is not None and name == "variance":
            panel.plot(range(len(expected)), expected, "--", color="black", linewidth=0.9,
                       label="predicted", zorder=3)  # fmt: skip
        what = "residual variance" if name == "residual" else name
        panel.set_title(f"average channel {what}", fontsize=9)
        panel.set_xlabel("block", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = drawn.axes[1].get_legend_handles_labels()
    if any(labels):
        drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    if title:
        drawn.suptitle(title, fontsize=10)
    return drawn


def save(
    path: str | os.PathLike[str], *signals: Signals, expected: Values | None = None, title: str = ""
) -> None:
    """Write `figure` to a file, whose ending says as what: svg, png, pdf.

    The same signals give the same SVG: no date, names of paths by a fixed salt, text as text.
    """
    with _matplotlib("").rc_context({"svg.hashsalt": "normc", "svg.fonttype": "none"}):
        drawn = figure(*signals, expected=expected, title=title)
        dated = os.fspath(path).endswith((".svg", ".pdf"))
        key = "Date" if os.fspath(path).endswith(".svg") else "CreationDate"
        drawn.savefig(path, metadata={key: None} if dated else None)


def _check(signals: Sequence[Signals], name: str) -> None:
    if not signals:
        raise NormcError("there is nothing to compare: give the results of signal_propagation")
    if name not in CURVES:
        raise NormcError(f"there is no curve {name!r}: {', '.join(CURVES)}")


def _matplotlib(part: str) -> Any:
    """Matplotlib, or one of its modules; imported late, as it is optional."""
    try:
        return import_module(f"matplotlib.{part}" if part else "matplotlib")
    except ImportError:
        raise NormcError("a figure needs matplotlib: pip install 'normc[bench]'") from None
