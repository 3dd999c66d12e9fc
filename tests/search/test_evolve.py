"""Screening and evolution: each stage on its own, and the same run whoever is faster."""

import hashlib
import random

import pytest

from normc.errors import NormcError
from normc.search.evolve import Evolution, Study
from normc.search.genome import Genome, Node, form
from normc.search.screen import Screen
from normc.search.space import EVONORM


def made(*nodes):
    return Genome(tuple(Node(n[0], tuple(n[1:])) for n in nodes))


PLANTED = {  # places: 0 x, 1 zero, 2 v0, 3 v1, 4 ...
    "batch norm and relu": ([("batch_std", 0), ("DIV", 0, 4), ("MAX", 5, 1)], ""),
    "no x": ([("MUL", 2, 3), ("EXP", 4)], "blind"),
    "x in a dead node": ([("EXP", 0), ("ADD", 2, 3)], "blind"),
    "a statistic alone": ([("instance_std", 0), ("EXP", 4)], "flat"),
    "the same for all channels": ([("layer_mean", 0), ("layer_std", 0), ("DIV", 4, 5)], "flat"),
    "zero times x": ([("MUL", 0, 1)], "constant"),
    "x/x": ([("DIV", 0, 0)], "constant"),
    "division by zero": ([("DIV", 0, 1)], "value"),
    "division by v0, which starts at zero": ([("DIV", 0, 2)], "value"),
    "v0*x, whose gradient starts at zero": ([("MUL", 2, 0)], "gradient"),
    "zero times x and v1, which differs by channel": ([("MUL", 0, 1), ("ADD", 4, 3)], "gradient"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_layer_meets_its_stage(name):
    nodes, stage = PLANTED[name]
    screen = Screen(EVONORM)
    assert screen(made(*nodes)).rejected == stage


def test_batch_independence_is_that_of_the_live_layer():
    dead = made(("batch_std", 0), ("group_std", 0), ("DIV", 0, 5))
    live = made(("batch_std", 0), ("DIV", 0, 4))
    assert [Screen(EVONORM, "S")(g).rejected for g in (dead, live)] == ["", "series"]
    assert Screen(EVONORM, "B")(live).rejected == ""


def test_a_statistic_alone_may_be_wanted():
    alone = made(("instance_std", 0), ("EXP", 4))
    assert [Screen(EVONORM, full=full)(alone).rejected for full in (True, False)] == ["flat", ""]


def test_equal_layers_pass_once():
    screen = Screen(EVONORM)
    one = made(("ADD", 0, 0), ("TANH", 4))
    same = made(("MUL", 0, 3), ("ADD", 0, 0), ("TANH", 5))
    equal = made(("NEG", 0), ("NEG", 4), ("ADD", 5, 0), ("TANH", 6))
    other = made(("TANH", 0), ("ADD", 4, 4))
    found = [screen(g).rejected for g in (one, same, equal, other)]
    assert found == ["", "form", "duplicate", ""]
    assert screen.counts == {"screened": 4, "passed": 2, "form": 1, "duplicate": 1}


def test_the_form_of_a_layer_ignores_the_order_of_operands():
    one = made(("TANH", 0), ("MAX", 0, 4), ("DIV", 5, 0))
    same = made(("TANH", 0), ("MAX", 4, 0), ("DIV", 5, 0))
    other = made(("TANH", 0), ("MAX", 0, 4), ("DIV", 0, 5))
    names = [form(g.expr(EVONORM)) for g in (one, same, other)]
    assert names[0] == names[1] != names[2]


def scores(text):
    digest = hashlib.sha256(text.encode()).digest()
    return tuple(b / 255 for b in digest[:3])


def evolved(workers, evaluations=60, seed=3):
    study, running, chance = Study(Evolution(seed=seed, population=20)), [], random.Random(workers)
    while len(study.scores) < evaluations:
        while len(running) < workers and study.ready:
            running.append(study.ask())
        one = running.pop(chance.randrange(len(running)))
        failed = one.number % 7 == 0
        study.tell(one.number, None if failed else scores(one.text))
    return study


def test_the_same_layers_whoever_is_faster():
    one, many = evolved(1), evolved(8)
    assert [c.text for c in one.candidates[:60]] == [c.text for c in many.candidates[:60]]
    assert any(c.parent is not None for c in one.candidates)


def test_a_run_goes_on_as_if_it_had_never_stopped():
    whole = evolved(1, 60)
    half = Study(Evolution(seed=3, population=20))
    for one in whole.candidates[:30]:
        half.replay(one, whole.scores[one.number], told=True)
    for number in range(30, 60):
        one = half.ask()
        assert one == whole.candidates[number]
        half.tell(number, whole.scores[number])


def test_only_the_known_is_built_on():
    study = Study(Evolution(lag=2))
    study.ask(), study.ask()
    with pytest.raises(NormcError, match="candidate 0 is still to be told"):
        study.ask()
    study.tell(0, (float("nan"), 1.0))
    assert study.scores[0] is None  # a score that is not finite is none
    with pytest.raises(NormcError, match="told already"):
        study.tell(0, (1.0,))
    with pytest.raises(NormcError, match="never asked"):
        study.tell(9, (1.0,))


def test_half_of_the_candidates_are_mutants():
    """However many graphs are rejected on the way to each."""
    study = Study(Evolution(seed=5, population=20, lag=1))
    for number in range(220):
        candidate = study.ask()
        study.tell(number, [number % 7, len(candidate.text)] if number % 3 else None)
    mutants = sum(c.parent is not None for c in study.candidates[20:])
    assert 80 <= mutants <= 120
