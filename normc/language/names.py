"""Names: the paper's spellings, what may be called, and what no parameter may be called."""

from __future__ import annotations

from normc.errors import nearest
from normc.language.axes import AXIS_SETS, Axis
from normc.language.definition import RESERVED, STARTS_AT_ZERO, Param
from normc.language.mistakes import FOREIGN
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import REDUCTIONS

GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "eps",
    "ϵ": "eps",
    "µ": "mu",  # the micro sign, which is on keyboards
    "μ": "mu",
    "ν": "nu",
    "σ": "sigma",
    "τ": "tau",
}
"""Letters of papers and how they are written out; the grammar's NAME lists them too."""

_PLAIN = str.maketrans(GREEK)
_CALLED = str.maketrans(GREEK | {"μ": "mean", "µ": "mean", "σ": "std"})


def spell(name: str) -> str:
    """A name as a value, written out: ``γ`` is ``gamma``."""
    return name.translate(_PLAIN)


def spell_called(name: str) -> str:
    """A name that is called: ``group_μ`` is ``group_mean``, and ``σ`` alone is ``sigmoid``."""
    return "sigmoid" if name == "σ" else spell_statistic(name)


def spell_statistic(name: str) -> str:
    """A name followed by axes: ``μ[n,s]`` is ``mean[n,s]`` and ``σ[n,s]`` is ``std[n,s]``."""
    return name.translate(_CALLED)


def statistic(name: str) -> tuple[str, Axis] | None:
    """``group_std`` is the reduction ``std`` over the axes of ``group``; else None."""
    head, _, stat = name.rpartition("_")
    if head in AXIS_SETS and stat in REDUCTIONS:
        return stat, AXIS_SETS[head].axes
    return None


def is_function(name: str) -> bool:
    """Whether ``name`` is written ``name(...)`` with one or more element-wise arguments."""
    return name in PRIMITIVES and PRIMITIVES[name].callable


def free(name: str) -> Param:
    """The parameter that a name means when nothing declares it."""
    return Param(name, init=0.0 if name in STARTS_AT_ZERO else 1.0)


def callables() -> list[str]:
    """Every name that may stand before ``(``."""
    statistics = [f"{head}_{stat}" for head in AXIS_SETS for stat in REDUCTIONS]
    return [name for name in PRIMITIVES if is_function(name)] + statistics


def unknown(name: str) -> str:
    """The message for a call of a name that is not a function."""
    if name in REDUCTIONS:
        return f"`{name}` needs its axes: `group_{name}(x)` or `{name}[k,s](x)`"
    head, _, stat = name.rpartition("_")
    foreign = FOREIGN.get(name) or (FOREIGN.get(stat) if head in AXIS_SETS else None)
    hint = f": {foreign}" if foreign else nearest(name, callables())
    return f"unknown function `{name}`{hint}"


def unknown_statistic(name: str) -> str:
    """The message for axes given to a name that is not a statistic."""
    if statistic(name):
        return f"`{name}` names its axes already: `{name}(x)`"
    return f"`{name}` is not a statistic, and takes no axes{nearest(name, REDUCTIONS)}"


def misuse(name: str) -> str | None:
    """Why ``name`` cannot be used as a value, or None if it can."""
    if name in RESERVED:
        return f"`{name}` has a fixed meaning and cannot name a parameter"
    if name in REDUCTIONS:
        return f"`{name}` is a statistic and needs axes and an argument: `group_{name}(x)`"
    if is_function(name) or statistic(name):
        return f"`{name}` is a function and needs an argument: `{name}(x)`"
    return None


def untakeable(name: str) -> str | None:
    """Why nothing can be declared or defined under ``name``, or None if it can."""
    if name in RESERVED:
        return f"`{name}` has a fixed meaning and cannot be given another"
    if name in REDUCTIONS or is_function(name) or statistic(name):
        return f"`{name}` is a function and cannot be given another meaning"
    return None
