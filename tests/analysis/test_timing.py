"""The protocol of the benchmarks: turns, ratios, the judge before the clock, and saved memory."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import normc
from normc.analysis import contest, machine
from normc.analysis.agreement import Case, Layout, draw
from normc.analysis.contest import BOTH, COPY, FORWARD, Accuracy, Entrant, InaccurateError
from normc.analysis.native import NATIVE
from normc.analysis.providers import OURS, PROVIDERS, eager, native
from normc.analysis.timing import MOST, WARM_UP, Samples, interleave, order, quantile
from normc.errors import NormcError

SMALL = Case(Layout("contiguous", 4, 1), (2, 8, 5, 3), 4, "float32", seed=3)
TOKENS = Case(Layout("tokens", 3, -1), (2, 5, 8), 1, "float32", seed=3)


# --- turns ---------------------------------------------------------------------------------------


class Clock:
    """A clock that the calls move: each takes its time, whatever the machine does."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.called = 0.0, seconds, []

    def __call__(self):
        return self.now

    def calls(self):
        return {name: lambda name=name: self.take(name) for name in self.seconds}

    def take(self, name):
        self.called.append(name)
        self.now += self.seconds[name]


def test_every_call_has_its_turn_in_every_round():
    clock = Clock(a=1.0, b=2.0, c=3.0)
    samples = interleave(clock.calls(), 6, clock=clock)
    rounds = [clock.called[i : i + 3] for i in range(0, len(clock.called), 3)]
    assert len(rounds) == WARM_UP + 6
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {name: len(each) for name, each in samples.seconds.items()} == {"a": 6, "b": 6, "c": 6}


@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
def test_nothing_always_comes_first_or_after_the_same(names):
    turns = [order(names, turn) for turn in range(2 * len(names))]
    assert {turn[0] for turn in turns} == set(names)
    before = {b: {a for turn in turns for a, c in pairwise(turn) if c == b} for b in names}
    assert all(len(each) > 1 for each in before.values()) or len(names) == 2


def test_warming_up_is_not_counted():
    clock = Clock(a=1.0)
    calls = {"a": lambda: clock.take("a") if len(clock.called) >= WARM_UP else slow()}

    def slow():
        clock.called.append("a")
        clock.now += 100

    assert interleave(calls, 3, clock=clock).seconds["a"] == [1.0, 1.0, 1.0]


def test_short_calls_are_repeated_all_as_often():
    clock = Clock(short=2**-13, long=2**-9)
    samples = interleave(clock.calls(), 2, least=2**-10, clock=clock)
    assert clock.called.count("short") == clock.called.count("long") == WARM_UP + 2 * 8
    assert (samples.median("short"), samples.median("long")) == (2**-13, 2**-9)


def test_a_slow_call_is_not_repeated_for_ever():
    clock = Clock(short=1e-6, slow=0.6 * MOST)
    interleave(clock.calls(), 1, clock=clock)
    assert clock.called.count("slow") == WARM_UP + 1


# --- numbers -------------------------------------------------------------------------------------

DRIFTING = Samples({"ours": (1.0, 2.0, 30.0), "theirs": (3.0, 6.0, 60.0), COPY: (0.5, 1.0, 15.0)})


def test_a_ratio_is_of_the_same_round():
    assert DRIFTING.median("theirs") == 6.0
    assert DRIFTING.ratio("theirs", "ours") == 3.0
    samples = Samples({"a": (2.0, 9.0, 4.0), "b": (1.0, 1.0, 4.0)})
    assert samples.ratio("a", "b") == 2.0  # and not 4/1, that of the medians


def test_quantiles():
    assert quantile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    assert quantile([7.0], 0.8) == 7.0
    assert Samples({"a": (4.0, 0.0, 1.0, 2.0, 3.0, 5.0)}).spread("a") == (1.0, 4.0)


