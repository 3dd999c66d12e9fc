"""Tuning, with a stopwatch that says what a test wants: who wins, who is refused, who follows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import normc
from normc import config
from normc.backends import triton
from normc.backends.settle import MOST_TRIES
from normc.backends.tile_choice import candidates
from normc.backends.tiling import SCHEDULES
from normc.backends.tuned import preferred, show
from normc.ops import call as calls
from normc.ops import rehearsal, stopwatch, tune
from normc.ops.judge import Expected

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # in masked lanes
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6
]

TEXT = "x*sigmoid(v*x)/group_std(x)*gamma + beta"
Log = list[tuple[str, str, str]]  # part, kernel, schedule
SCHEDULES_TRIED = ("resident", "cluster", "streaming", "split")  # in the order in which they are


class Watch:
    """Times by the first word of a schedule that has one; all else takes longer."""

    def __init__(self, **planted: float) -> None:
        self.planted = planted
        self.timed: list[list[str]] = []

    def __call__(
        self, calls: Mapping[str, stopwatch.Thunk], device: torch.device
    ) -> dict[str, float]:
        assert device.type == "cpu"
        for call in calls.values():
            call()
        self.timed.append(list(calls))
        return {n: self.planted.get(n.split()[0], 50.0) + i for i, n in enumerate(calls)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; the interpreter follows the record, as a GPU does; few schedules, as it is
    slow."""
    monkeypatch.setattr(tune, "MOST_TRIES", 1)
    monkeypatch.setattr(triton, "backend", triton.TritonBackend(preferred(candidates)))
    calls.built.cache_clear()
    with config.override(cache_dir=tmp_path / "cache", cache=True, tune=True):
        yield tmp_path / "cache" / "tuned"
    calls.built.cache_clear()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is made ready to be launched, in order."""
    seen: Log = []
    before = triton.module_of

    def module_of(job: Any, schedule: Any) -> Any:
        kernel = schedule[0].form.kernel.name.rstrip("abc")  # those of a split have letters
        seen.append((job.part, kernel, show(schedule)))
        return before(job, schedule)

    monkeypatch.setattr(triton, "module_of", module_of)
    return seen


def watch(monkeypatch: pytest.MonkeyPatch, **planted: float) -> Watch:
    made = Watch(**planted)
    monkeypatch.setitem(stopwatch.TIMERS, "cpu", made)
    return made


def given(grad: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 3, 2, generator=chance).to(dtype)
    rest = {name: torch.rand(4, generator=chance) + 0.5 for name in ("v", "gamma", "beta")}
    return {name: t.requires_grad_(grad) for name, t in {"x": x, **rest}.items()}


def call(text: str = TEXT, grad: bool = False, **how: Any) -> torch.Tensor:
    """A call of a new op."""
    tensors = given(grad, **how)
    names = {"x", *(p.name for p in normc.parse(text).params)}
    y = normc.compile(text, "triton")(**{n: t for n, t in tensors.items() if n in names}, groups=2)
    if grad:
        y.sum().backward()
    return y.detach()


def fresh(text: str = TEXT, grad: bool = False, **how: Any) -> torch.Tensor:
    """A call as in a new process."""
    calls.built.cache_clear()
    return call(text, grad, **how)


def entries(folder: Path) -> list[Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["entries"]


def entry(folder: Path) -> Any:
    (found,) = entries(folder)
    return found


def reasons(found: Any, schedule: str) -> list[str]:
    alike = [t for t in found["others"] if t["schedule"] == schedule]
    return [t["refused"] for t in alike if "refused" in t]


# --- who wins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", SCHEDULES)
def test_the_fastest_is_launched_at_once_and_from_then_on(
    best: str, folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = normc.reference(TEXT)(**given(), groups=2)
    timer = watch(monkeypatch, **{best: 10.0})
    torch.testing.assert_close(call(), want)
    winner = show_of(entry(folder)["winner"])
    assert winner.startswith(best) and log[-1] == ("forward", "k0", winner)
    (timed,) = timer.timed
    assert {name.split()[0] for name in timed} == set(SCHEDULES)
    assert len(timed) == len(SCHEDULES)
    log.clear()
    torch.testing.assert_close(fresh(), want)
    with config.override(tune=False):
        torch.testing.assert_close(fresh(), want)
    assert log == [("forward", "k0", winner)] * 2 and len(timer.timed) == 1


def show_of(told: Any) -> str:
    """A schedule of a record as a line."""
    each = (
        " ".join([*(f"{name}={n}" for name, n in one["blocks"].items()), f"x {one['warps']} warps"])
        for one in told["launches"]
    )
    return f"{told['schedule']} {', '.join(each)}"


CHILD = """
import sys, torch, normc
from normc.backends import triton
from normc.backends.tile_choice import candidates
from normc.backends.tuned import preferred, show
triton.backend = triton.TritonBackend(preferred(candidates))
before = triton.module_of
def module_of(job, schedule):
    print(show(schedule))
    return before(job, schedule)
