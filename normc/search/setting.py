"""Setting: everything that a search depends on, as data that is stored with it.

The same setting gives the same archive, on any number of workers, and after a resume. Objectives
and data that are Python objects are stored by their names alone, and have to be passed again.

Steps, batches and networks are scaled to small images and two cores. What the paper (arXiv
2004.02967) does is said where it is known: 100 steps and 20 % for quality, twice what chance gets
in ten classes; 100 steps and 1e8 for stability. Its way of ascending is not known, nor which
networks are tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from normc.errors import NormcError
from normc.search.evolve import Evolution
from normc.search.nets import ARCHITECTURES, Scale
from normc.search.space import EVONORM, Space


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: SGD with Nesterov momentum, as in the paper."""

    steps: int = 200
    batch: int = 32
    rate: float = 0.05
    momentum: float = 0.9
    decay: float = 1e-4  # of the weights of convolutions and linear layers, not of the layer's
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch", "rate")


@dataclass(frozen=True)
class Quality:
    """The first steps of training: an accuracy below the threshold on any network rejects."""

    steps: int = 100
    chance: float = 2.0  # the threshold, in units of what guessing gets: 20 % of ten classes

    def __post_init__(self) -> None:
        _positive(self, "steps")


@dataclass(frozen=True)
class Stability:
    """Ascent on the norm of the weights' gradients: a norm above the limit rejects."""

    steps: int = 100  # 0 leaves the test out
    limit: float = 1e8
    rate: float = 0.1  # the length of a step, relative to that of the weights
    batch: int = 16
    networks: int = 1  # how many of the architectures are tried, in order

    def __post_init__(self) -> None:
        _positive(self, "limit", "rate", "batch", "networks")


@dataclass(frozen=True)
class Limits:
    """What one evaluation may take; beyond it ends, and that is its result."""

    seconds: float = 300.0
    mebibytes: int = 4096  # over what a worker has before it begins

    def __post_init__(self) -> None:
        _positive(self, "seconds", "mebibytes")


@dataclass(frozen=True)
class Setting:
    """A search: how candidates are made, on what they are tried, and what counts."""

    evolution: Evolution = field(default_factory=Evolution)
    space: Space = EVONORM
    data: str = "digits"  # or cifar10:FOLDER, cifar100:FOLDER; else the name of what is passed
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    scale: Scale = field(default_factory=lambda: Scale(8, (1, 1)))
    objectives: tuple[str, ...] = ("accuracy",)
    recipe: Recipe = field(default_factory=Recipe)
    quality: Quality = field(default_factory=Quality)
    stability: Stability = field(default_factory=Stability)
    limits: Limits = field(default_factory=Limits)
    groups: int | Literal["auto"] = 4  # of networks so narrow; "auto" makes a group a channel
    eps: float = 1e-5
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.architectures or not self.objectives:
            raise NormcError("a search needs at least one architecture and one objective")
        for names in (self.architectures, self.objectives):
            if len(set(names)) < len(names):
                raise NormcError(f"one of these is there twice: {', '.join(names)}")
        if self.quality.steps > self.recipe.steps:
            raise NormcError(
                f"quality is judged after {self.quality.steps} steps, but training has "
                f"{self.recipe.steps}"
            )

    def to_json(self) -> str:
        """The setting as text; `Setting.from_json` is the inverse."""
        return _msgspec().json.encode(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Setting:
        """The setting of such a text, in which what is left out is as by default.

        Raises `NormcError` with the place of what does not fit.
        """
        library = _msgspec()
        try:
            found: Setting = library.json.decode(text, type=Setting)
            strange = _strange(library.json.decode(text), library.to_builtins(found))
        except library.MsgspecError as error:
            raise NormcError(f"this is no setting of a search: {error}") from error
        if strange:
            raise NormcError(f"this is no setting of a search: nothing is called {strange}")
        return found


def _strange(given: Any, known: Any, place: str = "$") -> str:
    """Where a text names something that no setting has; empty if nowhere."""
    if not isinstance(given, dict) or place == "$.space.operations":
        return ""
    for name, value in given.items():
        here = f"{place}.{name}"
        found = here if name not in known else _strange(value, known[name], here)
        if found:
            return found
    return ""


def _msgspec() -> Any:
    try:
        import msgspec
    except ImportError:
        raise NormcError("a search needs msgspec: pip install 'normc[search]'") from None
    return msgspec


def _positive(record: Any, *names: str) -> None:
    for name in names:
        if not getattr(record, name) > 0:
            what = type(record).__name__.lower()
            raise NormcError(f"{what}.{name} is {getattr(record, name)}: expected more than 0")
