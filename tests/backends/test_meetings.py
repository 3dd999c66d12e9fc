"""Programs of a cluster really wait for each other: each in a process of its own, all at once.

Elsewhere the interpreter runs them in turn and none waits. Memory is ordered here as processors of
this machine order it, which is more strictly than a GPU does: what is tried is who waits for whom,
not whether stores are seen in time.
"""

import multiprocessing
from functools import cache
from math import prod
from types import FunctionType

import pytest
import torch

import normc
from normc.analysis.agreement import LAYOUTS, Case, distance, draw, gradients, magnitude
from normc.backends.triton import TritonBackend
from normc.ops.explain import all_jobs
from normc.pipeline import Target, programs
from normc.reference import reference
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST
from tests.backends.schedules import small
from tests.backends.together import Launch, Stuck, play, recorded, together

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # in masked lanes
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6
    # pytest has threads; the children run Python and numpy only
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

BY_NAME = {layout.name: layout for layout in LAYOUTS}
SEEDS = range(10)

ONCE = "x*instance_var(x)"
TWICE = "h = x*sigmoid(x)/instance_std(x); h - instance_max(h)*x"
TOKENS = normc.zoo["layer_norm_tokens"].text


@pytest.fixture(autouse=True)
def nobody_is_left():
    yield
    assert not multiprocessing.active_children()


class Recording:
    """The launches of a formula, and the tensors that they fill."""

    def __init__(self, text, shape, layout="rank 3", calls=1, backward=True):
        self.case = Case(BY_NAME[layout], shape, 1, "float32", 5)
        order = CHANNELS_LAST if layout == "tokens" else CHANNELS_FIRST
        f = normc.parse(text)
        jobs = all_jobs(f, Target("triton", "float32", order, False))[: 1 + backward]
        self.carries = [stat for job in jobs for stat in job.plan.carries]
        backend = TritonBackend(small("cluster"))
        runs = [backend.load([job], [backend.render(job)])[0] for job in jobs]
        self.given, self.cotangents = draw(f.definition, self.case)
        self.exact = self.oracle(f.definition)
        results = [o.name for o in jobs[0].plan.program.outputs]
        self.given |= {f"d_{y}": d for y, d in zip(results, self.cotangents, strict=True)}
        wrt = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
        self.names = programs(f.definition, wrt).gradients if backward else {}
        with recorded() as self.launches:
            self.done = [self.call(jobs, runs) for _ in range(calls)]
        self.waiting = [launch for launch in self.launches if launch.waits]

    def call(self, jobs, runs):
        done = {}
        for job, run in zip(jobs, runs, strict=True):
            known = self.given | done
            known = {i.name: known[i.name] for i in job.plan.program.inputs}
            done |= run(self.case.geometry, known, 1e-5)
        return done

    def oracle(self, definition):
        wide = {name: t.double() for name, t in self.given.items()}
        call, how = reference(definition), {"channel_dim": self.case.layout.channel_dim}
        return gradients(lambda **t: call(**t, **how), wide, [d.double() for d in self.cotangents])

    def play(self, **how):
        """Run everything; for each call what came out, in tensors of their own."""
        self.meetings = [met for met in play(self.launches, self.given, **how) if met]
        return [{name: t.clone() for name, t in done.items()} for done in self.done]

    def right(self, done):
        """Whether results, and gradients if there are any, are the oracle's."""
        found = done | {name: done[output] for name, output in self.names.items()}
        wanted = {name: want for name, want in self.exact.items() if self.names or name in done}
        return all(
            distance(found[name], want, max(magnitude(want), 1e-6)) < 1e-5
            for name, want in wanted.items()
        )


def clusters(launch):
    """The programs that meet each other."""
    parts = prod(size for name, size in launch.constants.items() if name.startswith("PARTS_"))
    return [range(first, first + parts) for first in range(0, launch.programs, parts)]


def orderly(met, first=0):
    """Whether all came once to each meeting, in any order, and none went before the last came."""
    for i, meeting in enumerate(zip(*met, strict=True)):
        start = first + i * len(met)
        if sorted(m.before for m in meeting) != [*range(start, start + len(met))]:
            return False
        if max(m.came for m in meeting) > min(m.went for m in meeting):
            return False
    return True


def counted(launch):
    return launch.counters[0].tolist()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# --- results --------------------------------------------------------------------------------------

