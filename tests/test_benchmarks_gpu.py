"""The GPU benchmark without a GPU: its rows, its budget, its workers, its clockwork with a device
made up here, its page from made-up numbers; and its checks, under Triton's interpreter."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import prod

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import formulas, gpu, gpu_check, gpu_peers, gpu_report, gpu_speed
from benchmarks.gpu_check import TINY, USUAL, Check
from benchmarks.gpu_pool import Budget, GoneError, StartError, Worker, plain, share_out
from benchmarks.gpu_record import HANGS, Record, Tally
from benchmarks.gpu_rows import BACKWARD, COMPILE, EAGER, FORWARD, LIGER, QUACK, ROWS
from benchmarks.gpu_timing import (
    LEAST,
    LONGEST,
    Contestant,
    host_times,
    race,
    reason,
    replays,
    summary,
)
from normc.analysis import contest
from normc.analysis.agreement import Case, Error
from normc.analysis.providers import OURS
from normc.backends.tiling import SCHEDULES
from normc.formula import parse, zoo

# --- rows ----------------------------------------------------------------------------------------

H200 = 4300  # GB/s

FLOORS = {  # microseconds, from the table of targets
    "T1/layer_norm": (124.9, 187.3),
    "T1/add_rms_norm": (249.7, 249.7),
    "T2/rms_norm": (62.4, 93.6),
    "T3/dyt": (11.7, 17.6),
    "T4/rms_norm": (124.9, 187.3),
    "C1/batch_norm_relu": (47.8, 71.7),
    "C1/evonorm_s0/last": (47.8, 71.7),
    "C2/group_norm_silu": (23.9, 35.8),
    "C3/frn_tlu": (6.0, 9.0),
    "C4/group_norm_silu/last": (9.8, 14.6),
    "C5/group_norm_silu": (124.9, 187.3),
    "GRN/grn": (47.8, 71.7),
    "X/searched": (47.8, 71.7),
    "K/instance_norm": (3496, 5244),
    "K/layer_norm": (124.9, 187.3),
    "K/batch_norm": (2997, 4994),
}
TARGETS = {  # microseconds, likewise: a floor over an efficiency
    "T1/layer_norm": (129, 203),
    "T3/layer_norm": (13.5, 22),
    "T4/layer_norm": (136, 220),
    "C1/evonorm_b0": (55, 90),
    "C1/instance_norm": (51, 81),
    "C1/frn_tlu/last": (60, 100),
    "C5/group_norm_silu": (150, 250),
    "K/group_norm": (3900, 6170),
}


@pytest.mark.parametrize("id", FLOORS)
def test_floors_are_those_of_the_table(id):
    floors = ROWS[id].floors(H200)
    assert tuple(floors.values()) == pytest.approx(FLOORS[id], rel=0.005, abs=0.05)


@pytest.mark.parametrize("id", TARGETS)
def test_targets_are_those_of_the_table(id):
    floors, aims = ROWS[id].floors(H200).values(), ROWS[id].aims
    found = [floor / aim for floor, aim in zip(floors, aims, strict=True)]
    assert found == pytest.approx(TARGETS[id], rel=0.025)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.id)
def test_a_row_is_whole(row):
    assert len(row.shape) == row.layout.rank
    assert row.case.geometry.channels % row.groups == 0
    moved = row.traffic()
    for name, times in zip((FORWARD, BACKWARD), row.moves, strict=True):
        assert times * row.bytes <= moved[name] < 1.1 * times * row.bytes + 2e5
    assert gpu_peers.peer(EAGER, row)
    assert set(row.beats) <= {COMPILE, EAGER, LIGER, QUACK}


def test_a_layer_norm_saves_two_numbers_per_row():
    row = ROWS["T1/layer_norm"]
    small = row.traffic()[FORWARD] - 2 * row.bytes
    assert small == 2 * 4 * 8 * 4096 + 2 * 2 * 4096  # float32 statistics, bfloat16 parameters


def test_the_most_important_rows_come_first():
    rows, names, texts = gpu.selected("")
    assert [row.rank for row in rows] == sorted(row.rank for row in ROWS.values())
    assert rows[0].id == "T1/layer_norm" and len(rows) == len(ROWS)
    assert len(names) == len(zoo) and len(texts) == formulas.COUNT


def test_rows_are_chosen_by_place_by_id_and_by_layer():
    assert {row.id.split("/")[0] for row in gpu.selected("T1")[0]} == {"T1"}
    rows, names, _ = gpu.selected("C1/evonorm_s0/last")
    assert [row.id for row in rows] == ["C1/evonorm_s0/last"] and names == ["evonorm_s0"]
    rows, names, texts = gpu.selected("searched")
    assert [row.id for row in rows] == ["X/searched", "X/searched/tokens"] and not names
    assert "group_std" in texts[0] and "channel_std" in texts[1]
    assert gpu.selected("scale_norm") == ([], ["scale_norm"], [])
    assert gpu.selected("nothing") == ([], [], [])


@pytest.mark.parametrize("row", [r for r in ROWS.values() if r.id[0] in "KX"], ids=lambda r: r.id)
def test_peers_are_the_same_layers(row):
    shape = {3: (2, 5, 64), 4: (2, 64, 6, 5)}[row.layout.rank]
    case = Case(row.layout, shape, row.groups, "float64", 1)
    given, cotangents, exact = contest.exactly(row.formula, case, row.eps)
    call = gpu_peers.peer(EAGER, row)
    contest.accuracy(call, given, cotangents, exact).require(row.id, "float64")


def test_a_library_that_is_missing_says_so():
    with pytest.raises(gpu_peers.MissingError, match="quack has no such layer"):
        gpu_peers.peer(QUACK, ROWS["C1/evonorm_s0"])
    with pytest.raises(gpu_peers.MissingError, match="liger_kernel cannot be imported"):
        gpu_peers.peer(LIGER, ROWS["T1/dyt"])


# --- formulas and the plan of checks --------------------------------------------------------------


def test_the_stored_formulas_are_different_ones():
    texts = formulas.stored()
    assert len(texts) == formulas.COUNT
    assert len({parse(text).digest for text in texts}) == formulas.COUNT


def test_the_plan_begins_with_the_zoo_and_ends_with_what_matters_least():
    checks = list(gpu_check.plan(["evonorm_s0", "grn"], ["x/layer_rms(x)"], repeats=3))
    first = checks[:18]
    assert {(c.formula, c.layout, c.dtype) for c in first} == {
        (name, layout, dtype)
        for name in ("evonorm_s0", "grn")
        for layout in gpu_check.CHECKED
        for dtype in gpu_check.DTYPES
    }
    assert {c.schedule for c in first} == {USUAL} and checks[18].formula == "x/layer_rms(x)"
    assert {c.schedule for c in checks} == {USUAL, *SCHEDULES}
    assert len(set(checks)) == len(checks)
    random = [c for c in checks if c.formula == "x/layer_rms(x)"]
    assert [c.schedule for c in random] == [USUAL, *SCHEDULES]
    assert {c.repeats for c in checks} == {3}
    for each in checks:
        assert each.case.geometry.channels % each.groups == 0


# --- checks --------------------------------------------------------------------------------------

interpreted = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def interpret(function):
    for mark in interpreted:
        function = mark(function)
    return function


@interpret
def test_the_zoo_and_random_formulas_are_checked(tmp_path):
    texts = [text for text in formulas.stored() if len(text) < 60][:2]
    checks = gpu_check.plan(["evonorm_s0", "layer_norm_tokens"], texts, small=TINY, large=TINY,
                            repeats=2)  # fmt: skip
    chosen = [c for c in checks if c.schedule == USUAL]
    tally = Tally([c for i, c in enumerate(chosen) if c.formula in texts or i % 7 == 0])
    record = Record(tmp_path / "gpu.json", Budget(600), started="now", minutes=10.0)
    gpu.check_here(record, tally)
    found = record.data["check"]
    assert found["done"] == found["planned"] >= 6 and not found["failures"]
    assert set(found["groups"]) == {"zoo, usual", "random, usual"}
    assert all(sum(each["ran"].values()) for each in found["groups"].values())
    assert float(found["worst"]["float32"]["error"]) < 1e-5
    assert "0 failed" in gpu_report.page(record.data)


@interpret
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_forced(schedule):
    each = Check("layer_norm_tokens", "tokens", (2, 3, 6), 1, "float32", schedule, repeats=2)
    answer = gpu_check.judge(each)
    assert schedule in answer["ran"]
    assert not answer["bad"] and not answer["differing"]


@interpret
def test_the_command_checks_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--part", "check", "--minutes", "0.05", "--only", "rms_norm"]
    done = CliRunner().invoke(gpu.app, [*given, "--out", str(out)])
    record = json.loads(out.read_text("utf-8"))
    assert record["finished"] and record["check"]["done"] >= 1
    assert sum(record["check"]["left_out"].values()) > 0  # the time was short
    assert "rms_norm" in out.with_suffix(".md").read_text("utf-8")
    assert done.exit_code == (1 if record["check"]["failed"] else 0)
    assert "checks:" in done.stdout


@interpret
def test_a_worker_checks(tmp_path):
    worker = Worker(gpu.COMMAND)
    try:
        each = Check("rms_norm", "tokens", (2, 3, 6), 1, "float32", repeats=2)
        answer = worker.ask(asdict(each), 120)
        assert not answer["bad"] and answer["ran"]
        assert "error" in worker.ask(asdict(replace(each, formula="x/")), 60)
    finally:
        worker.close()


EACH = Check("evonorm_s0", "channels-first", (2, 6, 3, 2), 3, "float32", repeats=2)


def wrong(seeds):
    """An oracle that finds fault with cases of these seeds."""
    return lambda formula, case, backend, eps: [
        Error("y", 1e-7, 0.0, 1e-5),
        Error("d_x", 0.5 if case.seed in seeds else 1e-7, 0.0, 1e-5),
    ]


@pytest.mark.cpu
@pytest.mark.parametrize("seeds, kink", [((1, 1001), False), ((1,), True), ((), False)])
def test_an_error_of_one_draw_alone_is_a_kink(monkeypatch, seeds, kink):
    monkeypatch.setattr(gpu_check, "compare", wrong(seeds))
    monkeypatch.setattr(gpu_check, "_differing", lambda each: [])
    answer = gpu_check.judge(EACH)
    assert [e["tensor"] for e in answer["bad"]] == (["d_x"] if seeds else [])
    assert answer["kink"] is kink
    tally = Tally([EACH])
    tally.take(asdict(EACH), plain(answer))
    assert tally.failed == (1 if seeds and not kink else 0)
    assert len(tally.kinks) == kink


@pytest.mark.cpu
def test_results_that_differ_between_runs_are_found(monkeypatch):
    from normc.ops import op

    turns = iter(range(9))

    class Drifting:
        def __init__(self, formula, backend):
            self.op = op.Op(formula, "torch")

        def __call__(self, x, **given):
            return self.op(x, **given) * (1 + (next(turns) == 1) * 1e-6)

    monkeypatch.setattr(gpu_check.op, "compile", Drifting)
    assert gpu_check._differing(EACH) == ["d_beta", "d_gamma", "d_v", "d_x", "y"]
    monkeypatch.setattr(gpu_check.op, "compile", lambda formula, backend: op.Op(formula, "torch"))
    assert gpu_check._differing(EACH) == []


def test_nan_is_the_same_bits_as_nan_and_zeros_have_a_sign():
    nan = torch.tensor([float("nan"), 1.0])
    assert torch.equal(gpu_check._bits(nan), gpu_check._bits(nan.clone()))
    zero = torch.zeros(2, 3).T
    assert not torch.equal(gpu_check._bits(zero), gpu_check._bits(-zero))


# --- the tally -----------------------------------------------------------------------------------


def fine(error=1e-7, ran=("resident",)):
    worst = {"tensor": "y", "error": error, "noise": 0.0, "tolerance": 1e-5, "limit": 1e-5}
    return {"worst": worst, "excused": 1, "bad": [], "kink": False, "differing": [],
            "ran": list(ran)}  # fmt: skip


def test_a_tally_counts_and_keeps_the_worst():
    checks = [replace(EACH, seed=seed) for seed in range(4)]
    tally = Tally(checks)
    tasks = list(tally.tasks())
    for task, answer in zip(tasks, [fine(1e-7), fine(3e-7), fine(2e-7)], strict=False):
        tally.take(task, answer)
    tally.take(tasks[3], fine() | {"differing": ["d_v"]})
    found = tally.record()
    assert (found["done"], found["failed"], found["excused_tensors"]) == (4, 1, 4)
    assert found["worst"]["float32"]["error"] == 3e-7
    group = found["groups"]["zoo, usual"]
    assert group == {"planned": 4, "done": 4, "passed": 3, "ran": {"resident": 4}}
    (failure,) = found["failures"]
    assert failure["why"] == "not the same bits each time: d_v"
    assert failure["formula"] == "evonorm_s0" and "float32" in failure["case"]
    assert found["left_out"] == {}


def test_a_schedule_that_hangs_is_given_up():
    checks = [replace(EACH, schedule="cluster", seed=seed) for seed in range(HANGS + 5)]
    tally = Tally([*checks, EACH])
    done = 0
    for task in tally.tasks():
        silent = task["schedule"] == "cluster"
        tally.take(task, {"error": "worker: no answer in 60 s"} if silent else fine())
        done += 1
    found = tally.record()
    assert done == HANGS + 1 and found["hung"] == {"cluster": HANGS}
    assert found["left_out"] == {"zoo, cluster": 5}
    assert found["failed"] == HANGS


def test_a_tally_goes_on_where_it_was():
    tally = Tally([replace(EACH, seed=seed) for seed in range(4)])
    first = next(tally.tasks())
    assert [task["seed"] for task in tally.tasks()] == [1, 2, 3] and first["seed"] == 0


# --- the budget and the record -------------------------------------------------------------------


class Clock:
    """A clock that stands still unless it is told otherwise."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_budget_is_shared_out():
    clock = Clock()
    budget = Budget(540, clock)
    checks = budget.before(12).share(0.5)
    assert (budget.left(), checks.left()) == (540, 264)
    clock.now += 300
    assert (budget.left(), budget.spent(), checks.left()) == (240, 300, -36)
    assert budget.before(300).left() == 0 and budget.share(0.25).left() == 60