triton.module_of = module_of
x, ones = torch.ones(2, 4, 3, 2), torch.ones(4)
normc.compile(sys.argv[1], "triton")(x, groups=2, v=ones, gamma=ones, beta=ones)
"""


def test_a_new_process_follows_the_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, split=10.0)
    call()
    environment = {**os.environ, "NORMC_CACHE_DIR": str(folder.parent), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, TEXT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [show_of(entry(folder)["winner"])]


def test_forward_and_backward_are_tuned_kernel_by_kernel(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = watch(monkeypatch, streaming=10.0)
    tensors = given(True)
    y = normc.compile(TEXT, "triton")(**tensors, groups=2)
    assert {(e["part"], e["kernel"]) for e in entries(folder)} == {
        *(("forward", "k0"), ("backward", "k0"), ("backward", "k1"))
    }
    assert len(timer.timed) == 3
    log.clear()
    y.sum().backward()
    assert [(part, kernel, name.split()[0]) for part, kernel, name in log] == [
        *(("backward", "k0", "streaming"), ("backward", "k1", "streaming"))
    ]
    want = exact()
    for name, t in tensors.items():
        torch.testing.assert_close(t.grad, want[name], rtol=1e-4, atol=1e-5)


def exact() -> dict[str, torch.Tensor]:
    tensors = given(True)
    y = normc.reference(TEXT)(**tensors, groups=2)
    return dict(zip(tensors, torch.autograd.grad(y.sum(), list(tensors.values())), strict=True))


def test_the_other_kernels_are_launched_as_they_usually_are(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, split=10.0)
    call(grad=True)
    job = [(part, kernel, name) for part, kernel, name in log if part == "backward"]
    pairs = list(zip(job[::2], job[1::2], strict=True))
    assert all((a[1], b[1]) == ("k0", "k1") for a, b in pairs)
    changed_first = [b[2] for a, b in pairs[: len({a[2] for a, _ in pairs})]]
    assert len(set(changed_first)) == 1, "while k0 is on trial, k1 is as it was"
    settled = {a[2] for a, b in pairs if b[2] != changed_first[0]}
    assert len(settled) == 1 and min(settled).startswith("split"), "then k0 is as it was tuned"


def test_a_kind_that_is_known_is_not_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = watch(monkeypatch, streaming=10.0)
    call(grad=True)
    fresh(grad=True)
    assert len(timer.timed) == 3
    (path,) = folder.glob("*.json")
    data = json.loads(path.read_text())
    data["entries"] = [e for e in data["entries"] if (e["part"], e["kernel"]) != ("backward", "k1")]
    path.write_text(json.dumps(data))
    fresh(grad=True)
    assert len(timer.timed) == 4 and len(entries(folder)) == 3
    fresh(dtype=torch.bfloat16)
    assert len(timer.timed) == 5 and {e["dtype"] for e in entries(folder)} == {
        "float32",
        "bfloat16",
    }


def test_another_op_of_the_same_kind_follows_though_it_was_there_before(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    with config.override(tune=False):
        call()
    log.clear()
    watch(monkeypatch, streaming=10.0)
    call()
    assert [name.split()[0] for _, _, name in log] == [*SCHEDULES_TRIED, "streaming"]
    with config.override(tune=False):
        call()
    assert len(log) == len(SCHEDULES_TRIED) + 1, "what was made ready serves others"


def test_statistics_that_are_handed_out_are_judged_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "(x - batch_mean(x))/batch_std(x)*gamma + beta"
    plant(
        monkeypatch,
        "streaming",
        r"tl.store\((s\d)_now_ptr(.*), \1\b",
        r"tl.store(\1_now_ptr\2, 2*\1",
    )
    watch(monkeypatch, streaming=1.0, resident=10.0)
    layer = normc.Layer(text, 4, backend="triton")
    layer(given()["x"])
    (forward,) = (e for e in entries(folder) if e["part"] == "forward")
    assert forward["winner"]["schedule"] == "resident"
    refused = reasons(forward, "streaming")
    assert refused and all(re.match(r"s\d_now is off", why) for why in refused)
    want = torch.nn.BatchNorm2d(4)
    want(given()["x"])
    torch.testing.assert_close(layer.running_var, want.running_var)


# --- who is refused -------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, schedule: str, pattern: str, text: str) -> list[str]:
    """Print other kernels under a schedule."""
    before, changed = triton.printed, list[str]()

    def printed(job: Any, forms: Any) -> str:
        found = before(job, forms)
        if forms[0].schedule != schedule or not re.search(pattern, found):
            return found
        changed.append(job.part)
        return re.sub(pattern, text, found)

    monkeypatch.setattr(triton, "printed", printed)
    return changed


STORE = r"(tl\.store\(y_ptr.*), y_\b"
WRONG = {
    "a thousandth": (STORE, r"\1, 1.001*y_", "y is off by 1.0e-03, and 1.0e"),
    "no syntax": (r"\Z", r"(", "SyntaxError"),
    "no such name": (STORE, r"\1, z_", "NameError"),
    "not a number": (STORE, r"\1, y_*float('nan')", "y is off by inf"),
}


@pytest.mark.parametrize("pattern, text, reason", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_refused_however_fast(
    pattern: str, text: str, reason: str, folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not plant(monkeypatch, "streaming", pattern, text)
    timer = watch(monkeypatch, streaming=1.0, split=10.0)
    y = call()
    torch.testing.assert_close(y, normc.reference(TEXT)(**given(), groups=2))
    found = entry(folder)
    assert found["winner"]["schedule"] == "split" and log[-1][2].startswith("split")
    assert reasons(found, "streaming") and all(reason in w for w in reasons(found, "streaming"))
    assert not any(name.startswith("streaming") for name in timer.timed[0])
    assert not any("us" in t for t in found["others"] if t["schedule"] == "streaming")


def test_a_wrong_configuration_is_refused(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(*asked: Any) -> Any:
        """What is on chip is too little; the memory has held the right numbers before."""
        first, *rest = candidates(*asked)
        (whole,) = next(s for s in (first, *rest) if s[0].form.schedule == "resident")
        blocks = tuple((n, 4 if n == "BLOCK_S" else size) for n, size in whole.blocks)
        return [first, (replace(whole, blocks=blocks),), *rest]

    monkeypatch.setattr(triton, "backend", triton.TritonBackend(preferred(narrow)))
    watch(monkeypatch, resident=1.0)
    torch.testing.assert_close(call(), normc.reference(TEXT)(**given(), groups=2))
    found = entry(folder)
    assert found["winner"]["launches"][0]["blocks"]["BLOCK_S"] == 8
    assert all("y is off by inf" in why for why in reasons(found, "resident"))
    assert len(reasons(found, "resident")) == 1
    assert "BLOCK_S=8" in log[-1][2]


def test_a_wrong_statistic_shows_in_the_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = plant(monkeypatch, "streaming", r"(tl\.store\(s3_ptr.*), s3\b", r"\1, s3 + 1.0")
    watch(monkeypatch, streaming=1.0, split=10.0)
    call(grad=True)
    assert "forward" in changed
    (forward,) = (e for e in entries(folder) if e["part"] == "forward")
    assert forward["winner"]["schedule"] == "split"
    assert any("d_x is off" in why for why in reasons(forward, "streaming"))


def test_a_wrong_gradient_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = plant(monkeypatch, "split", r"(tl\.store\(d_x_ptr.*), d_x_\b", r"\1, 0.999*d_x_")
    watch(monkeypatch, split=1.0)
    call(grad=True)
    assert changed
    found = {(e["part"], e["kernel"]): e for e in entries(folder)}
    assert found["forward", "k0"]["winner"]["schedule"] == "split"
    assert found["backward", "k0"]["winner"]["schedule"] != "split"
    assert all("d_x is off" in why for why in reasons(found["backward", "k0"], "split"))


def test_what_differs_from_time_to_time_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the tolerance, but no result of normc depends on who comes first."""
    plant(monkeypatch, "streaming", r"(?s)\A(.*tl\.store\(y_ptr[^\n]*), y_\b",
          r"import itertools\nTURN = itertools.count()\n\1, y_ + 2e-7*next(TURN)")  # fmt: skip
    watch(monkeypatch, streaming=1.0, split=10.0)
    call()
    assert entry(folder)["winner"]["schedule"] == "split"
    assert all("y differs from one" in why for why in reasons(entry(folder), "streaming"))


