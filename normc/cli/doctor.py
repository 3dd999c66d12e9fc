"""`normc doctor`: what works on this machine, tried rather than looked up."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from normc.cli.shell import NoColor, console

State = Literal["ok", "missing"]
FORMULA = "x*sigmoid(v*x)/group_std(x)*gamma + beta"


@dataclass(frozen=True)
class Row:
    """What was found in one place, and what a person could do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


def doctor(no_color: NoColor = False) -> None:
    """Try what normc needs on this machine.

    Exit status 0 unless the torch backend itself fails.
    """
    from rich.markup import escape
    from rich.table import Table

    screen = console(no_color)
    with screen.status("trying"):
        rows = examine()
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        mark = "[green]ok[/green]" if row.state == "ok" else "[yellow]missing[/yellow]"
        advice = f"\n[dim]{escape(row.advice)}[/dim]" if row.advice else ""
        table.add_row(row.name, mark, escape(row.found) + advice)
    screen.print(table)
    if any(row.name == TORCH and row.state != "ok" for row in rows):
        raise typer.Exit(1)


def examine() -> list[Row]:
    """Every row, in order; a probe that raises is a row that says so."""
    return [_safely(name, probe, advice) for name, probe, advice in PROBES]


def _safely(name: str, probe: Callable[[], Row | str], advice: str) -> Row:
    """The row of a probe; one that raises is missing, with the advice."""
    try:
        found = probe()
    except Exception as error:  # whatever breaks here is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Row(name, "missing", lines[0], advice)
    return found if isinstance(found, Row) else Row(name, "ok", found)


# --- probes --------------------------------------------------------------------------------------


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}; the torch backend agrees with the oracle to {_run('torch'):.0e}"


def _c() -> str:
    from normc import config
    from normc.backends.c_compiler import compiler_version

    version = compiler_version().splitlines()[0]
    with config.override(cache=False):  # really compiles
        began = time.perf_counter()
        error = _run("c")
    return f"{version}; compiled and ran in {time.perf_counter() - began:.2f} s, to {error:.0e}"


def _openmp() -> Row | str:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f"{threads} threads on {cores} processors"
    if threads == 1 and cores > 1:
        return Row("OpenMP", "ok", text, "torch.set_num_threads(n) or OMP_NUM_THREADS gives more")
    return text


def _triton() -> str:
    from importlib.metadata import version

    mode = "on" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "off"
    return (
        f"{version('triton')}; interpreter {mode} (TRITON_INTERPRET=1 runs kernels without a GPU)"
    )


def _aot() -> str:
    from normc.cli.stages import ARCH, Subject, ptx
    from normc.formula import parse

    began = time.perf_counter()
    lines = len(ptx(Subject(parse(FORMULA))).splitlines())
    return f"{ARCH}, {lines} lines of PTX in {time.perf_counter() - began:.1f} s"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees none")
    found = torch.cuda.get_device_properties(0)
    return (
        f"{found.name}, {found.total_memory / 2**30:.0f} GiB; Triton agrees to {_run('triton'):.0e}"
    )


def _cache() -> str:
    from normc.backends import cache
    from normc.schedule.cost import show_bytes

    folder = cache.directory()
    with tempfile.TemporaryFile(dir=folder):
        pass  # writable
    entries = [f for f in folder.iterdir() if len(f.name) == 64]
    size = show_bytes(sum(_size(f) for entry in entries for f in entry.glob("*")))
    mode = f"mode {folder.stat().st_mode & 0o777:o}"
    return f"{_short(folder)}, {mode}, {len(entries)} entries, {size}"


def _size(path: Path) -> int:
    """The bytes of a file; none of one that another process has just removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _short(path: Path) -> str:
    """A path with the home folder as ~."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _run(backend: str) -> float:
    """The worst error of one small case in float32; raises where it is out of tolerance."""
    from normc.analysis.agreement import cases, compare

    (case,) = cases(seed=0, count=1, ranks=[4], dtypes=["float32"])
    errors = compare(FORMULA, case, backend)
    wrong = [e.tensor for e in errors if not e.ok]
    if wrong:
        raise RuntimeError(f"runs, but {', '.join(wrong)} is wrong")
    return max(e.error for e in errors)


TORCH = "torch"
PROBES: tuple[tuple[str, Callable[[], Row | str], str], ...] = (
    ("Python", _python, ""),
    (TORCH, _torch, "nothing works without it: reinstall torch"),
    ("C compiler", _c, "install gcc or clang, or set CC; until then the CPU runs plain torch"),
    ("OpenMP", _openmp, "kernels run on one thread"),
    ("Triton", _triton, "pip install triton (Linux); needed for GPUs only"),
    ("Triton ahead of time", _aot, "needs the ptxas that comes with triton"),
    ("GPU", _gpu, "not needed: the C backend serves the CPU"),
    ("cache", _cache, "set NORMC_CACHE_DIR to a folder of your own, or NORMC_CACHE=0"),
)
"""Name, probe, and the advice where the probe fails."""