def test_a_record_is_whole_at_any_time(tmp_path):
    clock = Clock()
    record = Record(tmp_path / "new" / "gpu.json", Budget(60, clock), minutes=1)
    assert json.loads(record.path.read_text("utf-8"))["finished"] is False
    record.data["value"] = [float("inf"), 1.23456789, {"a": (1, None)}]
    record.save(2)  # too early
    assert "value" not in json.loads(record.path.read_text("utf-8"))
    clock.now += 3
    record.save(2)
    found = json.loads(record.path.read_text("utf-8"))
    assert found["value"] == ["inf", 1.235, {"a": [1, None]}] and found["seconds"] == 3
    assert [path.name for path in record.path.parent.iterdir()] == ["gpu.json"]


# --- workers -------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from benchmarks.gpu_pool import serve

def raising(task):
    raise ValueError("no good")

serve({
    "echo": lambda task: print("a library says hello") or {"value": task["value"]},
    "raise": raising,
    "die": lambda task: print("last words", file=sys.stderr, flush=True) or os._exit(3),
    "hang": lambda task: time.sleep(60),
}, lambda: len(sys.argv) > 1)
"""


@pytest.fixture
def worker():
    made = Worker([sys.executable, "-c", SCRIPT])
    yield made
    made.close()


def test_a_worker_answers_and_survives_what_it_raises(worker):
    assert worker.ask({"kind": "echo", "value": [1, None]}, 60) == {"value": [1, None]}
    first = worker._process
    assert worker.ask({"kind": "raise"}, 60) == {"error": "ValueError: no good"}
    assert worker.ask({"kind": "echo", "value": 2.5}, 60) == {"value": 2.5}
    assert worker._process is first


def test_a_worker_that_dies_or_hangs_is_replaced(worker):
    with pytest.raises(GoneError, match="died: last words"):
        worker.ask({"kind": "die"}, 60)
    assert worker.ask({"kind": "echo", "value": 1}, 60) == {"value": 1}
    with pytest.raises(GoneError, match="no answer in 0 s"):
        worker.ask({"kind": "hang"}, 0.2)
    assert worker.ask({"kind": "echo", "value": 2}, 60) == {"value": 2}


def test_a_worker_whose_device_is_lost_is_replaced():
    worker = Worker([sys.executable, "-c", SCRIPT, "lost"])
    try:
        assert worker.ask({"kind": "raise"}, 60) == {"error": "ValueError: no good"}
        assert worker._process is None
    finally:
        worker.close()


def test_a_worker_that_cannot_start_says_so():
    worker = Worker([sys.executable, "-c", "raise SystemExit('no device')"])
    with pytest.raises(StartError, match="does not start: died: no device"):
        worker.ask({"kind": "echo"}, 60)


class Canned:
    """A worker without a process: answers from a function, after so many seconds of the clock."""

    def __init__(self, answer, clock=None, seconds=0.0):
        self.answer, self.clock, self.seconds = answer, clock, seconds
        self.asked, self.closed = [], 0

    def ask(self, task, seconds):
        self.asked.append((dict(task), seconds))
        if self.clock is not None:
            self.clock.now += self.seconds
        return self.answer(task)

    def close(self):
        self.closed += 1


def gone(task):
    raise GoneError("no answer in 60 s")


def test_tasks_are_given_out_until_the_time_is_over():
    clock, taken = Clock(), []
    tasks = ({"kind": "check", "number": i} for i in range(9))
    worker = Canned(lambda task: {"number": task["number"]}, clock, 10)
    cut = share_out(tasks, [worker], Budget(35, clock), lambda _: 60.0,
                    lambda task, answer: taken.append(answer["number"]))  # fmt: skip
    assert taken == [0, 1, 2, 3] and cut == []
    assert [seconds for _, seconds in worker.asked] == [40, 30, 20, 10]  # with the grace
    assert next(tasks)["number"] == 4  # what was not begun is left


def test_what_a_worker_dies_of_is_an_answer_unless_time_is_up():
    clock, taken = Clock(), []
    worker = Canned(gone, clock, 20)
    cut = share_out(iter([{"n": 1}, {"n": 2}, {"n": 3}]), [worker], Budget(35, clock),
                    lambda _: 60.0, lambda task, answer: taken.append((task, answer)))  # fmt: skip
    assert taken == [({"n": 1}, {"error": "worker: no answer in 60 s"})] and cut == [{"n": 2}]


# --- timing --------------------------------------------------------------------------------------


class Fake:
    """A device whose clock is moved by what runs on it, and which remembers what it was told."""

    def __init__(self):
        self.clock, self.told = Clock(), []

    def event(self):
        return FakeEvent(self)

    def synchronize(self):
        self.told.append("synchronize")

    def flush(self):
        self.clock.now += 1.0
        self.told.append("flush")

    def hold(self, seconds):
        self.clock.now += seconds
        self.told.append(("hold", seconds))


class FakeEvent:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.at = self.device.clock.now

    def elapsed_time(self, other):
        assert self.device.told[-1] == "synchronize", "events are read when the device is done"
        return 1e3 * (other.at - self.at)


def runs(device, name, forward, backward=None):
    """A contestant that takes so many seconds."""

    def take(seconds):
        device.clock.now += seconds
        device.told.append(name)
        return ("y",)

    back = None if backward is None else lambda value: take(backward)
    return Contestant(name, lambda: take(forward), back)


def test_a_race_times_each_pass_after_a_flush():
    device = Fake()
    entrants = [runs(device, "a", 0.25, 0.5), runs(device, "b", 1e-3)]
    samples, failed = race(entrants, device, 1e9, device.clock)
    assert not failed and set(samples) == {"a", "b"}
    assert set(samples["a"]) == {FORWARD, BACKWARD} and set(samples["b"]) == {FORWARD}
    assert samples["a"][FORWARD] == pytest.approx([250.0] * 100)
    assert samples["a"][BACKWARD] == pytest.approx([500.0] * 100)
    assert samples["b"][FORWARD] == pytest.approx([1.0] * 100)
    told = device.told[-1000:]  # three passes a turn, each flush, hold and call, then all is read
    for i, what in enumerate(told):
        if what in ("a", "b"):
            assert told[i - 2] == "flush" and told[i - 1][0] == "hold"
    # A host that is slow keeps the device waiting, up to a limit.
    held = sorted({round(what[1], 9) for what in told if what[0] == "hold"})
    assert held == [pytest.approx(1.52e-3), LONGEST]


def test_the_order_of_a_race_changes():
    device = Fake()
    race([runs(device, name, 1e-4) for name in "abc"], device, 1e9, device.clock)
    named = [what for what in device.told if what in ("a", "b", "c")]
    turns = ["".join(named[i : i + 3]) for i in range(len(named) - 300, len(named), 3)]
    assert len(set(turns[:6])) == 6


def test_a_race_ends_in_time_but_not_before_a_few_turns():
    device = Fake()
    samples, _ = race([runs(device, "a", 3.0)], device, 0.0, device.clock)
    assert len(samples["a"][FORWARD]) == LEAST
    samples, _ = race([runs(device, "a", 3.0)], device, 100.0, device.clock)
    assert LEAST < len(samples["a"][FORWARD]) < 40


def test_whoever_fails_is_left_behind():
    device = Fake()

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")

    samples, failed = race(
        [Contestant("b", fails), runs(device, "a", 1.0)], device, 0, device.clock
    )
    assert failed == {"b": "out of memory"} and set(samples) == {"a"}
    assert race([Contestant("b", fails)], device, 0, device.clock)[0] == {}


def test_a_summary_is_in_microseconds():
    found = summary([float(n) for n in range(1, 12)])
    assert found == {"us": 6000.0, "p20": 3000.0, "p80": 9000.0}


def test_the_host_is_timed_without_waiting_for_the_device():
    device = Fake()
    grads = []
    each = runs(device, "a", 2e-6, 3e-6)
    watched = replace(each, forward=lambda: grads.append(torch.is_grad_enabled()) or each.forward())
    found = host_times(watched, device, 50, device.clock)
    assert found == pytest.approx({"forward": 2.0, "both": 5.0})
    assert grads == [False] * 351 + [True] * 351
    assert device.told.count("synchronize") == 15


def test_reasons_are_short():
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert len(reason(ValueError("x" * 1000))) == 300


class FakeCuda:
    """As much of torch.cuda as graphs need: what is captured runs again when it is replayed."""

    def __init__(self, monkeypatch):
        self.clock, self.captured, self.streams = Clock(), None, 0
        self.wait_stream = lambda other: None
        for name in ("Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        self.told = ["synchronize"]

    def replay(self):
        self.clock.now += 0.006


def test_a_graph_is_timed_per_call_and_compared(monkeypatch):
    FakeCuda(monkeypatch)
    calls = []

    def each(number, drift=0.0):
        def forward():
            calls.append(number)
            return (torch.tensor([number + drift * len(calls)]),)

        return Contestant("a", forward, lambda value: (value[0], None))

    found, same = replays([each(1.0), each(2.0), each(3.0)])
    assert same and found[FORWARD]["us"] == pytest.approx(2000.0)  # of 6 ms for three
    assert found[BACKWARD]["p80"] == pytest.approx(2000.0)
    assert calls == [1, 2, 1, 2, 3, 1, 1, 2, 3]  # warm, captured, compared, for backward
    assert replays([each(1.0, drift=0.5)] * 3)[1] is False
    found, _ = replays([replace(each(1.0), backward=None)] * 3)
    assert set(found) == {FORWARD}


# --- one row of speed, on the CPU -----------------------------------------------------------------


class Here(Fake):
    """Looks like a device, but what runs on it runs in real time."""


def small_row(**changes):
    row = ROWS["C1/evonorm_s0"]
    return replace(row, shape=(2, 64, 4, 3), dtype="float32", **changes)


@pytest.fixture
def speed_here(monkeypatch):
    """`gpu_speed` for one small row, with a device of its own and without graphs."""
    monkeypatch.setattr(gpu_speed, "Cuda", Here)
    monkeypatch.setattr(gpu_speed, "replays", lambda sets: ({FORWARD: summary([1.0])}, True))
    monkeypatch.setattr(gpu_speed, "l2", lambda: 1000)

    def run(row, providers=(OURS, EAGER, LIGER)):
        monkeypatch.setitem(gpu_speed.ROWS, row.id, row)
        task = {"kind": "speed", "row": row.id, "providers": list(providers), "seconds": 0.01}
        return gpu_speed.speed(task)

    return run


@pytest.mark.cpu
def test_a_row_is_judged_and_timed(speed_here):
    row = small_row(host=True)
    answer = speed_here(row)
    assert answer["judged"] == [2, 64, 4, 3]
    assert set(answer["times"]) == {OURS, EAGER, contest.COPY}
    assert set(answer["times"][OURS]) == {FORWARD, BACKWARD}
    assert answer["errors"][OURS]["d_x"] < 2e-6 and "d_v" in answer["errors"][EAGER]
    assert answer["notes"] == {LIGER: "MissingError: liger has no such layer"}
    assert set(answer["host"]) == {OURS, EAGER} and answer["graph_same"] is True
    assert set(answer["graphs"]) == {OURS, EAGER}
    assert gpu_speed.warm({"row": row.id, "provider": LIGER}) == {}


@pytest.mark.cpu
def test_what_is_wrong_is_not_timed(speed_here, monkeypatch):
    honest = gpu_speed._call

    def call(row, who):
        made = honest(row, who)
        return (lambda **given: made(**given) * (1 + 1e-5)) if who == OURS else made

    monkeypatch.setattr(gpu_speed, "_call", call)
    answer = speed_here(small_row())
    assert answer["times"] == {} and "normc is not timed" in answer["notes"][OURS]
    assert answer["errors"][OURS]["y"] == pytest.approx(1e-5, rel=0.1)


@pytest.mark.cpu
def test_a_provider_that_fails_is_noted(speed_here, monkeypatch):
    honest = gpu_speed._call

    def call(row, who):
        if who == EAGER:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(row, who)

    monkeypatch.setattr(gpu_speed, "_call", call)
    answer = speed_here(small_row(), (OURS, EAGER))
    assert answer["notes"] == {EAGER: "out of memory"}
    assert set(answer["times"]) == {OURS, contest.COPY}


def test_the_oracle_sees_some_samples_of_what_is_huge():
    assert gpu_speed.judged(ROWS["T1/layer_norm"].case) == ROWS["T1/layer_norm"].case
    case = gpu_speed.judged(ROWS["K/instance_norm"].case)
    assert case.shape == (8, 64, 512, 512) and prod(case.shape) <= gpu_speed.ORACLE


def test_tensors_are_drawn_in_their_layout():
    row = ROWS["C1/evonorm_s0/last"]
    case = replace(row.case, shape=(2, 64, 4, 3))
    given, (cotangent,) = gpu_speed.drawn(row.formula.definition, case)
    assert given["x"].is_contiguous(memory_format=torch.channels_last)
    assert cotangent.stride() == given["x"].stride() and given["v"].shape == (64,)
    again, _ = gpu_speed.drawn(row.formula.definition, case)
    other, _ = gpu_speed.drawn(row.formula.definition, case, 1)
    assert torch.equal(given["x"], again["x"]) and not torch.equal(given["x"], other["x"])


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "given", [(), ("--part", "speed"), ("--device", "cpu"), ("--part", "check", "--only", "no")]
)
def test_without_a_gpu_there_is_one_line_and_status_2(tmp_path, given):
    out = tmp_path / "gpu.json"
    done = CliRunner().invoke(gpu.app, [*given, "--out", str(out)])
    assert done.exit_code == 2 and not out.exists()
    (line,) = done.output.splitlines()
    assert line.startswith("error: ")


def timed(us):
    return {part: {"us": us, "p20": us, "p80": us} for part in (FORWARD, BACKWARD)}


def answers(task):
    """What a worker says of a GPU on which everything is fine."""
    match task["kind"]:
        case "machine":
            return {"gpu": "NVIDIA X", "driver": "1", "cuda": "13", "versions": {"torch": "2"}}
        case "copy":
            return {"us": 1000.0, "gbps": 4000.0}
        case "check":
            return fine()
        case "warm":
            return {"error": "no"} if task["provider"] == COMPILE else {}
    times = {OURS: timed(140.0), contest.COPY: {FORWARD: {"us": 134.2, "p20": 1.0, "p80": 1.0}}}
    times |= {who: timed(280.0) for who in task["providers"] if who in (EAGER, COMPILE)}
    return {"errors": {}, "judged": [1], "notes": {}, "times": times}


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Worker", lambda command: Canned(answers))
    record = Record(tmp_path / "gpu.json", Budget(540), started="now", minutes=9.0)
    rows, names, texts = gpu.selected("T1/layer_norm")
    tally = Tally(gpu_check.plan(names, texts))
    gpu.measure(record, tally, rows, gpu.Part.all, 2)
    data = record.data
    assert data["check"]["done"] == data["check"]["planned"] > 50
    assert data["copy"] == {"first": answers({"kind": "copy"}), "last": answers({"kind": "copy"})}
    assert data["ahead"] == ["T1/layer_norm, compile: no"]
    (row,) = data["speed"]["rows"].values()
    assert row["floor_us"][FORWARD] == pytest.approx(2 * 268.4e6 / 4e6, rel=1e-3)
    assert row["times"][OURS][FORWARD]["efficiency"] == pytest.approx(134.2 / 140, rel=1e-3)
    assert row["times"][contest.COPY][FORWARD]["gbps"] == pytest.approx(4000, rel=1e-3)
    assert row["times"][OURS][BACKWARD]["gbps"] == pytest.approx(3 * 268.4 / 0.14, rel=1e-3)
    assert "T1/layer_norm" in capsys.readouterr().out
    page = gpu_report.page(json.loads(record.path.read_text("utf-8")))
    assert "NVIDIA X" in page and "| `T1/layer_norm` |" in page


def test_rows_without_time_are_named(tmp_path, monkeypatch):
    clock = Clock()
    bench = Canned(answers, clock, 20)
    record = Record(tmp_path / "gpu.json", Budget(60, clock), minutes=1.0)
    record.data["copy"] = {"first": {"gbps": 4000.0}}
    rows = gpu.selected("")[0][:5]
    gpu._speed(record, bench, rows, record.budget)
    found = record.data["speed"]
    assert list(found["rows"]) == [row.id for row in rows[:3]]
    assert found["left_out"] == {row.id: "no time" for row in rows[3:]}
    assert [COMPILE in task["providers"] for task, _ in bench.asked] == [True, True, False]


def test_a_row_that_brings_a_worker_down_is_tried_with_less():
    def once(task):
        return gone(task) if COMPILE in task["providers"] else answers(task)

    bench = Canned(once)
    assert gpu._row(bench, ROWS["T1/dyt"], Budget(500))["times"]
    assert [task["providers"] for task, _ in bench.asked][1] == [OURS, EAGER]
    answer = gpu._row(Canned(gone), ROWS["T1/dyt"], Budget(500))
    assert answer == {"error": "worker: no answer in 60 s"}
    clock = Clock()
    assert gpu._row(Canned(gone, clock, 90), ROWS["T1/dyt"], Budget(60, clock)) == {
        "error": "no time"
    }


# --- the page ------------------------------------------------------------------------------------


def measured(us, copied=4000.0, **changes):
    """A row as the command writes it, with round numbers."""
    row = ROWS["T1/layer_norm"]
    times = {OURS: timed(us), EAGER: timed(4 * us), COMPILE: timed(us / 2)}
    times[contest.COPY] = {FORWARD: timed(150.0)[FORWARD]}
    answer = {"errors": {}, "judged": [1], "notes": {}, "times": times} | changes
    return answer | gpu._known(row, answer, copied)


def made(**changes):
    row = measured(134.2, notes={LIGER: "MissingError: liger cannot be imported"})
    small = measured(134.2, aims=None, host={OURS: {"forward": 4.0, "both": 20.0}},
                     graphs={OURS: timed(3.0), EAGER: timed(9.0)}, graph_same=False)  # fmt: skip
    small |= {"aims": {FORWARD: 0, BACKWARD: 0}}
    return {
        "started": "2026-01-02T03:04:05", "seconds": 500.0, "minutes": 9.0, "finished": True,
        "machine": {"gpu": "NVIDIA X", "driver": "1", "versions": {"torch": "2", "quack": "none"}},
        "copy": {"first": {"gbps": 4000.0}, "last": {"gbps": 3900.0}},
        "speed": {"rows": {"T5/rms_norm/1": small, "T1/layer_norm": row},
                  "left_out": {"K/batch_norm": "no time"}},
    } | changes  # fmt: skip


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_row_of_the_page():
    page = gpu_report.page(made())
    forward, backward = lines(page, "| `T1/layer_norm`")
    cells = [cell.strip() for cell in forward.split("|")[1:-1]]
    assert cells[1:5] == ["150.0", "134.2", "134.2 (134.2-134.2)", "1.00 ✓ (0.97)"]
    assert cells[6:] == ["0.50", "4.00", "", ""]
    assert "1.50 ✓ (0.92)" in backward and "0.50 ✗ (1)" in backward
    assert "Geometric mean of floor: 1.00 ✓ (0.85)" in page
    assert "Slower than torch.compile: `T1/layer_norm` (0.50x), of 1 compared." in page


def test_what_is_small_and_what_is_left_out_is_told():
    page = gpu_report.page(made())
    graphs, _, host, both = lines(page, "| `T5/rms_norm/1`")
    assert "| 3.0 |  | 9.0 |" in graphs and "| 4.0 |" in host and "| 20.0 |" in both
    assert "Other results in a graph than without one:\n\n* `T5/rms_norm/1`" in page
    assert "* `K/batch_norm`: no time" in page and "* `T1/layer_norm` liger: " in page
    assert "a copy of 2 GiB moves 4000, at the end 3900 GB/s" in page
    assert "quack none" not in page


@pytest.mark.parametrize("missing", [(), ("speed",), ("copy", "machine", "speed")])
def test_a_page_of_a_run_that_was_cut_short(missing):
    record = made(finished=False)
    for key in missing:
        del record[key]
    page = gpu_report.page(record)
    assert "**the run did not finish**" in page and "Not checked in this run." in page
    assert "not finished" in gpu_report.brief(record)


def test_without_a_copy_there_are_no_floors():
    record = made(speed={"rows": {"T1/layer_norm": measured(100.0, None)}, "left_out": {}})
    page = gpu_report.page(record)
    assert "| 100.0 (100.0-100.0) |" in page and "Geometric mean" not in page


def test_failures_are_on_the_page():
    tally = Tally([replace(EACH, seed=seed) for seed in range(2)])
    for task, answer in zip(tally.tasks(), [fine(float("inf")), {"error": "a | b"}], strict=True):
        tally.take(task, plain(answer))
    page = gpu_report.page(made(check=tally.record()))
    assert "2 of 2 checks were done, 1 failed" in page
    assert "* `evonorm_s0`, channels-first (2, 6, 3, 2) groups 3 float32, usual: a | b" in page
    assert "| float32 | inf |" in page
    assert "checks: 2 of 2, 1 failed" in gpu_report.brief(made(check=tally.record()))


def test_the_page_is_up_to_date():
    if not gpu_report.DATA.exists():
        pytest.skip("not measured yet")
    record = json.loads(gpu_report.DATA.read_text("utf-8"))
    assert gpu_report.DATA.with_suffix(".md").read_text("utf-8") == gpu_report.page(record)
