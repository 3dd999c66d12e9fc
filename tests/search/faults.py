"""Faulty objectives, and a setting under which an evaluation takes a tenth of a second.

In a module of their own, as workers import it by its name. What an objective does depends on the
text of the layer, so that good and bad candidates can be mixed.
"""

import ctypes
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from normc.search.data import Images
from normc.search.engines import Local
from normc.search.evolve import Evolution
from normc.search.nets import Scale
from normc.search.objectives import Objective
from normc.search.setting import Limits, Quality, Recipe, Setting, Stability
from normc.search.worker import Job

GOOD = ("x*gamma + beta", "relu(x)*gamma + beta", "tanh(x)*gamma + beta", "abs(x)*gamma + beta")

BAD = {  # text: what becomes of it, and how that is put
    "x - 1": ("crash", "the worker died: SIGSEGV"),
    "x - 2": ("time", "took longer than 8 s"),
    "x - 3": ("memory", "RuntimeError: [enforce fail"),
    "x - 4": ("failed", "RuntimeError: on purpose"),
    "x - 5": ("diverged", "fault is nan"),
    "x - 6": ("crash", "the worker died: SIGKILL, perhaps as the system was out of memory"),
    "x - 7": ("crash", "the worker died: exit status 3"),
    "x - 8": ("failed", "SystemExit: 1"),
    "x - 9": ("memory", "MemoryError: no message"),
    "x -": ("failed", "FormulaError: the formula ends in the middle of an expression"),
}

MIXED = [text for i, bad in enumerate(BAD) for text in (GOOD[i % len(GOOD)], bad)]


def fault(trained):
    """What becomes of a layer, by its text; the good ones score."""
    ends = {
        "x - 1": lambda: ctypes.string_at(0),
        "x - 2": lambda: time.sleep(600),
        "x - 3": lambda: torch.zeros(1 << 32),
        "x - 4": _raised,
        "x - 6": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "x - 7": lambda: os._exit(3),
        "x - 8": lambda: sys.exit(1),
        "x - 9": lambda: bytearray(1 << 36),
    }
    text = trained.formula.text
    if text in ends:
        ends[text]()
    return math.nan if text == "x - 5" else float(len(text))


def _raised():
    raise RuntimeError("on purpose\nand at length")


def process(trained):
    """The process that evaluates, and a thousandth for each thread it computes on."""
    return os.getpid() + torch.get_num_threads() / 1000


def log(*words):
    """Write a line for the test to read."""
    with Path(os.environ["NORMC_TEST_LOG"]).open("a") as file:
        file.write(" ".join(map(str, (*words, time.time()))) + "\n")


def logged(trained):
    """Takes the seconds that a text `x - 5` says, and tells when it begins and ends."""
    text = trained.formula.text.replace(" ", "")
    log("train", text, os.getpid())
    time.sleep(float(text.partition("-")[2]))
    log("trained", text, os.getpid())
    return 0.0


def begin_preparing(job):
    """Stands for what a process begins with that compiles."""
    log("begin", job.setting.data, os.getpid())


def prepare(text):
    """Stands for compiling; it fails in three ways."""
    text = text.replace(" ", "")
    log("prepare", text, os.getpid())
    if text == "x-0.1":
        _raised()
    if text == "x-0.2":
        os._exit(1)
    time.sleep(600 if text == "x-0.3" else 0.3)
    log("prepared", text, os.getpid())


PATIENCE = 120.0
"""Seconds for the next outcome; of a busy machine, on which workers begin slowly."""

FAULT = Objective("fault", fault)
PROCESS = Objective("process", process)
LOGGED = Objective("logged", logged)


def images():
    """A few, at random."""
    x = torch.rand(72, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(72) % 4
    return Images.of(x[:48], classes[:48], x[48:], classes[48:])


def job(*objectives, data=None, **how):
    """A job whose evaluations take a tenth of a second, but for the objectives."""
    found = images() if data is None else None
    given = {
        "evolution": Evolution(lag=32),
        "data": data or "few",
        "architectures": ("resnet",),
        "scale": Scale(4, (1,)),
        "objectives": ("accuracy", *(o.name for o in objectives)),
        "recipe": Recipe(steps=2),
        "quality": Quality(steps=1, chance=0.0),
        "stability": Stability(steps=0),
        "limits": Limits(seconds=8.0, mebibytes=1024),
        "backend": "torch",
    }
    return Job(Setting(**{**given, **how}), found, objectives)


def outcomes(engine, texts):
    """The outcomes of some texts, in their order; each comes once."""
    for number, text in enumerate(texts):
        engine.submit(number, text)
    found = {}
    while len(found) < len(texts):
        some = engine.finished(PATIENCE)
        assert some, f"no outcome in {PATIENCE} s, after {len(found)}"
        for number, outcome in some:
            assert number not in found, f"candidate {number} came back twice"
            found[number] = outcome
    assert engine.finished(0.2) == []
    return [found[number] for number in range(len(texts))]


if __name__ == "__main__":  # a search that a test kills
    engine = Local(job(LOGGED, limits=Limits(seconds=600.0)), 1)
    engine.submit(0, "x - 500")
    engine.finished(600)
