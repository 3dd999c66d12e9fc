"""Search: layers evolved from random graphs, judged by training small networks with them.

>>> from normc import search
>>> study = search.Study(search.Evolution(seed=1))
>>> study.ask().number
0
"""

from normc.search.archive import Archive, Record
from normc.search.data import Images, from_datasets
from normc.search.evolve import Candidate, Evolution, Study
from normc.search.nets import ARCHITECTURES, Scale
from normc.search.objectives import OBJECTIVES, Objective, Trained
from normc.search.outcome import Outcome
from normc.search.runs import Run, read, rerank, resume, run
from normc.search.setting import Limits, Quality, Recipe, Setting, Stability
from normc.search.space import EVONORM, Space

__all__ = [
    "ARCHITECTURES",
    "EVONORM",
    "OBJECTIVES",
    "Archive",
    "Candidate",
    "Evolution",
    "Images",
    "Limits",
    "Objective",
    "Outcome",
    "Quality",
    "Recipe",
    "Record",
    "Run",
    "Scale",
    "Setting",
    "Space",
    "Stability",
    "Study",
    "Trained",
    "from_datasets",
    "read",
    "rerank",
    "resume",
    "run",
]