def test_if_nothing_agrees_nothing_changes(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for schedule in SCHEDULES:
        plant(monkeypatch, schedule, STORE, r"\1, 1.001*y_")
    timer = watch(monkeypatch)
    with config.override(debug=1):
        call()
    assert entry(folder)["winner"] is None and not timer.timed
    assert "0 of 4 agree with the oracle" in capsys.readouterr().err
    assert log[-1] == log[0], "the first on offer, as without tuning"


# --- when nothing is measured ---------------------------------------------------------------------


def never(*_: object) -> Any:
    raise AssertionError("measured")


def test_only_who_asks_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stopwatch.TIMERS, "cpu", never)
    with config.override(tune=False):
        call()
    assert not folder.exists()
    for backend in ("c", "torch"):
        normc.compile(TEXT, backend)(**given(), groups=2)
    normc.compile(TEXT, "triton")(**{n: t[:0] if n == "x" else t for n, t in given().items()})
    with triton.forced("split"):
        call()
    layer = normc.Layer("x/batch_rms(x)", 4, backend="triton").eval()
    layer(given()["x"])  # with running statistics, of which the oracle knows nothing
    assert not folder.exists()
    with pytest.raises(AssertionError, match="measured"):
        call()


def test_without_a_stopwatch_nothing_is_measured(folder: Path) -> None:
    assert set(stopwatch.TIMERS) == {"cuda"}
    call()
    assert not folder.exists()


