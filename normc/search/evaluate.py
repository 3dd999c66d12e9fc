"""Evaluate: what a worker does with a candidate, from its text to its scores.

    networks      built with the layer, weights from the seed
    quality       each trained for the first steps and judged; below the threshold ends it
    stability     each of the first few, made anew, moved to where gradients are largest
    training      each trained to the end: the first steps are those of quality
    objectives    scores

Everything runs on one thread, and follows from text and setting alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from normc.errors import NormcError
from normc.formula import Formula, parse
from normc.ops.layer import Layer
from normc.ops.op import Op
from normc.ops.target import choose
from normc.search.data import Images
from normc.search.nets import Layers, build
from normc.search.objectives import Objective, Trained, expand
from normc.search.outcome import Outcome, Status
from normc.search.setting import Setting
from normc.search.stability import worst_norm
from normc.search.training import Training

AFFINE = "x*gamma + beta"
"""What stands where a network has a norm without activation."""


PROBE = "x/group_std(x)*gamma + beta"
"""A layer on which a setting is tried before anything is searched."""


class Rejected(Exception):
    """A candidate does not go on; with the stage, and why."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


@dataclass
class Evaluation:
    """Judges layers, one after the other, under one setting."""

    setting: Setting
    images: Images
    objectives: Sequence[Objective] = ()  # those of the setting that are Python objects
    make: type[nn.Module] = Layer  # what turns a formula into a module

    def __post_init__(self) -> None:
        self.measures = expand(self.setting, self.objectives)
        self.affine = parse(AFFINE)

    def __call__(self, text: str) -> Outcome:
        """The outcome for a formula; errors are outcomes too."""
        began = time.perf_counter()
        measures: dict[str, float] = {}
        try:
            found = Outcome("ok", scores=self._scores(parse(text), measures))
        except Rejected as rejected:
            found = Outcome(rejected.status, str(rejected))
        except Exception as error:  # of any kind: one candidate's error is not the run's end
            found = failure(error)
        return replace(found, measures=measures, seconds=time.perf_counter() - began)

    def _scores(self, formula: Formula, measures: dict[str, float]) -> tuple[float, ...]:
        """All stages, in order."""
        how = self.setting
        trainings: dict[str, Training] = {}
        for name in how.architectures:
            quick = not trainings and self._tapes()
            trainings[name] = self._training(name, formula, "tape" if quick else how.backend)
            measures[f"quality {name}"] = self._quality(name, trainings[name])
            if quick:
                compiled(trainings[name].net, how.backend)
        for name in how.architectures[: how.stability.networks]:
            if how.stability.steps:
                measures[f"gradient {name}"] = self._stable(name, formula)
        accuracies: dict[str, float] = {}
        for name, training in trainings.items():
            if not training.advance(how.recipe.steps):
                raise Rejected("diverged", _infinite(name, training))
            accuracies[name] = training.accuracy()
        trained = Trained(formula, how, {n: t.net for n, t in trainings.items()}, accuracies)
        return self._measured(trained)

    def probe(self) -> None:
        """Make every network and run it once; raises what that raises, whatever the candidate."""
        for name in self.setting.architectures:
            training = self._training(name, parse(PROBE), self.setting.backend)
            training.net(training.batch(2)[0])

    def _tapes(self) -> bool:
        """Whether the first network begins on a tape, which no compiler has to make: most
        candidates end there, and a compiler would take as long as their training."""
        how = self.setting
        chosen = self.make is Layer and how.device == "cpu" and how.backend == "auto"
        return chosen and choose("auto", "float32", "cpu") == "c"

    def _training(self, name: str, formula: Formula, backend: str) -> Training:
        how = self.setting
        net = self._net(name, formula, backend)
        return Training(net, self.images, how.recipe, how.evolution.seed, how.device)

    def _net(self, name: str, formula: Formula, backend: str) -> nn.Module:
        how = self.setting
        options = {"groups": how.groups, "eps": how.eps, "backend": backend}

        def layer(channels: int) -> nn.Module:
            return self.make(formula, channels, **options)

        def affine(channels: int) -> nn.Module:
            return self.make(self.affine, channels, **options)

        shape = self.images.classes, self.images.channels
        return build(name, Layers(layer, affine), how.scale, *shape, seed=how.evolution.seed)

    def _quality(self, name: str, training: Training) -> float:
        how = self.setting.quality
        if not training.advance(how.steps):
            raise Rejected("quality", _infinite(name, training))
        found, least = training.accuracy(), how.chance / self.images.classes
        if found < least:
            raise Rejected(
                "quality", f"{name} has {found:.3f} after {how.steps} steps, less than {least:.3f}"
            )
        return found

    def _stable(self, name: str, formula: Formula) -> float:
        how = self.setting.stability
        training = self._training(name, formula, self.setting.backend)
        images, classes = training.batch(how.batch)
        found = worst_norm(training.net, images, classes, how)
        if found > how.limit:
            raise Rejected("stability", f"gradients of {name} reach a norm of {found:.1e}")
        return found

    def _measured(self, trained: Trained) -> tuple[float, ...]:
        found: list[float] = []
        for objective in self.measures:
            score = float(objective.measure(trained))
            if not math.isfinite(score):
                raise Rejected("diverged", f"{objective.name} is {score}")
            found.append(score)
        return tuple(found)


def compiled(net: nn.Module, backend: str) -> None:
    """Let the layers of a network compute with another backend from now on."""
    for module in net.modules():
        if isinstance(module, Layer):
            module.op = Op(module.formula, backend)


def _infinite(name: str, training: Training) -> str:
    return f"the loss of {name} is not finite at step {training.done}"


def failure(error: BaseException) -> Outcome:
    """The outcome that an error is: memory that is not there, or a failure with its message."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:500]
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
    lacking = lacking or "can't allocate memory" in str(error)
    return Outcome("memory" if lacking else "failed", reason)


def one_thread() -> None:
    """Let this process compute on one thread, and nothing else than the results depend on."""
    torch.set_num_threads(1)


def check(setting: Setting, objectives: Sequence[Objective]) -> None:
    """Raise `NormcError` for what would fail for every candidate."""
    from normc.search.nets import ARCHITECTURES

    expand(setting, objectives)
    for name in setting.architectures:
        if name not in ARCHITECTURES:
            raise NormcError(
                f"no architecture is called `{name}`: there are {', '.join(ARCHITECTURES)}"
            )
    images = torch.zeros(2, 1, 16, 16)
    pair = Images.of(images, torch.zeros(2), images, torch.zeros(2), 2)
    evaluation = Evaluation(setting, pair, objectives)
    try:
        evaluation.probe()
    except Exception as error:
        raise NormcError(f"no network can be trained under this setting: {error}") from error
