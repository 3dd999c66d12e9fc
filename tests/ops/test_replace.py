"""replace_norms, revert_norms and norm_layer: torch models whose norms become layers, and back."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import normc
from normc.ops.dropin import activates, without_activation
from normc.ops.replace import _FORMER

BN_RELU = "relu((x - batch_mean(x))/batch_std(x)*gamma + beta)"


class TorchvisionBlock(nn.Module):
    """One relu, called twice: it cannot be taken out."""

    def __init__(self, c=8, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), norm(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), norm(c)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class TimmBlock(nn.Module):
    """act1 follows bn1, with nothing between that does something; act2 follows the sum."""

    def __init__(self, c=8, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1), norm(c)
        self.drop_block, self.act1, self.aa = nn.Identity(), nn.ReLU(inplace=True), None
        self.conv2, self.bn2, self.se = nn.Conv2d(c, c, 3, padding=1), norm(c), None
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        if self.aa is not None:
            x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        x += shortcut
        return self.act2(x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(8), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(x))


class Sum(Nested):
    def forward(self, x):
        return self.act(self.norm(x) + x)


class Tokens(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True)
        self.norm2 = nn.RMSNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 32), nn.GELU(), nn.Linear(32, d))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, c, act=None):
        super().__init__(c)
        self.drop, self.act = nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DenseLayer(Nested):
    """torchvision's: the pair is in a method of its own."""

    def bottleneck(self, x):
        return self.act(self.norm(x))

    def forward(self, x):
        return self.bottleneck(x) + x


class Twice(DenseLayer):
    def forward(self, x):
        return self.act(self.bottleneck(x) + x)


def stem(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU())


def network():
    torch.manual_seed(0)
    net = nn.Sequential(stem(), TorchvisionBlock(), TimmBlock(), nn.Flatten(), nn.LazyLinear(2))
    for _ in range(3):  # weights and statistics of their own
        net(images() * 2 + 1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def kinds(module):
    return [type(m).__name__ for m in module]


def learn(net, x, steps=3):
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()


# --- what contains an activation ------------------------------------------------------------------


def test_the_expression_decides_what_contains_an_activation():
    active = {n for n in normc.zoo if activates(normc.zoo[n])}
    assert active == {
        *("evonorm_b0", "evonorm_b1", "evonorm_b2", "evonorm_s0", "evonorm_s1", "evonorm_s2"),
        *("frn_tlu", "bn_relu", "gn_silu", "dyt", "derf", "dyisru", "tlu"),
        *("gn_relu", "bn_silu", "bn_add_relu", "ln_gelu", "rms_silu"),
        *(name for name in normc.zoo if name.startswith("pointwise_")),
    }
    assert activates(normc.parse("x*x/channel_rms(x)"))
    assert activates(normc.parse("gamma/(1 + x)"))
    assert not activates(normc.parse("where(gamma > 0, x, -x/2)*channel_max(relu(x))"))


def test_without_its_activation_a_formula_is_what_was_activated():
    assert without_activation(normc.zoo["bn_relu"]) == normc.zoo["batch_norm"]
    assert without_activation(normc.zoo["rms_norm"]) is normc.zoo["rms_norm"]
    assert without_activation(normc.parse("param v[c] = 3; exp(v*x)")).params[0].init == 3
    for name in ("evonorm_s0", "evonorm_b0", "frn_tlu", "dyt"):
        assert without_activation(normc.zoo[name]) is None


# --- replace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_by_its_own_formula_computes_the_same(train):
    theirs = network().train(train)
    ours = copy.deepcopy(theirs)
    assert normc.replace_norms(ours, "batch_norm") is ours
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert kinds(ours[0]) == ["Conv2d", "Layer", "ReLU"], "an affine formula leaves activations"
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[0][1].running_var, theirs[0][1].running_var)
    assert ours[0][1].num_batches_tracked == theirs[0][1].num_batches_tracked


def test_a_pair_in_a_sequential_becomes_one_layer():
    theirs = stem().eval()
    ours = normc.replace_norms(copy.deepcopy(theirs), BN_RELU)
    assert kinds(ours) == ["Conv2d", "Layer", "Identity"] and not ours[1].training
    torch.testing.assert_close(ours(images()), theirs(images()))
    assert kinds(normc.replace_norms(stem(), BN_RELU, act=False)) == ["Conv2d", "Layer", "ReLU"]
    gated = normc.replace_norms(nn.Sequential(nn.BatchNorm2d(8), nn.Sigmoid()), BN_RELU)
    assert kinds(gated) == ["Layer", "Sigmoid"]


