"""The text of Triton kernels and the sizes of their tiles; nothing here needs Triton."""

import ast

import pytest

import normc
from normc.backends.gpus import MACHINES
from normc.backends.tile_choice import candidates, choose
from normc.backends.tiles import source
from normc.backends.tiling import Form, ceiling
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST
from tests.layers import LEADERS

ORDERS = {"first": CHANNELS_FIRST, "last": CHANNELS_LAST}
NAMES = ("in_", "n", "c", "tl", "part", "program", "s0", "s2_parts", "s0_t", "x_n", "c_in", "span")


def jobs(text, order=CHANNELS_FIRST, dtype="float32", unit=True):
    f = normc.zoo[text] if text in normc.zoo else normc.parse(text)
    return all_jobs(f, Target("triton", dtype, order, unit))


@pytest.mark.parametrize(
    "name, order", [("evonorm_s0", "first"), ("layer_norm_tokens", "last"), ("evonorm_b0", "last")]
)
def test_the_text_is_the_golden_one(golden, name, order):
    text = "\n".join(source(job) for job in jobs(name, ORDERS[order]))
    golden(f"{name}_channels_{order}", text)


def arguments(text):
    return [
        [a.arg for a in node.args.args]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    ]


def in_turns():
    """Every layer in two dtypes and both orders; in `make test` one of a kind in one of each."""
    for i, name in enumerate(normc.zoo):
        for j, dtype in enumerate(["float64", "bfloat16"]):
            for k, order in enumerate(ORDERS):
                now = name in LEADERS and (i + j) % 2 == 0 and j == k
                marks = () if now else (pytest.mark.thorough,)
                yield pytest.param(name, dtype, order, marks=marks)


@pytest.mark.parametrize(("name", "dtype", "order"), list(in_turns()))
def test_every_layer_has_a_text_that_parses(name, dtype, order):
    for job in jobs(name, ORDERS[order], dtype, unit=False):
        assert all(len(set(names)) == len(names) for names in arguments(source(job)))


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_user_collides(name):
    text = f"input {name}; h = x*{name} + gamma; h/group_std(h) + {name}"
    for job in jobs(text, unit=False):
        assert all(len(set(names)) == len(names) for names in arguments(source(job)))


def test_a_formula_of_several_lines_stays_in_its_comment():
    for job in jobs("h = x*x\nh/group_std(h)  # import os"):
        lines = source(job).splitlines()
        assert lines[:2] == [f"# {job.entry}", "# h = x*x h/group_std(h) # import os"]


GEOMETRIES = [
    Geometry.of((32, 64, 56, 56), 32),
    Geometry.of((2, 7, 3, 1), 7),
    Geometry.of((4096, 768), 1),
    Geometry.of((8, 1024, 4096), 1, -1),
    Geometry.of((0, 4, 5), 2),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "rms_norm", "dyt", "grn"])
def test_tiles_are_powers_of_two_and_no_larger_than_needed(name, geometry, order):
    for job in jobs(name, ORDERS[order]):
        for kernel in job.plan.kernels:
            for schedule in candidates(job, kernel, geometry, MACHINES["sm_90"]):
                for config in schedule:
                    check_config(config, geometry)


def check_config(config, geometry):
    form, blocks = config.form, dict(config.blocks)
    assert set(config.constants) == {d.block(i) for d, i in form.blocks} | set(form.shares)
    assert all(blocks[d.block()] == 1 for d in form.grid if d not in form.tile)
    for d, i in form.blocks:
        size = blocks[d.block(i)]
        assert size == ceiling(size) <= ceiling(geometry.count(d.axes))
    for d in form.free if form.shared else ():
        share = blocks[d.block()] if form.resident else blocks[d.share]
        count = max(1, geometry.count(d.axes))
        assert share == ceiling(share)
        assert (blocks[d.parts] - 1) * share < count <= blocks[d.parts] * share
    assert config.warps in (1, 2, 4, 8, 16, 32)


def test_what_fits_stays_on_chip_and_is_read_once():
    forward, _ = jobs("evonorm_s0")
    (kernel,) = forward.plan.kernels

    def chosen(shape):
        return choose(forward, kernel, Geometry.of(shape, 32))[0].form.schedule

    assert chosen((32, 256, 28, 28)) == "resident"  # groups of 6,272 elements
    assert chosen((1, 32, 4096, 4096)) == "split"  # a few groups that fill a GPU alone
    assert chosen((2048, 64, 160, 160)) == "streaming"  # many that do not fit on chip
    assert chosen((16, 64, 512, 512)) == "cluster"  # what all processors together hold


def test_groups_and_channels_are_one_dimension_where_nothing_tells_them_apart():
    (kernel,) = jobs("batch_norm")[0].plan.kernels
    form = Form(jobs("batch_norm")[0], kernel, True)
    assert [d.letter for d in form.dims] == ["n", "c", "s"]
    (kernel,) = jobs("group_norm")[0].plan.kernels
    form = Form(jobs("group_norm")[0], kernel, True)
    assert [d.letter for d in form.dims] == ["n", "g", "k", "s"]
