"""Bytes moved: counted by hand for known plans, in the text of kernels, and then in bytes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normc.backends.tile_kernel import Printer
from normc.backends.tiles import forms
from normc.formula import parse, zoo
from normc.language.axes import FULL
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.cost import moved, show_bytes, ways
from normc.schedule.fission import cut
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST
from tests.properties.formulas import formulas

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


# --- on chip, and in loops ------------------------------------------------------------------------

ORDERS = {"first": CHANNELS_FIRST, "last": CHANNELS_LAST}
BOTH = ("first", "last")

TWICE_AT_MOST = [
    # x is read once on chip, and else once more: 2A and 3A, at most 3A and 5A
    *[("layer_norm", order) for order in BOTH],
    ("layer_norm_tokens", "last"),
    ("rms_norm", "last"),
    *[("group_norm", order) for order in BOTH],
    *[("gn_silu", order) for order in BOTH],
    ("batch_norm", "first"),
    ("bn_relu", "first"),
    *[("instance_norm", order) for order in BOTH],
    *[("evonorm_s0", order) for order in BOTH],
    ("evonorm_b0", "first"),
    *[("frn_tlu", order) for order in BOTH],
    *[("grn", order) for order in BOTH],
    *[("dyt", order) for order in BOTH],
]


def triton_jobs(formula, order):
    return all_jobs(formula, Target("triton", "float32", ORDERS[order]))


def triton_ways(formula, order):
    return [ways(job.plan, job.dense) for job in triton_jobs(formula, order)]


@pytest.mark.parametrize(("name", "order"), TWICE_AT_MOST)
def test_on_chip_x_is_read_once_and_else_twice_at_most(name, order):
    forward, backward = triton_ways(zoo[name], order)
    assert (forward.once.full, backward.once.full) == (2, 3)
    assert forward.streaming.full <= forward.split.full <= 3
    assert backward.streaming.full <= backward.split.full <= 5


def test_without_statistics_tokens_are_read_once_by_loops_too():
    for forward, backward in (triton_ways(zoo[name], "last") for name in ("dyt", "derf")):
        assert (forward.split.full, backward.split.full) == (2, 3)


@pytest.mark.parametrize(
    ("name", "order", "forward", "backward"),
    [  # of plans whose kernels each read x: on chip, and in loops
        ("batch_norm", "last", (3, 3), (5, 5)),
        ("switchable_norm", "first", (4, 4), (6, 6)),
        ("l1_batch_norm", "first", (2, 4), (3, 5)),
        ("rms_norm", "first", (2, 3), (5, 7)),
        ("ada_layer_norm", "last", (2, 3), (5, 7)),
    ],
)
def test_several_kernels_read_again(name, order, forward, backward):
    found = triton_ways(zoo[name], order)
    assert [(w.once.full, w.split.full) for w in found] == [forward, backward]
    assert [bool(w.again) for w in found] == [w.once.full > w.floor.full for w in found]


def test_a_second_read_is_counted_and_named():
    (job, _) = triton_jobs(zoo["rms_norm"], "last")
    assert ways(job.plan).once.full == 2
    apart = ways(cut(job.plan))
    assert apart.once.full == 3
    assert apart.again == (("x", ("k0a", "k0b")),)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", list(zoo))
def test_the_text_of_every_kernel_reads_and_writes_as_often_as_is_counted(name, order):
    text_is_as_counted(zoo[name], order)


@given(formulas(), st.sampled_from(BOTH))
def test_so_does_the_text_for_any_formula(text, order):
    text_is_as_counted(parse(text), order)


def text_is_as_counted(formula, order):
    for job in triton_jobs(formula, order):
        found = ways(job.plan, job.dense)
        counted = {
            "resident": found.once,
            "cluster": found.once,
            "streaming": found.streaming,
            "split": found.split,
        }
        assert found.floor.full <= found.once.full <= found.streaming.full <= found.split.full
        for schedule, traffic in counted.items():
            assert printed(job, schedule) == traffic.full, (job.part, schedule)


def printed(job, schedule):
    """How often the text of a job under one schedule has a load or store of a full-size tensor."""
    known = [forms(job, kernel) for kernel in job.plan.kernels]
    count = 0
    for form in (form for one in known for form in one.get(schedule, one["resident"])):
        text = Printer(form).kernel()
        moving = [v for w in form.kernel.sweeps for v in (*w.reads, *w.stores)]
        for name in {v.name for v in moving if v.axes == FULL}:
            count += len(re.findall(rf"\btl\.(?:load|store)\({name}_ptr\b", text))
    return count


# --- in bytes -------------------------------------------------------------------------------------


def test_bytes_count_small_tensors_once_per_sweep():
    forward, _ = costs(parse("x / group_rms(x) * gamma"))
    statistic, gamma = 8 * 8, 64
    # written by the first sweep, read by the second, and kept for backward
    assert forward.streaming.bytes(SHAPE, 4) == 4 * (3 * A + 2 * statistic + gamma)
    assert forward.floor.bytes(SHAPE, 4) == 4 * (2 * A + statistic + gamma)


def test_bytes_on_chip_leave_out_what_no_other_kernel_reads():
    (job, _) = triton_jobs(parse("x / group_rms(x) * gamma"), "first")
    found = ways(job.plan, job.dense)
    statistic, gamma = 8 * 8, 64
    assert found.once.bytes(SHAPE, 4) == 4 * (2 * A + statistic + gamma)  # kept for backward
    assert found.streaming.bytes(SHAPE, 4) == 4 * (3 * A + 2 * statistic + gamma)
    assert found.split.bytes(SHAPE, 4) == found.streaming.bytes(SHAPE, 4)


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