def test_names_and_forward_tell_which_activation_follows():
    block = normc.replace_norms(TimmBlock(), "evonorm_s0")
    assert kinds([block.act1, block.act2]) == ["Identity", "ReLU"]
    assert kinds([block.bn1, block.bn2]) == ["Layer", "Layer"]
    assert isinstance(normc.replace_norms(TorchvisionBlock(), "evonorm_s0").relu, nn.ReLU)
    assert isinstance(normc.replace_norms(Nested(), "evonorm_s0").act, nn.Identity)
    assert isinstance(normc.replace_norms(DenseLayer(), "evonorm_s0").act, nn.Identity)
    assert isinstance(normc.replace_norms(Sum(), "evonorm_s0").act, nn.SiLU)
    assert isinstance(normc.replace_norms(Twice(), "evonorm_s0").act, nn.SiLU)


def test_a_batch_norm_with_an_act_of_its_own_becomes_one_layer():
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, nn.ReLU()), nn.ReLU6()).eval()
    nn.init.normal_(theirs[1].weight)
    ours = normc.replace_norms(copy.deepcopy(theirs), BN_RELU)
    assert kinds(ours) == ["Conv2d", "Layer", "ReLU6"]
    torch.testing.assert_close(ours(images()), theirs(images()))
    affine = normc.replace_norms(copy.deepcopy(theirs), "batch_norm")
    assert kinds(affine[1]) == ["Layer", "ReLU"]
    torch.testing.assert_close(affine(images()), theirs(images()))
    y = theirs(images())
    assert torch.equal(normc.revert_norms(affine)(images()), y)
    assert isinstance(affine[1], BatchNormAct2d)


def test_norms_over_tokens():
    theirs = Tokens()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 16)
    ours = copy.deepcopy(theirs)
    normc.replace_norms(ours, "layer_norm_tokens")
    assert ours.norm1.channel_dim == -1 and torch.equal(ours.norm2.gamma, theirs.norm2.weight)
    torch.testing.assert_close(ours.norm1(x), theirs.norm1(x))
    assert ours.norm2.eps == torch.finfo(torch.float32).eps
    learn(ours, x)


@pytest.mark.parametrize(
    "norm, formula",
    [
        (nn.GroupNorm(4, 8), "group_norm"),
        (nn.InstanceNorm2d(8, affine=True), "instance_norm"),
        (nn.InstanceNorm2d(8, track_running_stats=False), "instance_norm"),
        (LayerNorm2d(8), "layer_norm_tokens"),
        (nn.BatchNorm2d(8, eps=0.1, momentum=None), "batch_norm"),
        (nn.BatchNorm2d(8, track_running_stats=False), "batch_norm"),
        (nn.BatchNorm2d(8, affine=False), "batch_norm"),
        (nn.BatchNorm3d(8), "batch_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_norm_by_its_own_formula_computes_the_same(norm, formula):
    theirs = nn.Sequential(norm).double()
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = normc.replace_norms(copy.deepcopy(theirs), formula)
    x = torch.randn(3, 8, 4, 4, 2)[..., : 2 if isinstance(norm, nn.BatchNorm3d) else 1].double()
    x = x if isinstance(norm, nn.BatchNorm3d) else x[..., 0]
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_sync_batch_norm():
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(network()).eval()
    ours = normc.replace_norms(copy.deepcopy(theirs), BN_RELU)
    assert kinds(ours[0]) == ["Conv2d", "Layer", "Identity"]
    torch.testing.assert_close(ours[0](images()), theirs[0](images()))
    assert isinstance(normc.revert_norms(ours)[0][1], nn.SyncBatchNorm)


def test_settings_are_kept_or_given():
    net = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, momentum=0.2), nn.GroupNorm(2, 8))
    kept = normc.replace_norms(copy.deepcopy(net), "group_norm")
    assert (kept[0].eps, kept[0].momentum, kept[1].groups) == (1e-3, 0.2, 2)
    given = normc.replace_norms(copy.deepcopy(net), "group_norm", groups=4, eps=0.5, momentum=0.7)
    assert [(m.groups, m.eps, m.momentum) for m in given] == [(4, 0.5, 0.7)] * 2


def test_dtype_device_and_frozen_weights_are_kept():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)).to(torch.bfloat16)
    net[0].requires_grad_(False)
    net[0].running_var = net[0].running_var.float()
    net[1].bias.requires_grad_(False)
    normc.replace_norms(net, "relu(v*(x - batch_mean(x))/batch_std(x)*gamma + beta)")
    assert [p.requires_grad for p in net[0].parameters()] == [False] * 3
    grads = {n: p.requires_grad for n, p in net[1].named_parameters()}
    assert grads == {"v": True, "gamma": True, "beta": False}
    assert net[0].gamma.dtype == net[0].running_mean.dtype == torch.bfloat16
    assert net[0].running_var.dtype == torch.float32
    far = normc.replace_norms(stem().to("meta"), "evonorm_b0")
    assert far[1].gamma.device.type == far[1].running_var.device.type == "meta"
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)).double()
    assert normc.replace_norms(bare, "evonorm_s0")[1].v.dtype == torch.float64


