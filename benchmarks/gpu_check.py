"""GPU check: the zoo and random formulas on the device, against the oracle in float64 on the CPU.

Every case is judged by `normc.analysis.agreement`, with the schedule of every kernel left to normc
and forced to each in turn, and run ten times, over memory filled with other numbers each time: all
results have to be the same bits. Where an error is too large, the case is drawn once more with
other numbers: what passes then is a value within rounding of a kink, and listed as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_pool import Answer, Task
from normc.analysis.agreement import LAYOUTS, Case, Error, compare, draw, gradients
from normc.backends import triton
from normc.backends.tiling import SCHEDULES
from normc.formula import Formula, parse, zoo
from normc.ops import call as calls
from normc.ops import op

USUAL = "usual"
DTYPES = ("float32", "bfloat16", "float16")
CHECKED = ("channels-first", "channels-last", "tokens")
_LAYOUTS = {layout.name: layout for layout in LAYOUTS}

Sizes = dict[str, tuple[tuple[int, ...], int]]
"""By layout: a shape and a number of groups."""

SMALL: Sizes = {
    "channels-first": ((3, 12, 5, 7), 3),
    "channels-last": ((3, 12, 5, 7), 3),
    "tokens": ((3, 9, 24), 3),
}
LARGE: Sizes = {  # groups of more than a program holds
    "channels-first": ((4, 64, 37, 29), 2),
    "channels-last": ((4, 64, 37, 29), 2),
    "tokens": ((4, 67, 1024), 4),
}
TINY: Sizes = {  # for the interpreter
    "channels-first": ((2, 6, 3, 2), 3),
    "channels-last": ((2, 6, 3, 2), 3),
    "tokens": ((2, 3, 6), 3),
}


@dataclass(frozen=True)
class Check:
    """One case of one formula."""

    formula: str  # text, or a name in the zoo
    layout: str
    shape: tuple[int, ...]
    groups: int
    dtype: str
    schedule: str = USUAL
    seed: int = 1
    repeats: int = 10
    kind: str = "check"

    @property
    def parsed(self) -> Formula:
        """The formula."""
        return zoo[self.formula] if self.formula in zoo else parse(self.formula)

    @property
    def eps(self) -> float:
        """The zoo's epsilon."""
        return self.parsed.eps

    @property
    def case(self) -> Case:
        """The tensors."""
        return Case(_LAYOUTS[self.layout], self.shape, self.groups, self.dtype, self.seed)

    @property
    def group(self) -> str:
        """Where it is counted: ``zoo, cluster``."""
        return f"{'zoo' if self.formula in zoo else 'random'}, {self.schedule}"


# --- which ---------------------------------------------------------------------------------------


def plan(
    names: Sequence[str],
    texts: Sequence[str],
    *,
    small: Sizes = SMALL,
    large: Sizes = LARGE,
    repeats: int = 10,
) -> Iterator[Check]:
    """All checks, the most important first: names of the zoo, then random formulas."""
    combos = list(product(CHECKED, DTYPES))
    # Three of the nine that have every layout and every dtype once.
    diagonal = [(layout, DTYPES[i]) for i, layout in enumerate(CHECKED)]

    def some(
        formulas: Iterable[str],
        sizes: Sizes,
        how: Sequence[tuple[str, str]],
        schedules: Sequence[str],
    ) -> Iterator[Check]:
        for schedule, (layout, dtype), formula in product(schedules, how, formulas):
            shape, groups = sizes[layout]
            yield Check(formula, layout, shape, groups, dtype, schedule, repeats=repeats)

    def turning(schedules: Sequence[str]) -> Iterator[Check]:
        """Random formulas, each with another layout and dtype."""
        for turn, schedule in enumerate(schedules):
            for i, text in enumerate(texts):
                layout, dtype = combos[(i + 2 * turn) % len(combos)]
                yield from some([text], small, [(layout, dtype)], [schedule])

    yield from some(names, large, combos, [USUAL])
    yield from turning([USUAL])
    yield from some(names, large, diagonal, SCHEDULES)
    yield from some(names, small, combos, [USUAL])
    yield from turning([schedule for schedule in (USUAL, *SCHEDULES) if schedule != USUAL])
    rest = [combo for combo in combos if combo not in diagonal]
    yield from some(names, large, rest, SCHEDULES)
    yield from some(names, small, combos, SCHEDULES)


