"""Operations and bytes: counted by hand, and by torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import normc
from normc.language.geometry import Geometry
from normc.program.flatten import flatten_definition
from normc.schedule.flops import flops

pytestmark = pytest.mark.cpu

BY_HAND = {  # on (2, 6, 5) with 3 groups: 60 elements, 6 channels, 6 groups of samples
    "x + 1": 60,
    "gamma*2*x": 6 + 60,
    "relu(x)": 60,  # max(x, 0)
    "x - batch_mean(x)": 60 + 60,
    "x/group_rms(x)": 60 + 60 + 6 + 6 + 60,  # square, add up; + eps, sqrt; divide
    "x*instance_sum(x)": 60 + 60,
}


@pytest.mark.parametrize("text", BY_HAND)
def test_operations_by_hand(text):
    program = flatten_definition(normc.parse(text).definition)
    assert flops(program, Geometry.of((2, 6, 5), 3)) == BY_HAND[text]


def test_what_is_shared_counts_once():
    once, twice = (
        flops(flatten_definition(normc.parse(t).definition), Geometry.of((2, 6, 5)))
        for t in ("sin(x)", "sin(x)*sin(x)")
    )
    assert twice == once + 60


@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "add_rms_norm", "layer_norm"])
def test_the_counter_of_torch_counts_what_cost_says(name):
    layer = normc.Layer(normc.zoo[name], 8, groups=2, track_running_stats=False)
    given = {i.name: torch.randn(2, 8, 3, 3, requires_grad=True) for i in layer.formula.inputs}
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x, **given)
        sum(t.sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
    cost = layer.op.cost(x, 2)
    counts = counter.get_flop_counts()["Layer"]
    assert counts[torch.ops.normc.forward] == cost.forward.flops
    assert counts[torch.ops.normc.backward] == cost.backward.flops


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_plan(dtype, size):
    x = torch.randn(4, 8, 16, 16, dtype=dtype)
    cost = normc.compile("x/group_rms(x)").cost(x, groups=2)
    statistics = 4 * 2 * 4  # one float32 for each group of a sample
    assert cost.forward.floor == 2 * x.numel() * size + statistics  # which backward reads
    assert cost.forward.bytes == 3 * x.numel() * size + 2 * statistics  # stored and read again
    assert cost.backward.floor == 3 * x.numel() * size + statistics
