"""The contract between a Plan and the machine: what a backend is given and what it gives back.

A backend is one file in this folder, found by its name. It offers ``backend``, a `Backend`:
`render` turns a `Job` into readable source, `load` turns the sources of one formula's jobs into
functions, and a function runs its job on tensors. Tensors arrive as they are, any strides;
statistics come back over their kept axes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from normc.errors import BackendError, nearest
from normc.language.geometry import Geometry
from normc.schedule.cost import moved
from normc.schedule.plan import Able, Plan

BACKENDS = ("c", "triton", "tape", "torch")


@dataclass(frozen=True)
class Job:
    """One Program to run: its plan, the storage type of its tensors, and what to call it."""

    name: str  # of the formula: letters, digits and underscores
    part: str  # "forward", "backward", ...
    formula: str  # the text, for the header of the source
    plan: Plan
    dtype: str  # storage: "float32", "float64", "float16", "bfloat16"
    dense: tuple[str, ...] = ()  # inputs that are statistics: contiguous over (N, G, K, S)
    unit: bool = False  # the innermost axis of every full-size tensor has stride 1

    @property
    def entry(self) -> str:
        """The name of the function in the source."""
        return f"{self.name}_{self.part}"

    @property
    def header(self) -> list[str]:
        """What stands above a source: name, formula, bytes moved (A: of one tensor), plan."""
        moves = f"moves: {moved(self.plan, self.dense).show()}"
        return [
            self.entry,
            " ".join(self.formula.split()),
            moves,
            "",
            *self.plan.show().splitlines(),
        ]

    @property
    def wide(self) -> str:
        """The type statistics are computed and stored in."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True)
class Source:
    """What a backend prints."""

    written: str | Callable[[], str]  # the text, or what prints it when it is wanted
    entry: str
    suffix: str  # of the file it lies in: ".c", ".py", ".txt"
    dtype: str = "float32"  # the storage type of its job

    @cached_property
    def text(self) -> str:
        """The text."""
        return self.written if isinstance(self.written, str) else self.written()


Bound = Callable[[Mapping[str, Any], float], dict[str, Any]]
"""A job for tensors of one kind: from the tensors by name and eps, its outputs by name."""


class Run(Protocol):
    """A loaded job."""

    def bind(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Bound:
        """The job for all tensors with the shapes, strides and dtypes of these."""
        ...

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        """Every output and saved statistic by name, from every input by name."""
        ...


@dataclass(frozen=True)
class Plain:
    """A `Run` that finds nothing out in advance: a function of geometry, tensors and eps."""

    run: Callable[[Geometry, Mapping[str, Any], float], dict[str, Any]]

    def bind(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Bound:
        return partial(self.run, geometry)

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        return self.run(geometry, tensors, eps)


class Backend(Protocol):
    """One way to run a job."""

    name: str
    able: Able

    def why_not(self, dtype: str, device: str) -> str:
        """Why this backend cannot run here on tensors like these; empty if it can."""
        ...

    def render(self, job: Job) -> Source: ...

    def unit(self, jobs: Sequence[Job], sources: Sequence[Source]) -> str:
        """The text for all jobs of one formula; `joined`, unless they are compiled as one."""
        ...

    def load(self, jobs: Sequence[Job], sources: Sequence[Source]) -> list[Run]:
        """All jobs of one formula, ready to run."""
        ...


def joined(sources: Sequence[Source]) -> str:
    """Sources that stand on their own, one after the other."""
    return "\n".join(source.text for source in sources)


def find(name: str) -> Backend:
    """The backend called ``name``; importing it is left until it is asked for."""
    if name not in BACKENDS:
        choices = ", ".join(BACKENDS)
        raise BackendError(f"no backend is called `{name}`{nearest(name, BACKENDS)}: {choices}")
    return importlib.import_module(f"normc.backends.{name}").backend
