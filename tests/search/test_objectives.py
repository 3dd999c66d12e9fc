"""Objectives: what each measures, on layers for which it is known."""

import math
from dataclasses import replace

import pytest

import normc
from normc.errors import NormcError
from normc.search.objectives import OBJECTIVES, SHAPE, Objective, Trained, expand, score_names
from normc.search.setting import Setting

pytestmark = pytest.mark.cpu

COPY, GATED = "x*gamma + beta", "x*sigmoid(v1*x)/group_std(x)*gamma + beta"


def trained(text, **changes):
    setting = replace(Setting(), **changes)
    return Trained(normc.parse(text), setting, {}, {"resnet": 0.5, "mobilenet": 0.25})


def test_bytes_are_those_that_the_plans_move():
    """Forward reads x and writes a result; backward reads x, and the cotangent in two sweeps."""
    assert OBJECTIVES["bytes"](trained(COPY)) == pytest.approx(-6, abs=0.01)
    assert -12 < OBJECTIVES["bytes"](trained(GATED)) < -7


def test_a_layer_that_does_more_takes_longer():
    fast, slow = (OBJECTIVES["latency"](trained(text)) for text in (COPY, GATED))
    assert slow < fast < -1


def test_digits_are_those_of_float32():
    found = OBJECTIVES["error"](trained(GATED))
    assert 4 < found < 8
    cancelling = OBJECTIVES["error"](trained("((x + 1000) - 1000)*gamma + beta"))
    assert cancelling < found - 1


def test_a_score_has_a_name():
    setting = replace(
        Setting(), architectures=("resnet", "mobilenet"), objectives=("accuracy", "bytes", "short")
    )
    short = Objective("short", lambda trained: -len(trained.formula.text))
    assert score_names(setting) == ("accuracy resnet", "accuracy mobilenet", "bytes", "short")
    found = expand(setting, [short])
    assert [o.name for o in found] == list(score_names(setting))
    known = trained(COPY)
    assert [o.measure(known) for o in (found[0], found[1], found[3])] == [0.5, 0.25, -len(COPY)]
    with pytest.raises(NormcError, match="no objective is called `short`"):
        expand(setting)
    with pytest.raises(NormcError, match="did you mean `bytes`"):
        expand(replace(setting, objectives=("bites",)))


def test_costs_are_counted_on_one_tensor():
    assert math.prod(SHAPE) * 4 < 2**25
