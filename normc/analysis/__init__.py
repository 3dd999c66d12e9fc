"""Layers and networks measured: against the oracle, at their initial values, on the clock.

`gain`, `signal_propagation` and `isometric_groups` are public; docs/analysis.md shows them at work.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normc.analysis.gains import gain, moments
    from normc.analysis.isometric import isometric_groups, isometric_groups_of
    from normc.analysis.signals import compare_signals, find_blocks, signal_propagation

_HOME = {
    "gain": "gains",
    "moments": "gains",
    "isometric_groups": "isometric",
    "isometric_groups_of": "isometric",
    "compare_signals": "signals",
    "find_blocks": "signals",
    "signal_propagation": "signals",
}

__all__ = [
    "compare_signals",
    "find_blocks",
    "gain",
    "isometric_groups",
    "isometric_groups_of",
    "moments",
    "signal_propagation",
]


def __getattr__(name: str) -> Any:
    """Import what is public at its first use: the command line needs other parts, and at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'normc.analysis' has no attribute {name!r}")
    return getattr(import_module(f"normc.analysis.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """What is public, and the modules."""
    return sorted({*__all__, *(module.name for module in iter_modules(__path__))})
