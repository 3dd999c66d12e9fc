"""compile_many: right values, errors beside ops, and nothing left to compile at the first call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normc
from normc import config
from normc.backends import c_compiler, cache
from normc.errors import FormulaError
from normc.ops import call as calls
from normc.ops import setting, target

TEXTS = [
    "x*sigmoid(v*x)/group_std(x)*gamma + beta",
    "x/channel_rms(x)*gamma",
    "input residual; param a = 0.5; a*tanh(x) + residual/max(1, batch_std(residual))",
    "x/instance_absmax(x), x*channel_mean(x)",
]

pytestmark = pytest.mark.cpu


def forget() -> None:
    for found in (
        *(c_compiler.compiler, c_compiler.compiler_version, c_compiler._choice),
        *(calls.built, target._why_not),
    ):
        found.cache_clear()


@pytest.fixture(autouse=True)
def root(tmp_path: Path) -> Iterator[Path]:
    with config.override(cache_dir=tmp_path / "cache", cache=True):
        forget()
        yield tmp_path / "cache"
    forget()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a compiler was run; one that meets ``atan`` refuses."""
    log, script, real = tmp_path / "log", tmp_path / "cc", c_compiler.compiler()
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {real} --version;; esac\necho run >> {log}\n'
        'for a in "$@"; do case "$a" in\n'
        '*.c) grep -q "^ . atan" "$a" && echo no >&2 && exit 1;;\n'
        f'esac; done\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    forget()
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


