"""Evolve: which layer is tried next, from how those before it have done.

    ask     candidate i: the first `population` are random graphs; then the winner of a tournament
            among the most recent individuals, mutated, or with some probability a random graph
    tell    its scores, or why it has none

A candidate depends on the seed, its number i, and candidates up to i - `lag`: not on who was
evaluated first. So one worker or eight, or a run that was stopped and resumed, try the same layers.

From arXiv 2004.02967: tournaments of 5 %, a random member of the Pareto front wins, the oldest are
forgotten. Two mutations, and random graphs half of the time, are as remembered from its appendix.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from normc.errors import NormcError
from normc.search.genome import Genome, draw, formula, mutate
from normc.search.pareto import front
from normc.search.screen import Screen, Series
from normc.search.space import EVONORM, Space

Rule = Literal["pareto", "average"]
Strategy = Literal["evolution", "random"]

MOST_MUTANTS = 1_000
"""Mutants in a row that may be rejected before a random graph is tried in their place."""

MOST_TRIES = 100_000
"""Graphs in a row that may be rejected before a space is taken for empty."""


@dataclass(frozen=True)
class Evolution:
    """How candidates follow from each other."""

    seed: int = 0
    series: Series = "B"
    full: bool = True  # what does not vary over samples, channels and positions is left out
    strategy: Strategy = "evolution"  # "random" is the baseline: every candidate a random graph
    population: int = 50  # random graphs before evolution begins
    window: int = 2500  # the individuals that tournaments are held among: the most recent
    tournament: float = 0.05  # the share of them that takes part
    fewest: int = 16  # that take part whatever the share is: of few, 5 % would be anybody
    winner: Rule = "pareto"  # a random member of the tournament's front, or the best on average
    mutations: int = 2
    fresh: float = 0.5  # probability that a random graph is tried instead of a mutated one
    lag: int = 8  # candidates that may be under evaluation at the same time

    def __post_init__(self) -> None:
        for name in ("population", "window", "fewest", "mutations", "lag"):
            if getattr(self, name) < 1:
                raise NormcError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("tournament", "fresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise NormcError(f"{name} is {getattr(self, name)}: expected a share from 0 to 1")


@dataclass(frozen=True)
class Candidate:
    """A layer to evaluate."""

    number: int
    genome: Genome
    text: str
    parent: int | None  # the number of the individual it was mutated from
    screened: Mapping[str, int]  # graphs looked at to find it, by the stage that rejected them


@dataclass
class Study:
    """Ask for candidates in order, tell their scores in any order."""

    evolution: Evolution = field(default_factory=Evolution)
    space: Space = EVONORM
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    scores: dict[int, tuple[float, ...] | None] = field(
        default_factory=dict[int, "tuple[float, ...] | None"]
    )

    def __post_init__(self) -> None:
        self.screen = Screen(self.space, self.evolution.series, self.evolution.full)

    @property
    def ready(self) -> bool:
        """Whether the next candidate can be asked for: all those are told that it depends on."""
        return all(n in self.scores for n in range(self._known()))

    def _known(self) -> int:
        return max(0, len(self.candidates) - self.evolution.lag + 1)

    def ask(self) -> Candidate:
        """The next candidate. Raises `NormcError` unless the study is `ready`."""
        if not self.ready:
            missing = next(n for n in range(self._known()) if n not in self.scores)
            raise NormcError(
                f"candidate {missing} is still to be told before the next is asked for"
            )
        number = len(self.candidates)
        chance = random.Random(f"{self.evolution.seed}:{number}")
        alive = self._ancestors(number, chance)
        before = Counter(self.screen.counts)
        for tries in range(MOST_TRIES):
            mutant = alive and tries < MOST_MUTANTS
            parent = self._winner(alive, chance) if mutant else None
            genome = self._proposed(parent, chance)
            found = self.screen(genome)
            if not found.rejected:
                counts = dict(self.screen.counts - before)
                text = formula(found.expr, self.space)
                made = Candidate(number, genome, text, parent, counts)
                self.candidates.append(made)
                return made
        raise NormcError(f"none of {MOST_TRIES} graphs in a row is a new layer: widen the space")

    def tell(self, number: int, scores: Sequence[float] | None) -> None:
        """The scores of a candidate, the larger the better; None if it was rejected or failed.

        A candidate whose scores are not all finite counts as failed.
        """
        if not 0 <= number < len(self.candidates):
            raise NormcError(f"candidate {number} was never asked for")
        if number in self.scores:
            raise NormcError(f"candidate {number} has been told already")
        sound = scores is not None and all(map(math.isfinite, scores))
        self.scores[number] = tuple(scores) if scores is not None and sound else None

    def replay(self, candidate: Candidate, scores: Sequence[float] | None, told: bool) -> None:
        """Take over what an earlier run has asked for, and told; in order."""
        self.screen.remember(self.screen.judge(candidate.genome))
        self.screen.counts.update(candidate.screened)
        self.candidates.append(candidate)
        if told:
            self.tell(candidate.number, scores)

    def _ancestors(self, number: int, chance: random.Random) -> list[int]:
        """The most recent individuals with scores, of which one is mutated; none: a random graph.

        This is settled once for a candidate: mutants are rejected more often than random graphs
        are, and would become rarer than `Evolution.fresh` says if each try were free to be either.
        """
        how = self.evolution
        if number < how.population or how.strategy == "random" or chance.random() < how.fresh:
            return []
        known = range(max(0, number - how.lag + 1))
        return [n for n in known if self.scores[n] is not None][-how.window :]

    def _winner(self, alive: Sequence[int], chance: random.Random) -> int:
        """The winner of a tournament."""
        how = self.evolution
        size = min(len(alive), max(how.fewest, round(how.tournament * len(alive))))
        players = sorted(chance.sample(alive, size))
        scores = [s for s in (self.scores[n] for n in players) if s is not None]
        if how.winner == "average":
            return max(zip(scores, players, strict=True), key=lambda one: sum(one[0]))[1]
        return players[chance.choice(front(scores))]

    def _proposed(self, parent: int | None, chance: random.Random) -> Genome:
        if parent is None:
            return draw(self.space, chance)
        genome = self.candidates[parent].genome
        for _ in range(self.evolution.mutations):
            genome = mutate(genome, self.space, chance)
        return genome
