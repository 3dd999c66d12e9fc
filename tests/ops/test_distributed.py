"""Networks with layers in them, where torch takes models apart: training in several processes,
copies and files, and CUDA graphs.

What `tests.ops.sync_worker` trains in two processes is trained here in one, on the whole batch.
"""

import copy
from functools import cache

import pytest
import torch
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import normc
from tests.ops.sync_worker import NETS, draw, findings, images, learn, network

pytestmark = pytest.mark.cpu

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # of float64
on_nets = pytest.mark.parametrize("name", NETS)


def found(name):
    every = [one[name] for one in findings("training", 2)]
    failed = [one for one in every if isinstance(one, str)]
    assert not failed, failed[0]
    return every


@cache
def whole(name):
    """The losses, the state, and the model after three steps on the whole batch."""
    model = network(name, sync=False)
    losses = learn(model, *images())
    return losses, model.state_dict(), model.eval()


# --- several processes --------------------------------------------------------------------------


def assert_losses(every, want):
    assert_close([sum(losses) / 2 for losses in zip(*every, strict=True)], want, **EXACT)
    assert want[-1] < 0.9 * want[0], "there is something to learn"


@on_nets
def test_copies_in_two_processes_learn_what_one_learns(name):
    """nn.parallel.DistributedDataParallel; it averages what each has from its half."""
    every, (losses, state, _) = found(f"copies {name}"), whole(name)
    assert_losses([one[0] for one in every], losses)
    for one in every:
        assert_close(one[1], state, **EXACT)


@on_nets
def test_shards_in_two_processes_learn_what_one_learns(name):
    """fully_shard; each process keeps a half of every parameter, and buffers whole."""
    every, (losses, state, model) = found(f"shards {name}"), whole(name)
    assert_losses([one[0] for one in every], losses)
    for _, full, _, _ in every:
        assert_close(full, state, **EXACT)
    kept = [one[2] for one in every]
    assert {n: kept[0][n] + kept[1][n] for n in kept[0]} == sizes(model)
    assert all(kept[0][n] == kept[1][n] for n in kept[0] if n.startswith(("1.", "3.")))


def sizes(model):
    return {n: p.numel() for n, p in model.named_parameters()}


@on_nets
def test_the_state_of_shards_travels(name):
    """From one sharded model into another, and from there into a plain one."""
    model = whole(name)[2]
    want = model(images()[0])
    own, others = zip(*(one[3] for one in found(f"shards {name}")), strict=True)
    assert_close(torch.cat(own), want, **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))
    plain = network(name, seed=2, sync=False)
    plain.load_state_dict(found(f"shards {name}")[0][1])
    assert_close(plain.eval()(images()[0]), want, **EXACT)


@on_nets
def test_narrow_shards(name):
    """Parameters come in bfloat16, gradients go in float32; buffers stay as they are."""
    every = found(f"narrow shards {name}")
    model = network(name, dtype=torch.float32, sync=False).float()
    narrow = {n: p.detach().bfloat16().requires_grad_() for n, p in model.named_parameters()}
    y = functional_call(model, narrow, images()[0].bfloat16())
    y.float().square().sum().backward()
    assert [one[0].dtype for one in every] == [torch.bfloat16] * 2 == [y.dtype] * 2
    assert_close(torch.cat([one[0] for one in every]), y, rtol=0.02, atol=0.02)
    want = [p.grad.float() / 2 for p in narrow.values()]  # shards' gradients are averaged
    size = max(t.abs().max().item() for t in want)
    for _, grads, buffers in every:
        assert_close(grads, want, rtol=0.05, atol=0.02 * size)
        assert_close(buffers, list(model.buffers()), rtol=0.01, atol=0.01)


# --- copies and files ---------------------------------------------------------------------------


def trained(name):
    """A network that has left its start, in float32."""
    model = network(name, dtype=torch.float32).float()
    learn(model, images()[0].float(), images()[1])
    return model


@on_nets
def test_a_deep_copy_of_a_model_is_equal_and_independent(name):
    model, (x, y) = trained(name), images()
    x, before = x.float(), copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    assert repr(twin) == repr(model)
    losses = learn(twin, x, y)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(learn(model, x, y), losses, rtol=0, atol=0)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@on_nets
def test_a_moving_average_of_models(name):
    """torch.optim.swa_utils copies a model, and averages parameters and buffers."""
    model = trained(name)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    states = [copy.deepcopy(model.state_dict())]
    learn(model, images()[0].float(), images()[1])
    average.update_parameters(model)
    states.append(model.state_dict())
    for key, mine in average.module.state_dict().items():
        if mine.is_floating_point():
            assert_close(mine, (states[0][key] + states[1][key]) / 2)
    assert average.eval()(images()[0].float()).isfinite().all()


def to_torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def to_safetensors(state, path):
    files = pytest.importorskip("safetensors.torch")
    files.save_file(state, path)
    return files.load_file(path)


@pytest.mark.parametrize("through", [to_torch, to_safetensors])
@on_nets
def test_state_goes_through_a_file_to_the_bit(name, through, tmp_path):
    model, other = trained(name), network(name, seed=1, dtype=torch.float32).float()
    state = through(model.state_dict(), tmp_path / "state")
    other.load_state_dict(state)
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = images()[0].float()
    assert torch.equal(other.eval()(x), model.eval()(x))


# --- CUDA graphs --------------------------------------------------------------------------------


def pulled(layer, x, weight):
    """The result and all gradients, which stay in the tensors they were first written to."""
    y = layer(x)
    (y * weight).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


def forget(layer, x):
    x.grad = None
    layer.zero_grad()


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["evonorm_s0", "layer_norm", "batch_norm", "evonorm_b0"])
def test_a_cuda_graph_replays_forward_and_backward_on_new_data(name, dtype, momentum):
    layer = normc.Layer(normc.zoo[name], 8, groups=4, momentum=momentum, device="cuda")
    x, weight = (draw((4, 8, 6, 5), seed).to("cuda", dtype) for seed in (0, 1))
    x.requires_grad_()
    warm_up(layer, x, weight)
    eager = copy.deepcopy(layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pulled(layer, x, weight)
    for seed in (2, 3):
        fresh = draw(x.shape, seed).to("cuda", dtype)
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        forget(eager, fresh)
        assert_close(got, pulled(eager, fresh.requires_grad_(), weight))
        assert_close(list(layer.buffers()), list(eager.buffers()))


def warm_up(layer, x, weight):
    """Kernels are compiled, and memory is found, on a stream beside, as torch.cuda.graph asks."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            forget(layer, x)
            pulled(layer, x, weight)
    torch.cuda.current_stream().wait_stream(beside)
    forget(layer, x)