def tensors(f: normc.Formula, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors for a formula, each of which wants its gradient."""
    torch.manual_seed(0)
    sizes = {p.name: (8,) if p.axes else () for p in f.params}
    every = {"x": (3, 8, 5, 4), **{i.name: (3, 8, 5, 4) for i in f.inputs}, **sizes}
    return {n: torch.rand(s, dtype=dtype).add_(0.2).requires_grad_() for n, s in every.items()}


def step(run: Any, given: dict[str, torch.Tensor], **how: Any) -> list[torch.Tensor]:
    """The results and every gradient."""
    found = run(**given, **how)
    results = list(found) if isinstance(found, tuple) else [found]
    grads = torch.autograd.grad(sum(y.square().sum() for y in results), list(given.values()))
    return [*results, *grads]


def compiled(found: list[Any]) -> list[normc.Op]:
    assert all(isinstance(op, normc.Op) for op in found), found
    return found


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", ["full", "fast"])
def test_values_and_gradients_are_the_oracles(optimize: Any) -> None:
    for op in compiled(
        normc.compile_many(TEXTS, optimize=optimize, dtype=torch.float64, workers=2)
    ):
        given = tensors(op.formula, torch.float64)
        want = step(normc.reference(op.formula), given, groups=2)
        torch.testing.assert_close(step(op, given, groups=2), want)


def test_ops_come_in_order_and_formulas_will_do() -> None:
    every = [normc.zoo["rms_norm"], *TEXTS, normc.zoo["rms_norm"]]
    found = compiled(normc.compile_many(iter(every), optimize="fast"))
    assert [op.formula.text for op in found] == [f if isinstance(f, str) else f.text for f in every]
    assert normc.compile_many([]) == []


@pytest.mark.parametrize("optimize", ["full", "fast"])
def test_the_first_call_compiles_nothing(optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(normc.compile_many(TEXTS[:2], optimize=optimize))

    def never(*_: object) -> None:
        raise AssertionError("built at a call")

    monkeypatch.setattr(setting, "kernels", never)
    for op in found:
        given = tensors(op.formula)
        step(op, given, groups=2)
        with torch.no_grad():
            op(**given)
        op(**{name: t.detach().requires_grad_(name == "x") for name, t in given.items()})
        with pytest.raises(AssertionError, match="built at a call"):
            op(**{name: t.double() for name, t in given.items()})


def test_channels_last_and_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (op,) = compiled(normc.compile_many(TEXTS[1:2], channel_dim=-1, gradients=False))
    x, gamma = torch.randn(3, 5, 8), torch.ones(8)
    want = normc.reference(TEXTS[1])(x, channel_dim=-1, gamma=gamma)
    with monkeypatch.context() as patch:
        patch.setattr(setting, "kernels", None)
        torch.testing.assert_close(op(x, channel_dim=-1, gamma=gamma), want)
    op(x.requires_grad_(), channel_dim=-1, gamma=gamma).sum().backward()  # compiled now
    assert x.grad is not None


# --- how often the compiler runs ------------------------------------------------------------------


def test_a_batch_is_one_run_and_every_formula_has_its_entry(
    root: Path, runs: Callable[[], int]
) -> None:
    compiled(normc.compile_many([*TEXTS, *TEXTS], workers=1))
    assert runs() == 1
    entries = [path for path in root.iterdir() if len(path.name) == 64]
    assert len(entries) == len(TEXTS) and not list(root.glob("tmp-*"))
    assert all(cache.get(entry.name) for entry in entries)
    for text in TEXTS:
        step(normc.compile(text), tensors(normc.parse(text)))
    compiled(normc.compile_many(TEXTS))
    assert runs() == 1


def test_the_fast_setting_runs_a_compiler_once_in_all(runs: Callable[[], int]) -> None:
    from normc.backends import tape

    tape._machine.cache_clear()
    for text in TEXTS:
        (op,) = compiled(normc.compile_many([text], optimize="fast"))
        step(op, tensors(op.formula))
    assert runs() <= 1
    assert "backend='tape'" in repr(op)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", ["full", "fast"])
def test_a_wrong_formula_stands_beside_the_others(optimize: Any) -> None:
    first, wrong, last = normc.compile_many(["x", "x/grp_std(x)", "2*x"], optimize=optimize)
    assert isinstance(wrong, normc.CompileError) and wrong.formula == "x/grp_std(x)"
    assert isinstance(wrong.__cause__, FormulaError) and "group_std" in str(wrong)
    for op in compiled([first, last]):
        step(op, tensors(op.formula))


def test_what_the_compiler_refuses_fails_alone(runs: Callable[[], int]) -> None:
    texts = ["x + 1", "atan(x)", "x + 2", "x + 3"]
    found = normc.compile_many(texts, workers=1)
    wrong = found.pop(1)
    assert isinstance(wrong, normc.CompileError) and "refused" in str(wrong)
    for op, number in zip(compiled(found), (1, 2, 3), strict=True):
        x = torch.ones(2, 3, 4)
        assert torch.equal(op(x), x + number)


def test_what_is_no_error_of_the_users_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from normc.ops import many

    def fail(*_: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(many, "render", fail)
    (wrong,) = normc.compile_many(["x"])
    assert "internal: RecursionError: too deep" in str(wrong)


@pytest.mark.parametrize("how", [{"optimize": "faster"}, {"channel_dim": 2}])
def test_wrong_settings_are_an_error_of_the_whole(how: dict[str, Any]) -> None:
    with pytest.raises(normc.NormcError, match="expected"):
        normc.compile_many(["x"], **how)


@pytest.mark.parametrize("optimize", ["full", "fast"])
def test_without_a_compiler_torch_runs(optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_compiler, "compiler", lambda: None)
    for op in compiled(normc.compile_many(TEXTS, optimize=optimize)):
        given = tensors(op.formula)
        want = step(normc.reference(op.formula), given, groups=2)
        torch.testing.assert_close(step(op, given, groups=2), want, rtol=1e-3, atol=1e-3)


# --- many processes -------------------------------------------------------------------------------

PROCESSES = """
import os, sys
import torch
import normc
import normc.program.derive

shared = "x*sigmoid(v*x)/group_std(x)*gamma"

def work(number):
    torch.set_num_threads(1)
    own = f"x/instance_rms(x) + {number}*gamma"
    ops = [normc.compile(shared), *normc.compile_many([own, shared], workers=1)]
    for op in ops:
        x = torch.randn(2, 4, 6, dtype=torch.float32)
        given = {p.name: torch.rand(4, requires_grad=True) for p in op.formula.params}
        wanted = list(given.values())
        y, want = op(x, groups=2, **given), normc.reference(op.formula)(x, groups=2, **given)
        torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted),
                                   torch.autograd.grad(want.sum(), wanted), rtol=1e-3, atol=1e-3)

children = []
for number in range(16):
    child = os.fork()  # torch has started no threads yet
    if child == 0:
        try:
            work(number)
        except BaseException as error:
            print(number, error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(any(codes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sixteen_processes_share_one_cache_folder(root: Path, runs: Callable[[], int]) -> None:
    variables = {**os.environ, "NORMC_CACHE_DIR": str(root)}
    done = subprocess.run([sys.executable, "-c", PROCESSES], env=variables, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    entries = [path for path in root.iterdir() if len(path.name) == 64]
    # The shared formula once for gradients of parameters and once for all, and one of its own each.
    assert len(entries) == 18 and not list(root.glob("tmp-*"))
    assert all(cache.get(entry.name) for entry in entries)
    assert runs() <= 16 + 2 + 16  # a batch may find that another process has made a part of it