def test_only_what_means_the_same_is_copied():
    net = nn.Sequential(nn.BatchNorm2d(8))
    nn.init.constant_(net[0].weight, 3)
    net[0].running_mean.fill_(5)
    net[0].running_var.fill_(7)
    gain = normc.replace_norms(copy.deepcopy(net), "rms_norm_centred_gain")[0]
    assert gain.gamma.tolist() == [0] * 8, "1 + gamma is the gain"
    evonorm = normc.replace_norms(copy.deepcopy(net), "evonorm_b0")[0]
    assert evonorm.running_var.tolist() == [7] * 8 and evonorm.gamma.tolist() == [3] * 8
    other = normc.replace_norms(copy.deepcopy(net), "x/batch_std(x*x)*gamma")[0]
    assert other.running_var.tolist() == [1] * 8, "not the variance of x"
    l1 = normc.replace_norms(copy.deepcopy(net), "l1_batch_norm")[0]
    assert l1.running_mean_0.tolist() == [5] * 8 and l1.running_mean_1.tolist() == [0] * 8


def test_shared_modules_stay_shared():
    norm, relu = nn.BatchNorm2d(8), nn.ReLU()
    net = nn.Sequential(norm, relu, nn.Conv2d(8, 8, 3), norm, relu)
    normc.replace_norms(net, BN_RELU)
    assert net[0] is net[3] and kinds(net) == ["Layer", "Identity", "Conv2d", "Layer", "Identity"]
    normc.revert_norms(net)
    assert net[0] is net[3] is norm and net[1] is net[4] is relu


# --- in use, and back -----------------------------------------------------------------------------


def test_revert_restores_the_modules_and_the_outputs_to_the_bit():
    net = network().eval()
    before, modules, y = list(net.state_dict()), list(net.modules()), net(images())
    normc.replace_norms(net, "evonorm_s0")
    assert not torch.equal(net(images()), y)
    assert normc.revert_norms(net) is net
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert list(net.state_dict()) == before and torch.equal(net(images()), y)
    normc.revert_norms(net)  # nothing to do


def test_revert_gives_back_what_was_learned():
    net, weight = stem(), None
    weight = net[1].weight
    normc.replace_norms(net, BN_RELU)
    learn(net, images())
    y = net.eval()(images())
    normc.revert_norms(net)
    assert net[1].weight is weight and not net[1].training and net[1].num_batches_tracked == 3
    torch.testing.assert_close(net(images()), y)


def test_revert_follows_a_change_of_dtype():
    net = normc.replace_norms(stem(), BN_RELU).double().eval()
    y = net(images().double())
    torch.testing.assert_close(normc.revert_norms(net)(images().double()), y)


@pytest.mark.parametrize("formula", ["evonorm_s0", "evonorm_b0", "rms_norm"])
def test_a_replaced_network_trains_and_its_state_travels(formula):
    net = normc.replace_norms(network(), formula)
    start = net(images()).square().mean()
    learn(net, images(), 10)
    assert net(images()).square().mean() < start
    other = normc.replace_norms(network(), formula)
    assert other.load_state_dict(net.state_dict()).missing_keys == []
    assert torch.equal(other.eval()(images()), net.eval()(images()))
    assert not any("former" in key for key in net.state_dict())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_a_deep_copy_can_be_reverted_and_is_independent():
    net = network().eval()
    y = net(images())
    twin = copy.deepcopy(normc.replace_norms(net, "evonorm_s0"))
    learn(net, images())
    assert torch.equal(normc.revert_norms(twin)(images()), y)
    assert isinstance(net[0][1], normc.Layer) and getattr(net[0][1], _FORMER) is not None
    assert twin[0][1] is not normc.revert_norms(net)[0][1]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, formula, kw, error, message",
    [
        (nn.LazyBatchNorm2d(), "evonorm_s0", {}, normc.ShapeError, r"body\.0 \(Lazy.*no channel"),
        (nn.LayerNorm((8, 4)), "rms_norm", {}, normc.ShapeError, r"body\.0 \(LayerN.*2 dimensions"),
        (nn.BatchNorm2d(8), "group_norm", {"groups": 6}, normc.ShapeError, r"body\.0 \(BatchN"),
        (nn.BatchNorm2d(8), "x - mean[n](x)", {}, normc.FormulaError, r"first \(.*positions"),
        (nn.BatchNorm2d(8), "evonorm_s9", {}, normc.NormcError, "did you mean `evonorm_s"),
        (nn.BatchNorm2d(8), "x/", {}, normc.FormulaError, r"\^"),
        (nn.BatchNorm2d(8), "gated_rms_norm", {}, normc.FormulaError, "needs the input `z`"),
        (nn.BatchNorm2d(8), "x, x", {}, normc.FormulaError, "returns more"),
    ],
)  # fmt: skip
def test_an_error_names_the_module_and_leaves_the_model(norm, formula, kw, error, message):
    net = nn.Sequential()
    net.body = nn.Sequential(norm)
    first = net.first = nn.BatchNorm2d(6)
    with pytest.raises(error, match=message):
        normc.replace_norms(net, formula, **kw)
    assert net.body[0] is norm and net.first is first


