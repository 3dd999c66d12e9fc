"""Grouping: numbers of groups that are found from a network, beside those that are given.

Who finds them looks at whole networks and lies above this room. It is entered in `CHOOSERS` by its
name, as a function that is called when the name is used, and imports nothing before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from normc.errors import ShapeError, nearest
from normc.formula import Formula
from normc.language.geometry import Groups

Grouping = Groups | Literal["isometric"]
"""A number, "auto", or the name of a chooser."""

Data = Tensor | Iterable[Any]
"""One batch, or an iterable of batches, of which each may be a tuple such as (images, labels)."""


class Chooser(Protocol):
    """Finds numbers of groups by looking at what stands before a layer."""

    def of_layer(self, formula: Formula, after: nn.Module) -> int:
        """For a layer directly behind a convolution or linear layer."""
        ...

    def of_model(
        self, model: nn.Module, formula: Formula, data: Data | None, shape: Sequence[int] | None
    ) -> Mapping[str, int]:
        """For the norms of a model by their paths; those that nothing is found for are left out."""
        ...


CHOOSERS: dict[str, Callable[[], Chooser]] = {}


class Where(NamedTuple):
    """What a chooser for a model is told: batches, or the shape of Gaussian ones."""

    data: Data | None
    shape: Sequence[int] | None


def chosen(groups: Grouping, formula: Formula, channels: int, after: nn.Module | None) -> Groups:
    """The number for one layer; what is no name of a chooser comes back as it is.

    Raises `ShapeError` without ``after``, or if that makes another number of channels.
    """
    if not isinstance(groups, str) or groups == "auto":
        return groups
    chooser = _chooser(groups)
    if after is None:
        raise ShapeError(
            f'groups="{groups}" is found from the layer before: give after=, a convolution or '
            "linear layer, or let replace_norms look at a whole model"
        )
    made: Any = getattr(after, "out_channels", getattr(after, "out_features", channels))
    if made != channels:
        raise ShapeError(f"after={type(after).__name__} makes {made} channels, not {channels}")
    return chooser.of_layer(formula, after)


def chosen_of(
    groups: Grouping | Mapping[str, int],
    formula: Formula,
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    where: Where,
) -> Callable[[nn.Module], Groups]:
    """From a norm to its number; "auto" for those that a chooser leaves out.

    ``norms`` are those of the model by all their paths: a norm may stand in several places, and
    what looked at the model may have met it in another one.
    """
    if isinstance(groups, str) and groups != "auto":
        return _by_norm(_chooser(groups).of_model(model, formula, *where), norms)
    if not (where.data is None and where.shape is None):
        raise ShapeError(f"data and shape are for {_names()}, which runs the model: leave them out")
    if isinstance(groups, Mapping):
        for path in groups.keys() - norms.keys():
            raise ShapeError(f"groups: the model has no norm `{path}`{nearest(path, norms)}")
        return _by_norm(groups, norms)
    same: Groups = groups  # pyright: ignore[reportAssignmentType]  # no name is left but "auto"
    return lambda norm: same


def _by_norm(
    found: Mapping[str, int], norms: Mapping[str, nn.Module]
) -> Callable[[nn.Module], Groups]:
    numbers = {id(norms[path]): number for path, number in found.items() if path in norms}
    return lambda norm: numbers.get(id(norm), "auto")


def _chooser(name: str) -> Chooser:
    if name not in CHOOSERS:
        raise ShapeError(
            f'groups="{name}" is not known{nearest(name, [*CHOOSERS, "auto"])}: give a number, '
            f'"auto" or {_names()}'
        )
    return CHOOSERS[name]()


def _names() -> str:
    return ", ".join(f'"{name}"' for name in CHOOSERS)