CASES = {  # text, shape, layout; of each launch: programs of a cluster, meetings of each cluster
    "one cluster": (ONCE, (2, 2, 5), "rank 3", [(3, [1]), (3, [1])]),
    "several turns": (ONCE, (5, 4, 5), "rank 3", [(3, [3, 3]), (3, [3, 3])]),
    "turns differ": (ONCE, (5, 2, 6), "rank 3", [(3, [2, 1]), (3, [2, 1])]),
    "two meetings": (TWICE, (5, 2, 6), "rank 3", [(3, [4, 2]), (3, [2, 1])]),
    "two dimensions": (
        *(normc.zoo["grn"].text, (3, 3, 5), "rank 3"),
        [(6, [2, 2]), (6, [2, 2]), (2, [1, 1])],
    ),
    "carries": (TOKENS, (3, 3, 6), "tokens", [(3, [2, 2]), (3, [2, 2])]),
}


@pytest.mark.parametrize("name", CASES)
def test_programs_that_wait_agree_with_the_oracle(name):
    text, shape, layout, expected = CASES[name]
    recording = Recording(text, shape, layout)
    (done,) = recording.play()
    assert recording.right(done)
    found = recording.waiting, recording.meetings, expected
    for launch, met, (parts, meetings) in zip(*found, strict=True):
        assert [len(cluster) for cluster in clusters(launch)] == [parts] * len(meetings)
        assert counted(launch) == [parts * n for n in meetings]
        assert all(orderly([met[p] for p in cluster]) for cluster in clusters(launch))
    assert len(recording.carries) == (2 if name == "carries" else 0)  # for d_gamma and d_beta


@pytest.mark.parametrize("text", [TWICE, TOKENS], ids=["twice", "tokens"])
def test_the_order_in_which_programs_come_changes_no_bit(text):
    shape, layout = ((5, 2, 6), "rank 3") if text == TWICE else ((3, 2, 6), "tokens")
    recording = Recording(text, shape, layout, backward=text == TOKENS)
    found, orders = [], set()
    for seed in SEEDS:
        found += recording.play(seed=seed)
        orders |= {tuple(m[0].before % 3 for m in met[:3]) for met in recording.meetings}
    assert recording.right(found[0])
    assert all(same(found[0], other) for other in found[1:])
    assert len(orders) > 1  # of the six in which the first cluster can have come


def test_counters_go_on_from_call_to_call():
    recording = Recording(TWICE, (5, 2, 6), calls=2, backward=False)
    first, second = recording.waiting
    assert first.counters[0] is second.counters[0]
    for times in (1, 2):
        one, other = recording.play(seed=times)
        assert recording.right(one) and same(one, other)
        assert counted(first) == [24 * times, 12 * times]


@pytest.mark.parametrize("far", [2**31 - 2, 2**40 - 1])
def test_counters_may_be_large(far):
    recording = Recording(TWICE, (5, 2, 6), backward=False)
    (launch,) = recording.waiting
    launch.counters[0].fill_(far)  # a multiple of 3: the next meeting ends beyond the power of 2
    (done,) = recording.play(seed=0)
    assert recording.right(done)
    assert counted(launch) == [far + 12, far + 6]
    met = recording.meetings[0]
    assert all(orderly([met[p] for p in cluster], far) for cluster in clusters(launch))


# --- what would be seen if they did not wait ------------------------------------------------------


