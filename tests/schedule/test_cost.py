"""Bytes moved: counted in tensors by hand for known plans, then in bytes."""

import pytest

from normc.formula import parse, zoo
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.cost import moved, show_bytes
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

SHAPE = Geometry.of((8, 64, 16, 16), 8)
A = 8 * 64 * 16 * 16  # elements


def costs(formula, order=CHANNELS_FIRST):
    jobs = all_jobs(formula, Target("torch", "float32", order))
    return [moved(job.plan, job.dense) for job in jobs]


FLOORS = [
    # what has to be read and written once: forward, backward
    ("evonorm_s0", 2, 3),
    ("batch_norm", 2, 3),
    ("dyt", 2, 3),
    ("add_rms_norm", 4, 4),  # x, residual, two results; two cotangents and two gradients
    ("gated_rms_norm", 3, 5),
    ("spade", 4, 6),
]


@pytest.mark.parametrize(("name", "forward", "backward"), FLOORS)
@pytest.mark.parametrize("order", [CHANNELS_FIRST, CHANNELS_LAST], ids=["first", "last"])
def test_the_floor_counts_every_full_tensor_once(name, forward, backward, order):
    assert [c.floor.full for c in costs(zoo[name], order)] == [forward, backward]


@pytest.mark.parametrize("name", list(zoo))
@pytest.mark.parametrize("order", [CHANNELS_FIRST, CHANNELS_LAST], ids=["first", "last"])
def test_no_plan_is_below_its_floor(name, order):
    for cost in costs(zoo[name], order):
        assert cost.streaming.full >= cost.floor.full
        assert cost.streaming.bytes(SHAPE, 4) >= cost.floor.bytes(SHAPE, 4)


def test_a_statistic_costs_one_more_read():
    forward, backward = costs(parse("x / layer_rms(x)"))
    assert forward.show() == "floor 2A, streaming 3A (small: s0)"
    assert backward.streaming.full == 5  # x and d_y for the statistic, x and d_y again, d_x


def test_without_statistics_streaming_is_the_floor():
    (forward, _) = costs(parse("sigmoid(x)"))
    assert forward.show() == "floor 2A, streaming 2A"
    assert forward.floor == forward.streaming


def test_bytes_count_small_tensors_once_per_sweep():
    forward, _ = costs(parse("x / group_rms(x) * gamma"))
    statistic, gamma = 8 * 8, 64
    # written by the first sweep, read by the second, and kept for backward
    assert forward.streaming.bytes(SHAPE, 4) == 4 * (3 * A + 2 * statistic + gamma)
    assert forward.floor.bytes(SHAPE, 4) == 4 * (2 * A + statistic + gamma)


def test_statistics_stay_wide_in_half_precision():
    forward, backward = costs(parse("x / group_rms(x)"))
    statistic = 8 * 8
    assert forward.floor.bytes(SHAPE, 2) == 2 * 2 * A + 4 * statistic
    assert backward.floor.bytes(SHAPE, 2) == 2 * 3 * A + 4 * statistic  # read, as forward saved it
    assert forward.floor.bytes(SHAPE, 8) == 8 * (2 * A + statistic)


def test_text_is_symbolic_and_concrete():
    forward, _ = costs(parse("x / group_rms(x)"))
    assert forward.show_bytes(SHAPE, 4) == "floor 1.0 MiB, streaming 1.5 MiB (1.50x)"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")],
)
def test_bytes_for_people(count, text):
    assert show_bytes(count) == text
