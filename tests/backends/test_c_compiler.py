"""The C compiler: one unit for a formula, what it is told, and how often it is run."""

from __future__ import annotations

import ctypes
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import normc
from normc import config
from normc.backends import c_compiler, contract
from normc.formula import Formula
from normc.ops import call as calls
from normc.pipeline import Target, sources

TEXT = "x*sigmoid(x)/group_rms(x)*gamma"
NAMES = ("x", "v", "gamma", "beta")

pytestmark = pytest.mark.cpu


def forget() -> None:
    """Look for the compiler anew, and build anew."""
    for found in (
        *(c_compiler.compiler, c_compiler.compiler_version, c_compiler._choice, calls.built),
    ):
        found.cache_clear()


@pytest.fixture(autouse=True)
def root(tmp_path: Path) -> Iterator[Path]:
    with config.override(cache_dir=tmp_path / "cache", cache=True):
        forget()
        yield tmp_path / "cache"
    forget()


Wrapper = Callable[[str], Callable[[], list[str]]]


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    """``wrapper(lines)`` puts a script before the compiler and returns what it was called with."""

    def make(lines: str) -> Callable[[], list[str]]:
        log, script = tmp_path / "log", tmp_path / "cc"
        real = c_compiler.compiler()
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *--version*) exec {real} --version;; esac\n'
            f'echo "$*" >> {log}\n{lines}\nexec {real} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        forget()
        return lambda: log.read_text().splitlines() if log.exists() else []

    return make


def entries(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if len(path.name) == 64]


def step(op: normc.Op) -> torch.Tensor:
    """Forward and backward; the gradient of x."""
    x = torch.linspace(-2, 2, 2 * 8 * 9, dtype=torch.float64).reshape(2, 8, 3, 3).requires_grad_()
    given = {p.name: torch.ones((8,) if p.axes else (), dtype=torch.float64, requires_grad=True)
             for p in op.formula.params}  # fmt: skip
    op(x, groups=2, **given).square().sum().backward()
    assert x.grad is not None
    return x.grad


# --- one unit -------------------------------------------------------------------------------------


def test_forward_and_backward_are_one_run_of_the_compiler(root: Path, wrapper: Wrapper) -> None:
    runs = wrapper("")
    step(normc.compile(TEXT))
    assert len(runs()) == len(entries(root)) == 1


def test_what_is_compiled_is_what_is_shown(root: Path) -> None:
    op = normc.compile(TEXT)
    step(op)
    (entry,) = entries(root)
    assert (entry / "kernel.c").read_text() == op.source("c", "float64")


def test_a_unit_declares_things_once_and_keeps_every_heading() -> None:
    f = normc.zoo["evonorm_s0"]
    found = list(sources(f.definition, f.label, f.text, NAMES, Target("c", "float32")))
    text = contract.find("c").unit([job for job, _ in found], [source for _, source in found])
    for once in ("typedef float real;", "void put_("):
        assert text.count(once) == 1
    for job, source in found:
        heading = source.text[: source.text.index("*/")]
        function = source.text[source.text.index(f"\nvoid {job.entry}(") :]
        assert heading in text and function in text and heading.startswith(f"/* {job.entry}\n")


def test_one_source_is_a_unit_of_its_own() -> None:
    f = normc.zoo["layer_norm"]
    for job, source in sources(f.definition, f.label, f.text, ("x",), Target("c", "float64")):
        assert contract.find("c").unit([job], [source]) == source.text


# --- the cache ------------------------------------------------------------------------------------


def test_what_is_in_the_cache_needs_no_compiler(wrapper: Wrapper) -> None:
    runs = wrapper("")
    first = step(normc.compile(TEXT))
    calls.built.cache_clear()
    assert torch.equal(step(normc.compile(TEXT)), first) and len(runs()) == 1


def test_a_warm_hit_is_found_verified_and_loaded_in_two_milliseconds() -> None:
    text = normc.compile(TEXT).source("c")
    c_compiler.compiled(text, "warm")
    times: list[float] = []
    for _ in range(30):
        began = time.perf_counter()
        ctypes.CDLL(str(c_compiler.compiled(text, "warm")))
        times.append(time.perf_counter() - began)
    assert min(times) < 2e-3


# --- what compilers refuse ------------------------------------------------------------------------

REFUSE = 'for a in "$@"; do case "$a" in {}) echo "unknown $a" >&2; exit 1;; esac; done'


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        ("-fopenmp", {"-march=native", "-fopenmp-simd"}),
        ("-march=*", {"-fopenmp"}),
        ("-march=*|-mcpu=*|-fopenmp*", set[str]()),
    ],
)
def test_a_compiler_is_told_what_it_takes(
    wrapper: Wrapper, refused: str, told: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    want = step(normc.compile(TEXT, "torch"))
    runs = wrapper(REFUSE.format(refused))
    with config.override(debug=1):
        torch.testing.assert_close(step(normc.compile(TEXT)), want)
    asked = {f for f in c_compiler.flags() if f.startswith(("-march", "-mcpu", "-fopenmp"))}
    assert told <= asked and not {f for f in asked if re.fullmatch(refused.replace("*", ".*"), f)}
    assert ("no OpenMP" in capfd.readouterr().err) == ("-fopenmp" not in told)
    before = len(runs())
    forget()  # as a new process: the answer is in the cache
    step(normc.compile("x/group_rms(x)"))
    assert len(runs()) == before + 1


def test_a_text_that_is_wrong_is_refused(root: Path) -> None:
    before = c_compiler.flags()
    with pytest.raises(normc.BackendError, match=r"refused wrong:[\s\S]*error"):
        c_compiler.compiled("int x = ;", "wrong")
    assert c_compiler.flags() == before and not entries(root)


def test_a_compiler_that_takes_nothing_is_an_error(wrapper: Wrapper) -> None:
    wrapper("echo broken >&2; exit 1")
    with pytest.raises(normc.BackendError, match="broken"):
        step(normc.compile(TEXT))


def test_without_a_compiler_there_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_compiler, "compiler", lambda: None)
    with pytest.raises(normc.BackendError, match="install gcc or clang"):
        c_compiler.compiled("int x;", "x")


# --- other compilers ------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("clang"), reason="there is no clang")
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "grn", "derf", "layer_norm_tokens"])
def test_clang_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f: Formula = normc.zoo[name]
    want = step(normc.compile(f))
    monkeypatch.setenv("CC", "clang")
    forget()
    assert "clang" in c_compiler.compiler_version()
    torch.testing.assert_close(step(normc.compile(f)), want)


def test_the_key_says_what_compiled_it_and_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {c_compiler.key("text"), c_compiler.key("other")}
    for name, found in (("machine", "another"), ("compiler_version", "cc 1"), ("flags", ("-O9",))):
        with monkeypatch.context() as patch:
            patch.setattr(c_compiler, name, lambda found=found: found)
            keys.add(c_compiler.key("text"))
    assert len(keys) == 5
