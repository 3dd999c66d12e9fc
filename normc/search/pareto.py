"""Pareto: which candidates no other one beats in every score; scores are to be large.

The sorting and the hypervolume are moocore's. A score that is not finite would win there, as
nothing is larger than NaN, so such a candidate is never on the front, and adds no volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from normc.errors import NormcError

Scores = Sequence[float]


def front(scores: Sequence[Scores]) -> list[int]:
    """The positions of those on the front, in order; of several that are equal, all.

    >>> front([(1, 2), (2, 1), (0, 0), (float("nan"), 9)])
    [0, 1]
    """
    sound = [i for i, s in enumerate(scores) if all(map(math.isfinite, s))]
    if not sound:
        return []
    np, moocore = _libraries()
    table = np.array([scores[i] for i in sound], dtype=float)
    kept = moocore.is_nondominated(table, maximise=True, keep_weakly=True)
    return [i for i, keep in zip(sound, kept, strict=True) if keep]


def hypervolume(scores: Sequence[Scores], reference: Scores) -> float:
    """The volume that the front dominates, above a reference point."""
    best = front(scores)
    if not best:
        return 0.0
    np, moocore = _libraries()
    table = np.array([scores[i] for i in best], dtype=float)
    return float(moocore.hypervolume(table, ref=np.array(reference, dtype=float), maximise=True))


def _libraries() -> tuple[Any, Any]:
    import numpy as np

    try:
        import moocore
    except ImportError:
        raise NormcError("a search needs moocore: pip install 'normc[search]'") from None
    return np, moocore
