"""Training: the same to the bit, in parts as at once; and the ascent of the stability test."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normc.ops.layer import Layer
from normc.search import training
from normc.search.data import Images, digits
from normc.search.nets import Layers, Scale, build
from normc.search.setting import Recipe, Stability
from normc.search.stability import worst_norm
from normc.search.training import Training, groups

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

BATCH_NORM = "max((x - batch_mean(x))/batch_std(x)*gamma + beta, 0)"
RECIPE = Recipe(steps=100, batch=8)
SMALL = Scale(4, (1,))


def net(text=BATCH_NORM, name="mobilenet", scale=SMALL, seed=0):
    def layer(channels):
        return Layer(text, channels, backend="torch")

    def affine(channels):
        return Layer("x*gamma + beta", channels, backend="torch")

    return build(name, Layers(layer, affine), scale, 10, 1, seed)


def begun(text=BATCH_NORM, recipe=RECIPE, seed=0, **options):
    return Training(net(text, **options), digits(), recipe, seed)


def weights(one):
    return [t.clone() for t in one.net.state_dict().values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_the_same_seed_gives_the_same_weights():
    one, again, other = begun(), begun(), begun(seed=1)
    assert one.advance(20)
    torch.rand(5)  # torch's own state has no part in it
    assert again.advance(20) and other.advance(20)
    assert same(one, again) and not same(one, other)


def test_in_parts_as_at_once():
    """Even if it is judged in between."""
    whole, parts = begun(), begun()
    assert whole.advance(100)
    assert parts.advance(50) and parts.done == 50
    parts.accuracy()
    assert parts.advance(100) and parts.done == 100
    assert same(whole, parts)
    before = weights(whole)
    assert whole.advance(200) and whole.done == 100  # no further than the recipe
    assert all(torch.equal(a, b) for a, b in zip(before, weights(whole), strict=True))


def test_training_teaches():
    one = begun(recipe=Recipe(steps=100, batch=32), scale=Scale(8, (1, 1)))
    before = one.accuracy()
    assert one.advance(100)
    assert before < 0.25 < 0.4 < one.accuracy()


@pytest.mark.parametrize(
    "schedule, shares",
    [("cosine", [1, 0.75, 0.5, 0.25, 0]), ("constant", [1, 1, 1, 1, 1])],
)
def test_the_rate_follows_its_schedule(schedule, shares):
    """At the start, after a third, a half, two thirds, and at the end."""
    recipe, found = replace(RECIPE, steps=12, schedule=schedule, rate=0.2), []
    one = begun(recipe=recipe)
    for until in (0, 4, 6, 8, 12):
        one.advance(until)
        found += [{group["lr"] for group in one.optimizer.param_groups}]
    assert [len(rates) for rates in found] == [1] * 5
    assert [rates.pop() / 0.2 for rates in found] == pytest.approx(shares, abs=1e-9)


class Wrong(nn.Module):
    """Right about images whose first pixel is its class; NaN, infinite or wrong elsewhere."""

    def __init__(self, faults):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.faults = faults

    def forward(self, x):
        out = F.one_hot(x[:, 0, 0, 0].round().long().clamp(0, 4), 5) * self.weight
        for image, fault in self.faults.items():
            out = torch.where(x[:, :1, 0, 1].round() == image, fault, out)
        return out


def judged(faults, count=10):
    """Image i has its class i % 5 as its first pixel and its number as its second."""
    pixels = torch.zeros(count, 1, 1, 2)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = torch.arange(count) % 5, torch.arange(count)
    images = Images.of(pixels, torch.arange(count) % 5, pixels, torch.arange(count) % 5)
    images = replace(images, mean=torch.zeros(1, 1, 1, 1), std=torch.ones(1, 1, 1, 1))
    return Training(Wrong(faults), images, Recipe(batch=count))


def test_outputs_that_are_not_finite_know_nothing():
    nan, inf = float("nan"), float("inf")
    sly = torch.tensor([nan, 0, 0, 0, 0])  # argmax takes NaN for the largest
    assert judged({}).accuracy() == 1
    assert judged({0: sly, 5: sly}).accuracy() == 0.8
    high = torch.tensor([0, inf, 0, 0, 0])
    low = torch.tensor([0, 9, -inf, 0, 0])
    wrong = torch.tensor([0.0, 0, 0, 0, 9])
    assert judged({1: high, 6: low, 3: wrong}).accuracy() == 0.7
    assert judged({i: torch.full((5,), nan) for i in range(10)}).accuracy() == 0


def test_a_loss_that_is_not_finite_ends_it_at_once():
    one = judged({3: torch.full((5,), float("nan"))})
    assert not one.advance(100) and one.done <= training.LOOK
    late = judged({})
    assert late.advance(30)
    late.net.faults[1] = torch.full((5,), float("inf"))
    assert not late.advance(40) and late.done == 40
    diverging = begun("exp(exp(x))*gamma + beta", name="resnet")
    assert not diverging.advance(100) and diverging.done < 100


def test_what_decays():
    made = net(name="efficientnet")
    rest, kept = groups(made, 0.25)
    assert (rest["weight_decay"], kept["weight_decay"]) == (0.25, 0)
    names = {id(p): name for name, p in made.named_parameters()}
    decaying = {names[id(p)] for p in rest["params"]}
    still = {names[id(p)] for p in kept["params"]}
    assert decaying | still == set(names.values()) and not decaying & still
    modules = dict(made.named_modules())
    for name in decaying | still:
        place, _, own = name.rpartition(".")
        matrix = isinstance(modules[place], nn.Conv2d | nn.Linear) and own == "weight"
        assert (name in decaying) == matrix, name


def test_weights_decay_and_layers_do_not():
    """Without any gradient: after one step a weight has lost rate * decay of itself."""
    recipe = Recipe(steps=1, batch=4, rate=0.5, momentum=0.0, decay=0.1)
    one = Training(net("0*x*gamma + beta"), digits(), recipe)  # only the last layers learn
    before = copy.deepcopy(one.net)
    assert one.advance(1)
    assert torch.allclose(one.net[0].weight, before[0].weight * (1 - 0.5 * 0.1))
    assert torch.equal(one.net[1].body[1].gamma, before[1].body[1].gamma)


def test_evaluation_uses_running_statistics(monkeypatch):
    """What is said of an image does not depend on the others that are judged with it."""
    one = begun()
    one.images = replace(
        one.images, test=one.images.test[:30], test_classes=one.images.test_classes[:30]
    )
    assert one.advance(60)
    shares, outputs = set(), []
    one.net.register_forward_hook(lambda m, given, out: outputs.append(out))
    for size in (30, 7, 1):
        monkeypatch.setattr(training, "AT_ONCE", size)
        shares.add(one.accuracy())
    whole, by_seven, by_one = torch.cat(outputs).split(30)
    assert len(shares) == 1 and len(outputs) == 1 + 5 + 30
    assert torch.allclose(whole, by_seven, atol=1e-5)
    assert torch.allclose(whole, by_one, atol=1e-5)


# --- stability ------------------------------------------------------------------------------------


class Eager(nn.Module):
    """An activation of plain torch operations, with two parameters."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        std = (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        shape = (1, -1, 1, 1)
        return x * torch.sigmoid(x) / std * self.gamma.view(shape) + self.beta.view(shape)


