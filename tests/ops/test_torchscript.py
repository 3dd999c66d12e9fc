"""torch.jit.trace: plain torch operations are written down, so that a trace needs no normc."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normc

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # sizes are asked for
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.(trace|load|save|trace_method):DeprecationWarning"
    ),
]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["rms_norm", "evonorm_s0", "evonorm_b0", "grn"])
def test_a_traced_layer_computes_the_same_for_other_sizes(name, training, gradients):
    layer = normc.Layer(name, 8).train(training)
    other = copy.deepcopy(layer)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, draw(2, 8, 3, 3), check_trace=not training)
    assert not [n for n in traced.inlined_graph.nodes() if n.kind().startswith("normc")]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = draw(4, 8, 5, 6)
    assert_close(torch.jit.load(file)(x), other(x), rtol=1e-5, atol=1e-5)


def test_a_traced_network_has_the_gradients_of_the_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), normc.Layer("evonorm_s0", 8))
    x = draw(2, 3, 6, 6)
    traced = torch.jit.trace(net, x)
    for other in (traced, net):
        other.zero_grad()
        other(x).square().sum().backward()
    found = [p.grad.clone() for p in traced.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for grad, p in zip(found, net.parameters(), strict=True):
        assert_close(grad, p.grad, rtol=1e-4, atol=1e-4)
