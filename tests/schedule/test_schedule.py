"""Schedules: which kernels, which grids, which sweeps; for any formula, in both memory orders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import normc
from normc.language.axes import FULL, NONE, Axis
from normc.language.show import show_expr
from normc.pipeline import programs
from normc.schedule.plan import Able
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST, schedule
from tests.properties.formulas import formulas

ABLE = {"plain": Able(), "carry": Able(carry=True), "all": Able(carry=True, keep=True)}
ORDERS = {"channels_first": CHANNELS_FIRST, "channels_last": CHANNELS_LAST}


def both(text):
    f = normc.parse(text)
    wrt = ("x", *(i.name for i in f.inputs), *(p.name for p in f.params))
    found = programs(f.definition, wrt)
    return [p for p in (found.forward, found.backward) if p is not None]


def legal(plan):
    """Everything a plan promises its backends."""
    stored: dict[str, str] = {}
    for kernel in plan.kernels:
        own: set[str] = set()
        for sweep in kernel.sweeps:
            assert not sweep.rows & sweep.cols and not (sweep.rows | sweep.cols) & kernel.grid
            reach = kernel.grid | sweep.rows | sweep.cols
            for v in sweep.reads:
                known = stored.get(v.name)
                inputs = {i.name for i in plan.program.inputs}
                assert v.name in inputs or v.name in own or known, f"{v.name} is read too early"
                assert not v.axes & ~reach
            for v in sweep.stores:
                assert v.name not in stored, f"{v.name} is stored twice"
                carried = v.name in {s.name for s in sweep.carries}
                assert carried or not kernel.grid & ~v.axes, f"{v.name} has several instances"
                stored[v.name] = kernel.name
            for fold in sweep.folds:
                assert all(s.over == sweep.cols and s.kept == kernel.grid | sweep.rows
                           for s in fold.stats)  # fmt: skip
            for stat in sweep.carries:
                assert stat.over == kernel.grid and stat.kept == sweep.rows | sweep.cols
            own |= {v.name for v in sweep.stores} - {s.name for s in sweep.carries}
            own |= {k.name for k in sweep.keeps}
    wanted = {s.name for s in plan.program.stats} | {o.name for o in plan.program.outputs}
    assert set(stored) == wanted
    # what an instance reads of its own kernel's statistics, it has computed itself
    for kernel in plan.kernels:
        mine = {v.name for s in kernel.sweeps for v in s.stores}
        for sweep in kernel.sweeps:
            assert all(not kernel.grid & ~v.axes for v in sweep.reads if v.name in mine)


@pytest.mark.parametrize("able", ABLE.values(), ids=ABLE)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", normc.zoo)
def test_zoo_plans_are_legal(name, order, able):
    for program in both(normc.zoo[name].text):
        legal(schedule(program, order, able))


@given(formulas(), st.sampled_from(list(ORDERS.values())), st.sampled_from(list(ABLE.values())))
def test_random_plans_are_legal(text, order, able):
    for program in both(text):
        legal(schedule(program, order, able))


def test_a_row_norm_carries_its_parameter_gradients():
    backward = both(normc.zoo["layer_norm_tokens"].text)[1]
    main, finish = schedule(backward, CHANNELS_LAST, Able(carry=True)).kernels
    assert {s.over for s in main.carries} == {Axis.N | Axis.S}
    assert not finish.reads or "x" not in {v.name for v in finish.reads}


@pytest.mark.parametrize(
    "name, grids",
    [
        ("evonorm_s0", [Axis.N | Axis.G]),
        ("batch_norm", [Axis.G | Axis.K]),
        ("evonorm_b0", [Axis.G | Axis.K]),
        ("layer_norm_tokens", [Axis.N | Axis.S]),
        ("dyt", [Axis.N | Axis.G | Axis.K]),
    ],
)
def test_forward_grids(name, grids):
    forward = both(normc.zoo[name].text)[0]
    assert [k.grid for k in schedule(forward).kernels] == grids


def test_parameter_gradients_ride_in_the_main_kernel_as_partial_sums():
    backward = both("x/group_rms(x)*gamma + beta")[1]
    plan = schedule(backward)
    assert [k.grid for k in plan.kernels] == [Axis.N | Axis.G, Axis.G | Axis.K]
    main, finish = plan.kernels
    assert "x" in {v.name for v in main.reads} and "x" not in {v.name for v in finish.reads}


def test_a_statistic_over_everything_leaves_every_pass_over_x_parallel():
    plan = schedule(both("x/all_rms(x)")[0])
    assert [k.grid for k in plan.kernels] == [Axis.N, NONE, FULL & ~Axis.S]


def test_channels_last_batch_statistics_are_taken_per_sample_in_rows_of_channels():
    forward, backward = both(normc.zoo["batch_norm"].text)
    rows = Axis.N | Axis.G | Axis.K
    for program in (forward, backward):
        plan = schedule(program, CHANNELS_LAST)
        assert [k.grid for k in plan.kernels] == [rows, Axis.G | Axis.K, rows]


def test_a_sum_may_be_split_twice():
    text = "param alpha = 0.5; alpha, sigmoid(v + batch_group_l1(x))"
    for program in both(text):
        for order in ORDERS.values():
            legal(schedule(program, order))


def test_coarse_statistics_come_from_finer_ones():
    forward, backward = both(normc.zoo["evonorm_b0"].text)
    for program in (forward, backward):
        sweeps = [s for k in schedule(program).kernels for s in k.sweeps]
        assert sum(any(v.axes == FULL for v in s.reads) for s in sweeps) == 2


def test_a_dear_value_is_computed_in_one_sweep_only():
    backward = both(normc.zoo["evonorm_s0"].text)[1]
    plain, kept = (schedule(backward, able=a) for a in (Able(), Able(keep=True)))
    assert [plan.show().count("sigmoid") > 0 for plan in (plain, kept)] == [True, True]
    last = next(s for s in kept.kernels[0].sweeps if s.writes)
    assert "sigmoid" not in "".join(show_expr(e) for e in last.exprs)
    assert {k.name for k in kept.keeps} == {"kept0"} and not plain.keeps


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "add_rms_norm"])
def test_golden_plans(name, order, golden):
    label = next(k for k, v in ORDERS.items() if v == order)
    text = "\n\n".join(schedule(p, order).show() for p in both(normc.zoo[name].text))
    golden(f"{name}_{label}", text + "\n")
