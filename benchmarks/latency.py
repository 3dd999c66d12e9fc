"""How long a formula takes to compile: ``python -m benchmarks.latency``, from the root.

Forward and backward are compiled for a GPU that is not there, in a process that has compiled before
but keeps nothing: every kernel goes through all of Triton's stages, which Triton's own listener
times. In turns with that, the legality check of the same formula, and torch.compile of the same
formula as plain torch code, which on this machine compiles for the CPU. `benchmarks.latency_page`
prints the page.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import triton
import typer

from benchmarks.formulas import stored
from benchmarks.latency_page import DATA, page, table
from normc import config, pipeline
from normc.analysis import providers
from normc.analysis.agreement import Case, Layout, draw
from normc.analysis.contest import Entrant
from normc.analysis.machine import environment
from normc.analysis.timing import order
from normc.backends import triton as backend
from normc.errors import NormcError
from normc.formula import Formula, zoo
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.ops.target import target_ahead
from normc.schedule.schedule import CHANNELS_FIRST

LAYERS = (
    *("batch_norm", "layer_norm", "layer_norm_tokens", "group_norm", "instance_norm", "bn_relu"),
    *("gn_silu", "rms_norm", "add_rms_norm", "ada_layer_norm", "grn", "dyt", "frn_tlu"),
    *("evonorm_b0", "evonorm_s0", "switchable_norm"),
)
RANDOM = 12
"""How many of the random formulas of benchmarks/formulas.txt, spread evenly over the file."""

STAGES = {"ttir": "ast", "ttgir": "ttgir", "llir": "llvm", "ptx": "llvm", "cubin": "ptxas"}
"""What each of Triton's stages is counted as; making its first IR from Python counts as ast."""

OURS, LEGAL, TORCH = "ours", "legal", "torch"


@dataclass(frozen=True)
class Setting:
    """What everything is compiled for."""

    target: str = "sm_90"
    dtype: str = "float32"
    shape: tuple[int, ...] = (32, 256, 28, 28)

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.shape)


