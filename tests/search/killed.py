"""A small search in a process of its own, which a test kills: ``python killed.py FOLDER COUNT``."""

import sys
from pathlib import Path

from normc.search import runs
from normc.search.evolve import Evolution
from normc.search.nets import Scale
from normc.search.setting import Quality, Recipe, Setting, Stability

TINY = Setting(
    evolution=Evolution(seed=3, population=6, lag=4),
    architectures=("resnet",),
    scale=Scale(4, (1,)),
    recipe=Recipe(steps=3, batch=8),
    quality=Quality(steps=1, chance=0.3),
    stability=Stability(steps=1, limit=1e4),
    backend="torch",
)
"""A search whose candidates take a few hundredths of a second, and meet different ends."""


def facts(archive):
    """All that has to be the same, however often a run was stopped; times are not."""
    rows = [(r.candidate, r.outcome and {**vars(r.outcome), "seconds": 0}) for r in archive.records]
    references = {n: {**vars(o), "seconds": 0} for n, o in archive.references.items()}
    return rows, references


def main(folder, count):
    begun = (Path(folder) / "search.sqlite").exists()
    if begun:
        runs.resume(folder, engine="inline", evaluations=count)
    else:
        runs.run(folder, TINY, engine="inline", evaluations=count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