@triton.jit
def first_time_only(arrived, programs, WAIT: tl.constexpr):
    """Wait as the first meeting of all wants it: no later one is waited for."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if WAIT:
        while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < programs:
            pass
    tl.debug_barrier()


@triton.jit
def as_many_more(arrived, programs, WAIT: tl.constexpr):
    """Wait for as many as there are, without those who were there before."""
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if WAIT:
        while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < before + programs:
            pass
    tl.debug_barrier()


def test_who_never_comes_is_waited_for():
    recording = Recording(ONCE, (5, 2, 6), backward=False)
    (launch,) = recording.waiting
    with pytest.raises(Stuck) as stuck:
        recording.play(absent=[1], limit=2)
    assert stuck.value.programs == [0, 2]  # the other cluster has gone on
    assert counted(launch) == [2, 3]
    assert recording.done[0]["y"].isnan().any()


def test_without_waiting_results_are_wrong():
    recording = Recording(ONCE, (2, 2, 5), backward=False)
    found = (recording.play(seed=seed, wait=False)[0] for seed in range(30))
    assert not all(recording.right(done) for done in found)


def test_a_meeting_that_is_waited_for_only_once_is_noticed():
    recording = Recording(TWICE, (5, 2, 6), backward=False)
    (launch,) = recording.waiting
    wrong = early = False
    for seed in range(30):
        launch.counters[0].zero_()
        (done,) = recording.play(seed=seed, meet=first_time_only)
        wrong |= not recording.right(done)
        early |= not orderly(recording.meetings[0][:3])
        if wrong and early:
            return
    pytest.fail(f"wrong results: {wrong}, early programs: {early}")


# --- meetings alone -------------------------------------------------------------------------------


@triton.jit
def meetings(arrived, meet: tl.constexpr, programs: tl.constexpr, times, WAIT: tl.constexpr):
    """One meeting after the other."""
    for _ in range(times):
        meet(arrived, programs, WAIT)


@triton.jit
def additions(arrived, times, WAIT: tl.constexpr):
    """Add 1 so many times."""
    for _ in range(times):
        tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")


@cache
def meet():
    """The function by which kernels meet."""
    (launch,) = Recording(ONCE, (2, 2, 5), backward=False).waiting
    return launch.function.fn.__globals__["meet"]


def test_processes_add_to_the_same_number():
    number = torch.zeros(1, dtype=torch.int64)
    together(Launch(additions, 4, (number, 500), {"WAIT": False}))
    assert number.item() == 2000


@pytest.mark.parametrize("programs", [1, 2, 3, 5])
@pytest.mark.parametrize("first", [0, 2**31, 2**32, 2**40, 2**62])
def test_one_meeting_after_the_other(first, programs):
    first = (first // programs - 2) * programs if first else 0  # two meetings before the power
    arrived = torch.full((1,), first)
    met = together(Launch(meetings, programs, (arrived, meet(), programs, 5), {"WAIT": True}))
    assert arrived.item() == first + 5 * programs
    assert [len(one) for one in met] == [5] * programs
    assert orderly(met, first)


# --- every order of steps -------------------------------------------------------------------------


class Pause(Exception):
    """A program wants to add to the counter, and nobody has told it yet what it finds there."""

    def __init__(self, value):
        super().__init__()
        self.value = value


class Language:
    """Stands in for triton.language: tells a program what it has found in the counter."""

    def __init__(self, found):
        self.found = iter(found)

    def debug_barrier(self):
        pass

    def atomic_add(self, place, value, **_):
        for added, found in self.found:
            assert added == value
            return found
        raise Pause(value)


def wanted(meet, programs, times, found):
    """What a program adds next, and how many meetings it has passed, by what it found so far."""
    run, passed = FunctionType(meet.fn.__code__, {"tl": Language(found)}), 0
    try:
        while passed < times:
            run(0, programs, True)
            passed += 1
    except Pause as pause:
        return pause.value, passed
    return None, passed


def explore(meet, programs, times, first=0):
    """What can go wrong in any order of steps, and how many states there are.

    A state is the counter and what every program has found there; between two additions a program
    does nothing that others see. One that looks and finds what makes it look again is where it was.
    """
    step = cache(lambda found: wanted(meet, programs, times, found))
    start = first, ((),) * programs
    todo, seen, wrong = [start], {start}, set()
    while todo:
        count, every = todo.pop()
        came = [sum(value for value, _ in found) for found in every]
        if max(step(found)[1] for found in every) > min(came):
            wrong.add("early")
        moves = set()
        for p, found in enumerate(every):
            value, passed = step(found)
            if value is not None:
                after = (*found, (value, count))
                if value or step(after) != (0, passed):
                    moves.add((count + value, (*every[:p], after, *every[p + 1 :])))
        if not moves and any(step(found)[0] is not None for found in every):
            wrong.add("stuck")
        todo += moves - seen
        seen |= moves
    return wrong, len(seen)


@pytest.mark.parametrize(
    "programs, times, first", [(1, 3, 0), (2, 4, 0), (3, 2, 0), (3, 3, 2**31 - 2), (4, 1, 8)]
)
def test_in_no_order_does_a_program_go_early_or_wait_for_ever(programs, times, first):
    wrong, states = explore(meet(), programs, times, first)
    assert not wrong
    assert states > 2**programs


def test_orders_that_go_wrong_are_found():
    assert explore(first_time_only, 3, 2)[0] == {"early"}
    assert "stuck" in explore(as_many_more, 3, 2)[0]
    assert "stuck" in explore(meet(), 3, 2, first=1)[0]  # a counter that a lost launch has left
