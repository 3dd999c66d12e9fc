"""Worker: a process that evaluates candidates, or compiles for those that do, from the inside.

    begin    build what judges, try it, and take no more memory from there on than the limit
    work     from a formula to its outcome

Nothing here knows who started it: the processes of a pool, or those of a cluster's machines.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from normc.errors import NormcError
from normc.search.data import Images, load
from normc.search.evaluate import AFFINE, Evaluation, one_thread
from normc.search.objectives import Objective
from normc.search.outcome import Outcome
from normc.search.setting import Quality, Setting


@dataclass(frozen=True)
class Job:
    """Everything a worker needs but the candidates."""

    setting: Setting
    images: Images | None = None  # None: a worker loads those that the setting names
    objectives: tuple[Objective, ...] = ()

    def evaluation(self) -> Evaluation:
        """What judges candidates."""
        images = load(self.setting.data) if self.images is None else self.images
        return Evaluation(self.setting, images, self.objectives)

    def __reduce__(self) -> tuple[Any, ...]:
        # As tensors, images would go through shared memory, of which containers have little.
        images = self.images
        parts = {f.name: getattr(images, f.name) for f in fields(images)} if images else {}
        packed = {n: p.numpy() if isinstance(p, torch.Tensor) else p for n, p in parts.items()}
        return _unpacked, (self.setting, packed, self.objectives)


def _unpacked(setting: Setting, packed: dict[str, Any], objectives: tuple[Objective, ...]) -> Job:
    parts: Any = {n: torch.tensor(p) if hasattr(p, "dtype") else p for n, p in packed.items()}
    return Job(setting, Images(**parts) if parts else None, objectives)


class Unready(Exception):
    """A worker cannot evaluate anything, whatever the candidate."""


_ready: Callable[[str], Any] | str = "it has not begun"
"""What this process does with a text, or why it cannot."""


def begin(job: Job) -> None:
    """Make this process a worker."""
    _begin(lambda: tried(job.evaluation()))
    if job.setting.device == "cpu":  # a GPU's driver reserves far more addresses than memory
        limit_memory(job.setting.limits.mebibytes)


def work(text: str) -> Outcome:
    """The outcome for a formula."""
    return _ask(text)


def begin_preparing(job: Job) -> None:
    """Make this process one that compiles ahead of those that train."""
    from normc.search.ahead import Ahead

    _begin(lambda: Ahead.of(job.setting, job.evaluation().images))


def prepare(text: str) -> int:
    """Compile for the GPU what the evaluation of a formula will launch; for how many calls."""
    return _ask(text)


def tried(evaluation: Evaluation) -> Evaluation:
    """One that has judged a layer that cannot fail, in a step; raises `NormcError` if it does.

    What is imported and set up for that is on no candidate's time.
    """
    how, images = evaluation.setting, evaluation.images
    short = replace(
        how,
        architectures=how.architectures[:1],
        objectives=("accuracy",),
        recipe=replace(how.recipe, steps=1),
        quality=Quality(1, 0.0),
        stability=replace(how.stability, steps=min(1, how.stability.steps)),
    )
    few = replace(images, test=images.test[:1], test_classes=images.test_classes[:1])
    found = replace(evaluation, setting=short, images=few, objectives=())(AFFINE)
    if found.status in ("failed", "memory"):
        raise NormcError(found.reason)
    return evaluation


def _begin(make: Callable[[], Callable[[str], Any]]) -> None:
    global _ready
    threading.Thread(target=_follow, daemon=True).start()
    one_thread()
    try:
        _ready = make()
    except Exception as error:  # it is reported when something is asked for
        _ready = str(error)


def _ask(text: str) -> Any:
    if isinstance(_ready, str):
        raise Unready(_ready)
    return _ready(text)


def _follow() -> None:
    """End with the parent: when that is killed, nobody else ends a worker in an evaluation."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def limit_memory(mebibytes: int) -> None:
    """Let this process have so much more memory than it has; only where there is Linux's /proc."""
    sizes = Path("/proc/self/statm")
    if sys.platform != "linux" or not sizes.exists():
        return
    import resource

    pages = int(sizes.read_text().split()[0])
    wanted = pages * resource.getpagesize() + (mebibytes << 20)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