def test_times_over_the_floor():
    """A copy moves 2A; at its speed, 5A take two and a half times as long."""
    samples = Samples({COPY: (2e-3,) * 3, OURS: (6e-3, 5e-3, 7e-3), "eager": (60e-3,) * 3})
    record = contest.times({BOTH: samples}, {BOTH: 5})[BOTH]
    assert (record["floor"], record["copy_ms"]) == (5, 2.0)
    ours, eager_ = record["times"][OURS], record["times"]["eager"]
    assert (ours["ms"], ours["over_floor"], ours["times_ours"]) == pytest.approx((6, 6 / 5, 1))
    assert (eager_["over_floor"], eager_["times_ours"]) == pytest.approx((12, 10))
    assert set(record["times"]) == {OURS, "eager"}
    json.dumps(record)


@pytest.mark.parametrize(
    ("name", "forward", "both"), [("layer_norm_tokens", 2, 5), ("evonorm_s0", 2, 5)]
)
def test_the_floor_is_that_of_the_programs(name, forward, both):
    x = torch.zeros(SMALL.shape)
    found = contest.floors(normc.zoo[name], x, SMALL.geometry)
    assert found == {FORWARD: forward, BOTH: both}


# --- providers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(normc.zoo))
@pytest.mark.parametrize("case", [SMALL, TOKENS], ids=["images", "tokens"])
def test_eager_is_the_oracle(name, case):
    formula, wide = normc.zoo[name], replace(case, dtype="float64")
    given, cotangents, exact = contest.exactly(formula, wide, 1e-5)
    call = eager(formula, wide, 1e-5)
    contest.accuracy(call, given, cotangents, exact).require("eager", "float64")


@pytest.mark.parametrize("name", list(NATIVE))
def test_torch_has_the_same_layer(name):
    formula, case = normc.zoo[name], SMALL if NATIVE[name].channels == "first" else TOKENS
    given, cotangents, exact = contest.exactly(formula, case, 1e-4)
    call = native(formula, case, 1e-4)
    contest.accuracy(call, given, cotangents, exact).require("native", "float32")
    with pytest.raises(NormcError, match=r"wants the channels (first|last)"):
        native(formula, TOKENS if case is SMALL else SMALL, 1e-4)


def test_native_goes_by_what_a_formula_means():
    text = "beta + gamma*(x - mean[s](x))/sqrt(var[s](x) + eps)"
    assert native(normc.parse(text), SMALL, 1e-5)
    with pytest.raises(NormcError, match="no function of its own"):
        native(normc.zoo["evonorm_s0"], SMALL, 1e-5)


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
def test_inductor_computes_the_same():
    formula = normc.zoo["dyt"]
    given, cotangents, exact = contest.exactly(formula, TOKENS, 1e-5)
    call = PROVIDERS["inductor"](formula, TOKENS, 1e-5)
    contest.accuracy(call, given, cotangents, exact).require("inductor", "float32")


# --- the judge -----------------------------------------------------------------------------------


def judge(call, formula="x*tanh(v*x)/group_std(x)", case=SMALL):
    given, cotangents, exact = contest.exactly(normc.parse(formula), case, 1e-5)
    return contest.accuracy(call, given, cotangents, exact)


def right(x, v):
    y = normc.reference("x*tanh(v*x)/group_std(x)")(x, v=v, groups=4)
    assert isinstance(y, torch.Tensor)
    return y


WRONG = {
    # the tensor that is wrong first, and a layer
    "y": lambda x, v: right(x, v) * (1 + 1e-5),
    "d_x": lambda x, v: right(x, v) + 1e-5 * (x - x.detach()),
    "d_v": lambda x, v: right(x, v) + (v - v.detach()).sum(),
}


def test_what_is_right_passes():
    judge(right).require("it", "float32")


@pytest.mark.parametrize("tensor", list(WRONG))
def test_what_is_wrong_is_not_timed(tensor):
    with pytest.raises(InaccurateError, match=f"it is not timed: the relative error of {tensor}"):
        judge(WRONG[tensor]).require("it", "float32")


def test_one_wrong_element_is_enough():
    def call(x, v):
        y = right(x, v).clone()
        y[-1, -1, -1, -1] += 1
        return y

    with pytest.raises(InaccurateError):
        judge(call).require("it", "float32")


def test_nan_is_not_accurate():
    with pytest.raises(InaccurateError, match="inf"):
        judge(lambda x, v: right(x, v) * float("nan")).require("it", "float32")


def test_the_same_nan_is():
    assert judge(lambda x: x.log(), "log(x)").errors["y"] < 1e-6