def test_a_model_that_is_a_norm_has_no_parent():
    with pytest.raises(normc.NormcError, match="itself a norm"):
        normc.replace_norms(nn.BatchNorm2d(3), "evonorm_s0")


# --- norm_layer -----------------------------------------------------------------------------------


def test_norm_layer_has_timms_signature():
    make = normc.norm_layer("evonorm_s0", groups=4, linear="group_norm")
    layer = make(8, eps=1e-3, device="cpu", dtype=torch.float64, inplace=True)
    assert (layer.groups, layer.eps, layer.v.dtype) == (4, 1e-3, torch.float64)
    assert make(8, apply_act=False).formula == normc.zoo["group_norm"]
    assert normc.norm_layer("rms_norm")(8).eps == 1e-6, "the zoo's"
    with pytest.raises(TypeError, match="affine"):
        make(8, affine=False)


def test_norm_layer_without_an_activation_takes_only_what_is_clear():
    assert normc.norm_layer(BN_RELU)(8, False).formula == normc.zoo["batch_norm"]
    assert normc.norm_layer("batch_norm")(8, False).formula == normc.zoo["batch_norm"]
    with pytest.raises(normc.FormulaError, match="linear="):
        normc.norm_layer("evonorm_s0")(8, apply_act=False)


def test_norm_layer_in_models():
    make = normc.norm_layer(BN_RELU)
    learn(stem(make), images())
    learn(nn.Sequential(stem(make), TorchvisionBlock(norm=make)), images())


def test_norm_layers_layers_go_by_torchs_names_too():
    layer = normc.norm_layer(BN_RELU)(8)
    assert layer.weight is layer.gamma and layer.bias is layer.beta
    nn.init.zeros_(layer.weight)
    assert layer.gamma.tolist() == [0] * 8 and "weight" not in layer.state_dict()
    assert normc.norm_layer("rms_norm_centred_gain")(8).weight is None
    assert normc.norm_layer("x*weight*gamma")(8).weight.tolist() == [1] * 8
    again = pickle.loads(pickle.dumps(type(layer)))  # noqa: S301 - our own bytes
    assert again is type(layer) and isinstance(copy.deepcopy(layer), normc.Layer)


def test_norm_layer_under_partial_and_pickle():
    make = normc.norm_layer("evonorm_s0", groups=4, linear="group_norm")
    bound = functools.partial(make, eps=1e-3)
    assert bound(8).eps == 1e-3 and bound(8).groups == 4
    # timm unbinds a partial, and takes a function for a layer with its own activation
    assert type(make.func) is type(bound.func) is type(lambda: 0)
    for one in (make, copy.deepcopy(make)):
        again = pickle.loads(pickle.dumps(one))  # noqa: S301 - our own bytes
        assert type(again) is type(make) and repr(again) == repr(make)
        assert repr(again(8)) == repr(make(8))


def test_norm_layer_repr_recreates_it():
    make = normc.norm_layer("evonorm_s0", groups=4, linear="group_norm")
    text = repr(make)
    assert text.startswith("normc.norm_layer('x * sigmoid(v*x)") and text.endswith("groups=4)")
    again = eval(text, {"normc": normc})  # noqa: S307 - our own repr
    assert repr(again) == text


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_repr_of_a_layer_recreates_it(backend):
    layer = normc.Layer("x/channel_rms(x)", 8, channel_dim=-1, backend=backend)
    again = eval(repr(layer), {"Layer": normc.Layer})  # noqa: S307 - our own repr
    assert repr(again) == repr(layer) and again.op.backend == backend