# --- how -----------------------------------------------------------------------------------------


def check(task: Task) -> Answer:
    """Judge one case, in a worker; the errors of each tensor, and what is wrong."""
    known = {key: tuple(v) if isinstance(v, list) else v for key, v in task.items()}
    return judge(Check(**known))


def judge(each: Check) -> Answer:
    """The worst error, those out of tolerance, results that differ between runs."""
    calls.built.cache_clear()  # kernels made under another schedule would be found again
    launched = _launched()
    launched.clear()
    with forced(each.schedule):
        errors = _errors(each)
        bad = [e for e in errors if not e.ok]
        other = replace(each, seed=each.seed + 1000)
        kink = bool(bad) and all(e.ok for e in _errors(other))
        differing = _differing(each)
    counted = [e for e in errors if e.rule == "tolerance" or not e.ok]
    worst = max(counted, key=lambda e: e.error, default=None)
    return {
        "worst": worst and _told(worst),  # of those that the formula's own noise does not excuse
        "excused": len(errors) - len(counted),
        "bad": [_told(e) for e in bad],
        "kink": kink,
        "differing": differing,
        "ran": sorted(set(launched) & set(SCHEDULES)),
    }


def _errors(each: Check) -> list[Error]:
    return compare(each.parsed, each.case, "triton", eps=each.eps)


def _told(error: Error) -> dict[str, Any]:
    return asdict(error) | {"limit": error.limit, "rule": error.rule}


def forced(schedule: str) -> AbstractContextManager[object]:
    """Ops made and called inside use this schedule wherever a kernel can take it."""
    return nullcontext() if schedule == USUAL else triton.forced(schedule)


def _differing(each: Check) -> list[str]:
    """The tensors that are not the same bits in every run."""
    given, cotangents = draw(each.parsed.definition, each.case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {name: t.to(device) for name, t in given.items()}
    ends = [t.to(device) for t in cotangents]
    how = {"groups": each.groups, "eps": each.eps, "channel_dim": each.case.layout.channel_dim}
    ours = op.compile(each.parsed, "triton")
    first: dict[str, Tensor] = {}
    differing: set[str] = set()
    for turn in range(each.repeats):
        poison(tensors["x"], turn)
        found = gradients(lambda **t: ours(**t, **how), tensors, ends)
        first = first or found
        differing |= {
            name for name in found if not torch.equal(_bits(first[name]), _bits(found[name]))
        }
    return sorted(differing)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def poison(like: Tensor, turn: int) -> None:
    """Leave numbers that nobody should read in the memory that is handed out next."""
    value = (float("nan"), 3.0, -1e4)[turn % 3]
    rooms = [torch.full_like(like, value, dtype=dtype) for dtype in (like.dtype, torch.float32)]
    del rooms


@lru_cache(maxsize=1)
def _launched() -> list[str]:
    """The schedules of all kernels that are made ready from now on."""
    found: list[str] = []
    for name in ("_Driver", "_Interpreter"):
        machinery = getattr(triton, name, None)
        if machinery is not None:  # else nobody tells, and all else is checked as well
            machinery.settle = _told_to(found, machinery.settle)
    return found


def _told_to(found: list[str], settle: Callable[..., Any]) -> Callable[..., Any]:
    def settled(*given: Any) -> Any:
        made = settle(*given)
        found.extend(launch.schedule for launch, _ in made)
        return made

    return settled