def test_a_kink_is_excused_in_the_gradient_alone():
    case = replace(SMALL, shape=(64, 128, 16, 8))  # a million elements

    def call(x):
        at = torch.zeros_like(x).index_fill_(0, torch.tensor([0]), 0.0)
        at[0, 0, 0, 0] = 1.0
        return x + at * (x - x.detach())

    found = judge(call, "1*x", case)
    assert found.kinks == 1
    found.require("it", "float32")
    with pytest.raises(InaccurateError, match="d_x"):
        judge(call, "1*x", replace(case, shape=(32, 128, 16, 8))).require("it", "float32")


def test_the_formulas_own_noise_is_excused():
    off, noise = Accuracy({"y": 3e-6}, 0), Accuracy({"y": 2e-6}, 0)
    off.require("it", "float32", noise)
    with pytest.raises(InaccurateError):
        off.require("it", "float32", Accuracy({"y": 1e-6}, 0))


def test_a_large_x_is_judged_by_some_of_its_samples(monkeypatch):
    monkeypatch.setattr(contest, "JUDGED", 120)
    assert contest.judged(SMALL).shape == (1, 8, 5, 3)
    first = replace(SMALL, layout=Layout("channels first of all", 3, 0), shape=(4, 5, 6))
    assert contest.judged(first).shape == (4, 5, 6)
    monkeypatch.setattr(contest, "JUDGED", 30)
    assert contest.judged(first).shape == (4, 1, 6)


# --- memory --------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Keeps x, its parameter, and a tensor of its own of 40 bytes, twice."""

    @staticmethod
    def forward(ctx, x, v):
        own = torch.ones(10)
        ctx.save_for_backward(x, v, own, own[2:], x[0])
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None


def saved(call, formula):
    given, cotangents = draw(normc.parse(formula).definition, SMALL)
    return contest.saved(Entrant("it", call, given, cotangents))


def test_saved_memory_is_counted_once():
    found = saved(lambda x, v: Doubled.apply(x, v), "x*v")
    assert found.named == {"x": 4 * 240, "v": 4 * 8}
    assert (found.rest, found.total, found.beyond_x) == (40, 1032, 72)


def test_a_result_that_is_saved_lives_anyway():
    assert dict(saved(lambda x: x.exp(), "exp(x)").named) == {"y": 4 * 240}
    two = saved(lambda x: (x.exp(), x.exp().sin()), "exp(x), x")
    assert (dict(two.named), two.rest) == ({"y0": 960}, 960)


@pytest.mark.cpu
def test_ours_saves_x_and_statistics():
    found = saved(PROVIDERS[OURS](normc.parse("x/group_std(x)"), SMALL, 1e-5), "x/group_std(x)")
    assert set(found.named) == {"x"}
    assert 0 < found.rest < 960 / 4


# --- together ------------------------------------------------------------------------------------


def test_a_race_times_both_passes_and_accumulates_nothing():
    formula = normc.zoo["evonorm_s0"]
    given, cotangents = draw(formula.definition, SMALL)
    call = eager(formula, SMALL, 1e-5)
    samples = contest.race([Entrant(OURS, call, given, cotangents)], given["x"], 3)
    assert list(samples) == [FORWARD, BOTH]
    assert all(set(each.seconds) == {COPY, OURS} for each in samples.values())
    assert samples[FORWARD].median(OURS) < samples[BOTH].median(OURS)
    assert all(t.grad is None for t in given.values())


def test_a_pass_without_autograd_and_one_with_it():
    seen = []

    def call(x):
        seen.append((torch.is_grad_enabled(), x.requires_grad))
        return 2 * x

    x = torch.ones(2, 3)
    entrant = Entrant("it", call, {"x": x}, [torch.full((2, 3), 5.0)])
    entrant.forward()()
    (grad,) = entrant.both()()
    assert seen == [(False, False), (True, True)]
    assert grad.eq(10).all()


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with machine.threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    with machine.threads(None) as count:
        assert count == before
    assert torch.get_num_threads() == before


def test_the_machine_goes_on_record():
    found = machine.environment("reuse")
    assert found["malloc"] == "reuse" and found["torch"] == torch.__version__
    assert all(found[key] for key in ("date", "cpu", "threads", "compiler", "python", "normc"))