def test_no_room_for_the_oracle_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def expect(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(rehearsal, "expect", expect)
    watch(monkeypatch)
    with config.override(debug=1):
        torch.testing.assert_close(call(), normc.reference(TEXT)(**given(), groups=2))
    assert "is not tuned: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err
    assert not folder.exists()


def test_nothing_else_takes_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch)
    tensors, before = given(True), torch.get_rng_state()
    kept = {name: t.detach().clone() for name, t in tensors.items()}
    mode = torch.get_deterministic_debug_mode()
    normc.compile(TEXT, "triton")(**tensors, groups=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_deterministic_debug_mode() == mode
    assert all(torch.equal(t, kept[name]) and t.grad is None for name, t in tensors.items())


def test_without_a_cache_it_is_measured_for_this_process_alone(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = watch(monkeypatch, streaming=10.0)
    with config.override(cache=False):
        call("x/group_std(x)")
        assert log[-1][2].startswith("streaming")
        fresh("x/group_std(x)")
        assert log[-1][2].startswith("streaming") and len(timer.timed) == 1
    assert not folder.exists()


# --- what is said ---------------------------------------------------------------------------------


def test_one_line_per_kernel_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(monkeypatch, cluster=10.0)
    with config.override(debug=1):
        call(grad=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "tuned" in line]
    label = normc.parse(TEXT).label
    assert [line.split(": ")[1] for line in said] == [
        f"tuned {label}_{part}" for part in ("forward k0", "backward k0", "backward k1")
    ]
    assert all(re.search(r"cluster BLOCK.* us; \d of \d agree with the oracle; ", s) for s in said)
    assert all(re.search(r"the first on offer, \w+: \d+\.\d us$", line) for line in said)


def test_every_schedule_that_could_be_launched_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "MOST_TRIES", MOST_TRIES)
    from normc.backends.settle import _tries
    from normc.language.geometry import Geometry
    from normc.ops.explain import all_jobs
    from normc.pipeline import Target

    for name in ("evonorm_s0", "evonorm_b0", "layer_norm_tokens", "grn"):
        for job in all_jobs(normc.zoo[name], Target("triton", "float32")):
            for kernel in job.plan.kernels:
                geometry = Geometry.of((32, 256, 28, 28), 32)
                offered = candidates(job, kernel, geometry, triton.MACHINES["sm_90"])
                tried = [show(s) for s in tune.several(offered)]
                assert len(tried) == len(set(tried)) <= MOST_TRIES + 3
                usual = [show(s) for s in _tries(offered)][:MOST_TRIES]
                assert {*usual, *map(show, offered)} <= {*tried}


def test_a_verdict_needs_more_than_a_small_error() -> None:
    zeros, schedule = torch.zeros(1000), ()
    exact = {"y": torch.ones(1000).double(), "d_x": zeros.double()}
    scale, noise, few = dict.fromkeys(exact, 1.0), {"y": 0.0, "d_x": 1.0}, {"y": 0, "d_x": 2}
    expected = Expected(exact, scale, noise, few, 1e-5)

    def refused(y: torch.Tensor, d_x: torch.Tensor, again: torch.Tensor | None = None) -> str:
        found, other = {"y": y, "d_x": d_x}, {"y": y, "d_x": d_x if again is None else again}
        return tune._verdict(expected, found, other, schedule).refused

    def ones(many: int) -> torch.Tensor:
        return (torch.arange(1000) < many).float()

    assert not refused(ones(1000), zeros)
    assert not refused(ones(1000), ones(16)), "as rounding takes numbers across a kink"
    assert refused(ones(1000), ones(17)).startswith("17 of 1000 numbers of d_x are off")
    assert refused(ones(999), zeros).startswith("y is off by 1.0e+00, and 1.0e-05")
    assert refused(ones(1000), zeros, ones(1)) == "d_x differs from one time to the next"
    lost = Expected(exact, scale, {"y": 0.0, "d_x": float("inf")}, few, 1e-5)
    nan = {"y": ones(1000), "d_x": zeros / zeros}
    assert tune._verdict(lost, nan, nan, schedule).refused.startswith("d_x is off by inf")
    off = {"y": ones(1000), "d_x": ones(1)}
    assert tune._verdict(expected, off, off, schedule).tensor == "d_x"