def candidates() -> list[Formula]:
    """Layers of the zoo, and random formulas."""
    every = stored()
    texts = every[:: max(1, len(every) // RANDOM)][:RANDOM]
    return [zoo[name] for name in LAYERS] + [
        Formula(text, f"random {i}") for i, text in enumerate(texts, 1)
    ]


# --- measured ------------------------------------------------------------------------------------


@contextmanager
def nothing_kept() -> Generator[None, None, None]:
    """Folders of their own for what is cached on disk, and no formula derived before."""
    pipeline.programs.cache_clear()
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as room, config.override(cache_dir=f"{room}/normc"):
        os.environ["TRITON_CACHE_DIR"] = f"{room}/triton"
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


@contextmanager
def heard() -> Generator[Counter[str], None, None]:
    """The milliseconds of Triton's stages, summed over kernels, and how many kernels there were."""
    total: Counter[str] = Counter()

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:  # compiled a moment ago, side by side with others
            return
        total["compiled"] += 1
        total["ast"] += times.ir_initialization / 1e3
        for stage, duration in times.lowering_stages:
            total[STAGES[stage]] += duration / 1e3

    triton.knobs.compilation.listener = listen
    try:
        yield total
    finally:
        triton.knobs.compilation.listener = None


def ours(formula: Formula, setting: Setting) -> dict[str, float]:
    """Text to machine code, forward and backward: milliseconds in all, and by stage."""
    with nothing_kept(), heard() as stages:
        began = time.perf_counter()
        jobs = _jobs(formula, setting)
        planned = time.perf_counter()
        kernels = sum(map(len, backend.compile_all(jobs, setting.target, setting.geometry)))
        ended = time.perf_counter()
    found = {"total": 1e3 * (ended - began), "front": 1e3 * (planned - began)}
    rest = found["total"] - found["front"] - sum(stages[s] for s in set(STAGES.values()))
    # Kernels that are compiled at the same time take longer together than the whole.
    return {**found, **stages, "rest": max(0.0, rest), "kernels": kernels}


def _jobs(formula: Formula, setting: Setting) -> list[Any]:
    """From the text on: parse, derive, schedule."""
    f = Formula(formula.text, formula.label, formula.entry)
    geometry, dtype = setting.geometry, setting.dtype
    return all_jobs(f, target_ahead(f, "triton", dtype, geometry, CHANNELS_FIRST))


def legal(formula: Formula, setting: Setting) -> dict[str, float]:
    """Whether Triton accepts the kernels: milliseconds, the text's way to a plan left out."""
    check: Callable[..., None] | None = getattr(backend, "legal", None)
    if check is None:
        raise NormcError("the Triton backend has no legality check")
    with nothing_kept():
        jobs = _jobs(formula, setting)
        return {"total": 1e3 * _timed(lambda: [
            check(job, setting.target, setting.geometry) for job in jobs
        ])}  # fmt: skip


def inductor(formula: Formula, setting: Setting) -> dict[str, float]:
    """torch.compile of the formula: milliseconds of the first call that the second does not take.

    A call is forward and backward with every gradient.
    """
    layout = Layout("contiguous", len(setting.shape), 1)
    case = Case(layout, setting.shape, setting.geometry.g, setting.dtype, seed=0)
    eps = formula.eps
    given, cotangents = draw(formula.definition, case)
    call = providers.eager(formula, case, eps)
    with _forgetful_torch():
        both = Entrant(TORCH, providers.compiled(call), given, cotangents).both()
        first, second = _timed(both), _timed(both)
    return {"total": 1e3 * (first - second)}


@contextmanager
def _forgetful_torch() -> Generator[None, None, None]:
    """torch.compile without anything it keeps, on disk or in the process."""
    import torch._dynamo
    import torch._inductor.config
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    settings = torch._inductor.config.patch(force_disable_caches=True)
    with warnings.catch_warnings(), fresh_cache(), settings:
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        yield


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


MEASURES = {OURS: ours, LEGAL: legal, TORCH: inductor}


# --- the run -------------------------------------------------------------------------------------


def measure(
    formulas: Sequence[Formula], who: Sequence[str], rounds: int, setting: Setting
) -> list[dict[str, Any]]:
    """An entry per formula: the median over the rounds, in which all take turns."""
    for name in who:  # what is done once in a process is not counted
        MEASURES[name](zoo["pixel_norm"], setting)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    notes: dict[str, str] = {}
    for turn in range(rounds):
        for formula in formulas:
            for name in order(who, turn):
                try:
                    sample = MEASURES[name](formula, setting)
                except Exception as error:  # that something does not compile is a finding
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    notes[formula.label] = f"{name}: {reason[:200]}"
                else:
                    found.setdefault(formula.label, {}).setdefault(name, []).append(sample)
            _say(turn, formula, found.get(formula.label, {}))
    return [_entry(f, found.get(f.label, {}), notes.get(f.label, "")) for f in formulas]


def _entry(
    formula: Formula, samples: dict[str, list[dict[str, float]]], note: str
) -> dict[str, Any]:
    """The medians of one formula; without what failed."""
    medians = {
        name: {key: round(median(s.get(key, 0) for s in every), 2) for key in every[0]}
        for name, every in samples.items()
    }
    return {"name": formula.label, "formula": formula.text, "note": note, **medians}


def _say(turn: int, formula: Formula, samples: dict[str, list[dict[str, float]]]) -> None:
    """A line per turn, so that one can watch."""
    last = [f"{name} {every[-1]['total']:.0f} ms" for name, every in samples.items()]
    print(f"{turn} {formula.label:18} {', '.join(last)}", file=sys.stderr)


def main(
    only: Annotated[str, typer.Option(help="Names with commas between; all if absent.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    target: Annotated[str, typer.Option(help="The GPU to compile for.")] = "sm_90",
    against: Annotated[bool, typer.Option(help="Measure torch.compile as well.")] = True,
    output: Annotated[Path, typer.Option(help="The JSON; the page goes beside it.")] = DATA,
) -> None:
    """Measure, print the table, and write the numbers and their page."""
    setting = Setting(target)
    every = {f.label: f for f in candidates()}
    chosen = [_named(every, name) for name in (only.split(",") if only else every)]
    who = [OURS, LEGAL, *([TORCH] if against else [])]
    entries = measure(chosen, who, rounds, setting)
    record = {
        "target": setting.target, "dtype": setting.dtype, "shape": list(setting.shape),
        "rounds": rounds, "triton": version("triton"),
        "environment": environment("system"), "candidates": entries,
    }  # fmt: skip
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(table(record))


def _named(every: dict[str, Formula], name: str) -> Formula:
    if name not in every:
        raise typer.BadParameter(f"no formula is called {name}: {', '.join(every)}")
    return every[name]


if __name__ == "__main__":
    typer.run(main)