def tiny(activation):
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2)
    made = nn.Sequential(
        convs[0], activation(3), convs[1], activation(4), nn.Flatten(), nn.LazyLinear(5)
    ).double()
    made(torch.zeros(1, 1, 6, 6).double())  # the last layer gets its size
    return made


def problem(count=6):
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 6, 6, generator=chance, dtype=torch.float64)
    return images, torch.arange(count) % 5


def ascended(net, images, classes, steps, rate):
    """The norms on the way, by functional transforms of the net as one function of one vector."""
    names, parts = zip(*net.named_parameters(), strict=True)
    sizes = [p.numel() for p in parts]
    theta = torch.cat([p.detach().flatten() for p in parts])

    def loss(vector):
        split = [v.view(p.shape) for v, p in zip(vector.split(sizes), parts, strict=True)]
        out = torch.func.functional_call(net, dict(zip(names, split, strict=True)), images)
        return F.cross_entropy(out, classes)

    def norm(vector):
        return torch.linalg.vector_norm(torch.func.grad(loss)(vector))

    found = []
    for _ in range(steps):
        uphill, value = torch.func.grad_and_value(norm)(theta)
        found.append(float(value))
        theta = theta + rate * theta.norm() * uphill / uphill.norm()
    return found


HOW = Stability(steps=12, rate=0.05, limit=1e30)


def test_the_ascent_is_that_of_plain_torch():
    images, classes = problem()
    norms = ascended(tiny(Eager), images, classes, HOW.steps, HOW.rate)
    assert max(norms) > 2 * norms[0]
    for steps in (1, 4, 12):
        found = worst_norm(tiny(Eager), images, classes, replace(HOW, steps=steps))
        assert found == pytest.approx(max(norms[:steps]), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_layer_ascends_as_its_composite_does(backend):
    def layer(channels):
        text = "x*sigmoid(x)/instance_std(x)*gamma + beta"
        return Layer(text, channels, backend=backend)

    images, classes = problem()
    expected = worst_norm(tiny(Eager), images, classes, HOW)
    assert worst_norm(tiny(layer), images, classes, HOW) == pytest.approx(expected, rel=1e-4)


def test_exploding_gradients_are_found():
    images, classes = problem()
    how = Stability(steps=100, rate=0.1, limit=1e8)
    for text, most in (("exp(x)", math.inf), ("tanh(x)", how.limit)):
        made = tiny(lambda c, text=text: Layer(f"({text})*gamma + beta", c, backend="torch"))
        found = worst_norm(made, images, classes, how)
        assert (found > how.limit) == (most > how.limit), (text, found)


def test_it_ends_above_the_limit():
    images, classes = problem()
    norms = ascended(tiny(Eager), images, classes, HOW.steps, HOW.rate)
    limit = 1.01 * sorted(norms)[5]
    first = next(norm for norm in norms if norm > limit)
    assert first < max(norms)
    found = worst_norm(tiny(Eager), images, classes, replace(HOW, limit=limit))
    assert found == pytest.approx(first, rel=1e-6)


def test_what_is_not_finite_is_infinite():
    images, classes = problem()
    images[2, 0, 3, 3] = float("nan")
    assert worst_norm(tiny(Eager), images, classes, HOW) == math.inf
    images[2, 0, 3, 3] = float("inf")
    assert worst_norm(tiny(Eager), images, classes, HOW) == math.inf


def test_a_slope_that_is_not_finite_is_no_pass():
    """The norm of the gradient is small, and its own derivative infinite: |w|^1.5 at zero."""

    class Cusp(nn.Module):
        def forward(self, x):
            return x.abs() ** 1.5

    made = nn.Sequential(nn.Linear(1, 1, bias=False), Cusp(), nn.Linear(1, 2))
    with torch.no_grad():
        made[0].weight.zero_()
    found = worst_norm(made, torch.ones(2, 1), torch.tensor([0, 1]), HOW)
    assert found == math.inf
