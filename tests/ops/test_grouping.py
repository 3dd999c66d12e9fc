"""groups="isometric" in Layer and replace_norms: what is asked, and what is done."""

import math

import pytest
import torch
from torch import nn

import normc
from normc.analysis import isometric
from normc.analysis.isometric import isometric_groups, isometric_groups_of
from normc.errors import FormulaError, NormcError, ShapeError
from normc.ops.grouping import CHOOSERS

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP_NORM = normc.zoo["group_norm"]


@pytest.fixture
def asked(monkeypatch):
    """A chooser that notes what it is asked."""

    class Noting:
        def __init__(self):
            self.layers, self.models = [], []

        def of_layer(self, formula, after):
            self.layers.append((formula.text, after))
            return 4

        def of_model(self, model, formula, data, shape):
            self.models.append((model, formula.text, data, shape))
            return {"1": 2, "4": 8}

    noting = Noting()
    monkeypatch.setitem(CHOOSERS, "isometric", lambda: noting)
    return noting


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32)),
    )


@pytest.mark.plain
def test_a_layer_asks_behind_its_convolution(asked):
    conv = nn.Conv2d(3, 16, 3)
    layer = normc.Layer(GROUP_NORM, 16, groups="isometric", after=conv)
    assert layer.groups == 4 and asked.layers == [(GROUP_NORM.text, conv)]


@pytest.mark.plain
def test_a_model_is_asked_about_as_a_whole(asked):
    model = network()
    given = torch.zeros(1, 3, 8, 8)
    normc.replace_norms(model, GROUP_NORM, groups="isometric", data=given)
    assert [model[1].groups, model[4].groups] == [2, 8]
    ((of, text, data, shape),) = asked.models
    assert (of, text, shape) == (model, GROUP_NORM.text, None) and data is given
    assert isinstance(normc.revert_norms(model)[4], nn.GroupNorm)


@pytest.mark.plain
def test_a_norm_that_is_left_out_is_auto():
    model = normc.replace_norms(network(), GROUP_NORM, groups={"4": 16})
    assert [model[1].groups, model[4].groups] == [16, 16]
    model = normc.replace_norms(network(), GROUP_NORM, groups={"1": 2})
    assert [model[1].groups, model[4].groups] == [2, 4]  # GroupNorm's own number


class Shared(nn.Module):
    """A norm in two places, of which neither a walk by depth nor one by breadth is told first."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.BatchNorm2d(16)))
        self.b = self.a[1][0]

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.plain
@pytest.mark.parametrize("path", ["a.1.0", "b"])
def test_a_shared_norm_is_known_by_each_of_its_paths(path):
    model = normc.replace_norms(Shared(), GROUP_NORM, groups={path: 2})
    assert model.b.groups == 2 and model.a[1][0] is model.b


@pytest.mark.cpu
def test_a_shared_norm_is_found_wherever_the_run_met_it():
    expected = isometric_groups_of(
        Shared(), GROUP_NORM, shape=(1, 3, 6, 6), activation="relu", draws=2
    )
    isometric._remembered.cache_clear()
    model = normc.replace_norms(Shared(), GROUP_NORM, groups="isometric", shape=(1, 3, 6, 6))
    assert len(expected) == 1 and model.b is model.a[1][0]
    assert model.b.groups in (1, 2, 4, 8) and model.b.groups != 16


@pytest.mark.plain
@pytest.mark.parametrize(
    "given, words",
    [
        (dict(groups="isometrik"), "did you mean `isometric`"),
        (dict(groups="isometric"), "give after="),
        (dict(groups="isometric", after=nn.ReLU()), "expected a convolution or linear layer"),
        (dict(groups="isometric", after=nn.ConvTranspose2d(4, 16, 3)), "ConvTranspose2d: expected"),
        (dict(groups="isometric", after=nn.Conv2d(4, 8, 3)), "makes 8 channels, not 16"),
    ],
)
def test_refusals_of_a_layer(given, words):
    with pytest.raises(ShapeError, match=words):
        normc.Layer(GROUP_NORM, 16, **given)


@pytest.mark.plain
def test_refusals_of_a_model():
    model = network()
    for given, words in (
        (dict(groups="isometric"), "give either data or shape"),
        (dict(shape=(1, 3, 8, 8)), "leave them out"),
        (dict(groups={"1": 3}), "does not divide the 16 channels"),
        (dict(groups={"1": 3}), r"1 \(BatchNorm2d\)"),
        (dict(groups={"1.0": 2}), "no norm `1.0`"),
        (dict(groups={"0": 2}), "no norm `0`"),
        (dict(groups={"1": 2}, shape=(1, 3, 8, 8)), "leave them out"),
    ):
        with pytest.raises(ShapeError, match=words):
            normc.replace_norms(model, GROUP_NORM, **given)
    with pytest.raises(NormcError, match="do not depend on groups"):
        normc.replace_norms(model, "instance_norm", groups="isometric", shape=(1, 3, 8, 8))
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[4], nn.GroupNorm)
    with pytest.raises(FormulaError, match="needs the input"):
        normc.replace_norms(model, "adain", groups="isometric", shape=(1, 3, 8, 8))


@pytest.mark.cpu
def test_a_layer_behind_a_linear_one_has_the_derived_number():
    linear = nn.Linear(256, 192)
    layer = normc.Layer(GROUP_NORM, 192, groups="isometric", after=linear)
    assert layer.groups == isometric_groups(GROUP_NORM, 256, 192, activation="relu").groups == 32


@pytest.mark.cpu
def test_a_model_gets_what_the_analysis_finds_and_keeps_the_scale():
    chance = torch.Generator().manual_seed(0)
    sizes = [256, 192, 160, 128]
    model = nn.Sequential()
    for before, after in zip(sizes, sizes[1:], strict=False):
        model.extend([nn.Linear(before, after), nn.GroupNorm(1, after), nn.ReLU()])
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5, generator=chance)
    x = torch.randn(64, 256, generator=chance).relu()  # as behind another such unit
    expected = isometric_groups_of(model, GROUP_NORM, x, activation="relu")
    assert expected["1"] == 32 and list(expected) == ["1", "4", "7"]

    def drift():
        """How far, as a factor, the size of the gradient is from what arrives."""
        z = x.clone().requires_grad_()
        y = model(z)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (dz,) = torch.autograd.grad(y, z, dy)
        return abs(math.log(dz.square().mean() / dy.square().mean()))

    usual = drift()
    normc.replace_norms(model, GROUP_NORM, groups="isometric", data=x)
    assert [model[i].groups for i in (1, 4, 7)] == list(expected.values())
    assert drift() < usual / 2


@pytest.mark.cpu
def test_one_convolution_is_sampled_once(monkeypatch):
    asked = []
    whole = isometric.isometric_groups
    monkeypatch.setattr(
        isometric, "isometric_groups", lambda *a, **k: asked.append(a) or whole(*a, **k, draws=2)
    )
    isometric._remembered.cache_clear()
    layers = [
        normc.Layer(GROUP_NORM, 8, groups="isometric", after=nn.Conv2d(4, 8, 3)) for _ in range(3)
    ]
    assert len(asked) == 1 and len({layer.groups for layer in layers}) == 1
    isometric._remembered.cache_clear()
