"""Every layer of the zoo against a definition written straight in torch; what is beyond it."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from normc import compile
from normc.language import zoo
from normc.language.axes import CHANNEL, FULL, NONE
from normc.language.beyond import BEYOND
from normc.language.geometry import Geometry
from normc.language.zoo import ZOO
from normc.reference import reference
from tests.language.zoo_definitions import INDEPENDENT, POINTWISE

AFFINE = {"gamma": 1, "beta": 0}
WEIGHTS = [name for name, entry in ZOO.items() if entry.doc.startswith("of a weight")]
UNLEARNED = (
    *(
        "pixel_norm",
        "pono",
        "simple_rms_norm",
        "qk_norm",
        "ada_layer_norm",
        "adain",
        "spade",
        "film",
    ),
    *WEIGHTS,
)

STARTS = {
    **dict.fromkeys(INDEPENDENT, AFFINE),
    **{name: {} for name in UNLEARNED},
    "batch_instance_norm": {"rho": 1, **AFFINE},
    "switchable_norm": dict.fromkeys(("mi", "ml", "mb", "vi", "vl", "vb"), 1) | AFFINE,
    "rms_norm": {"gamma": 1},
    "rms_norm_centred_gain": {"gamma": 0},
    "scale_norm": {"g": 1},
    "grn": {"gamma": 0, "beta": 0},
    "evonorm_b0": {"v": 1, **AFFINE},
    "evonorm_s0": {"v": 1, **AFFINE},
    "frn_tlu": {"tau": 0, **AFFINE},
    "dyt": {"alpha": 0.5, **AFFINE},
    "derf": {"alpha": 0.5, "shift": 0, **AFFINE},
    **{f"pointwise_{name}": {"alpha": 0.5, "shift": 0, **AFFINE} for name in POINTWISE},
    "dyisru": {"b": 1, **AFFINE},
    "tlu": {"tau": 0},
    "layer_norm_scaling": {"depth": 1, **AFFINE},
    "batch_channel_norm": {"gain": 1, "bias": 0, **AFFINE},
    "l2_norm": {"gamma": 20},
    "rms_silu": {"gamma": 1},
    "peri_norm": {"gain": 1, "gamma": 1},
    "add_rms_norm": {"gamma": 1},
    "gated_rms_norm": {"gamma": 1},
}
"""Where each parameter starts; a row not named here has the affine map of its INDEPENDENT."""

SCALARS = {"alpha", "shift", "g", "b", "depth", "mi", "ml", "mb", "vi", "vl", "vb"}
"""Scalar parameters; every other is per channel (`shift` and `g` are inputs of other layers)."""

POSITIVE = {"b", "depth"}  # under a root

LAYOUTS = {
    # shape of x, channel_dim, groups
    "nchw": ((3, 6, 4, 5), 1, 2),
    "channels_last": ((2, 3, 4, 6), -1, 3),
    "tokens": ((3, 5, 12), -1, 4),
    "volume": ((2, 4, 3, 2, 3), 1, "auto"),
    "channel_in_the_middle": ((2, 3, 8, 4), 2, 8),
    "matrix": ((5, 12), 1, 3),
}


def draw(definition, shape, channel_dim, groups, seed=0):
    """x and every tensor, as a user holds them, in float64 and requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry.of(shape, groups, channel_dim)
    rows = [("x", FULL), *((row.name, row.axes) for row in definition.params + definition.inputs)]
    drawn = {
        name: torch.randn(geometry.shape_of(axes), generator=generator, dtype=torch.float64)
        for name, axes in rows
    }
    return {n: (t.abs() + 0.1 if n in POSITIVE else t).requires_grad_() for n, t in drawn.items()}


def as_ncl(tensor, axes, channel_dim):
    """A user's tensor as a definition sees it."""
    if axes == FULL:
        return tensor.movedim(channel_dim, 1).flatten(2) if tensor.dim() > 2 else tensor[..., None]
    if axes == CHANNEL:
        return tensor[None, :, None]
    return tensor[(..., *[None] * (3 - tensor.dim()))] if axes else tensor


def expected(name, definition, tensors, channel_dim, groups):
    x = tensors["x"]
    ncl = as_ncl(x, FULL, channel_dim)
    seen = {
        row.name: as_ncl(tensors[row.name], row.axes, channel_dim)
        for row in definition.params + definition.inputs
    }
    count = Geometry.of(x.shape, groups, channel_dim).g
    y = INDEPENDENT[name](ncl, count, ZOO[name].eps, seen)
    back = x.movedim(channel_dim, 1).shape
    return [r.reshape(back).movedim(1, channel_dim) for r in (y if type(y) is tuple else (y,))]


def gradients(results, tensors):
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results
    )
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def needs_space(name):
    # torch's own instance norm refuses one position per sample and channel.
    return name in ("instance_norm", "batch_instance_norm", "adain")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ZOO)
def test_values_and_gradients_agree_with_an_independent_definition(name, layout):
    shape, channel_dim, groups = LAYOUTS[layout]
    if len(shape) == 2 and needs_space(name):
        shape, channel_dim = (*shape, 2), 1
    layer = reference(ZOO[name].text)
    tensors = draw(layer.definition, shape, channel_dim, groups)
    y = layer(**tensors, groups=groups, eps=ZOO[name].eps, channel_dim=channel_dim)
    results = list(y) if isinstance(y, tuple) else [y]
    wanted = expected(name, layer.definition, tensors, channel_dim, groups)
    assert_close(results, wanted, rtol=1e-10, atol=1e-12)
    assert_close(gradients(results, tensors), gradients(wanted, tensors), rtol=1e-10, atol=1e-11)


def test_every_layer_has_an_independent_definition():
    assert set(INDEPENDENT) == set(ZOO)
    assert len(ZOO) >= 45


@pytest.mark.parametrize("name", ZOO)
def test_parameters_start_where_the_paper_starts_them(name):
    params = reference(ZOO[name].text).definition.params
    assert {param.name: param.init for param in params} == STARTS[name]
    for param in params:
        assert param.axes == (NONE if param.name in SCALARS else CHANNEL)


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_one_line_with_its_paper(name):
    entry = ZOO[name]
    assert entry.name == name == name.lower()
    assert "\n" not in entry.text
    assert entry.paper
    assert entry.doc
    digits, number = entry.arxiv.split(".")
    assert number.isdigit()
    assert (len(digits), len(number)) in ((4, 4), (4, 5))
    assert 2000 + int(digits[:2]) == entry.year
    assert entry.reference == f"{entry.paper}, arXiv {entry.arxiv}, {entry.year}"


def test_grn_starts_as_the_identity():
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert torch.equal(reference(ZOO["grn"].text)(x, eps=1e-6), x)


PADDED = ("scale_norm", "qk_norm", "rms_norm", "grn", "simple_rms_norm", "l2_norm", "rms_silu")


@pytest.mark.parametrize("name", PADDED)
def test_a_padding_token_stays_zero(name):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    x[:, 1] = 0
    x.requires_grad_()
    y = reference(ZOO[name].text)(x.movedim(2, 1), groups=2, eps=ZOO[name].eps)
    assert y.isfinite().all()
    assert not y[:, :, 1].any()
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.isfinite().all()


SLOPES = {  # at u = 0, of the functions that have another one there than 0
    "arctan": 2 / torch.pi,
    "relsign": 1 / 2,
    **dict.fromkeys(("isru", "linear_clip", "satursin", "smoothsign"), 1),
}


STEEP = ("exproot", "power23_clip")  # 0 times infinity, were it not for `root`


@pytest.mark.parametrize("name", POINTWISE)
def test_functions_of_the_derf_study_have_a_slope_at_zero(name):
    slope_at_zero(name, reference(ZOO[f"pointwise_{name}"].text))


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["c", "torch", "tape"])
@pytest.mark.parametrize("name", STEEP)
def test_where_a_function_is_steep_backends_have_the_same_slope(name, backend):
    slope_at_zero(name, compile(ZOO[f"pointwise_{name}"].text, backend=backend))


def slope_at_zero(name, layer):
    x = torch.tensor([[0.0, -0.0, 1.0]], dtype=torch.float64).requires_grad_()
    given = [torch.tensor(number, dtype=torch.float64).requires_grad_() for number in (0.5, 0)]
    columns = {"gamma": torch.ones(3).double(), "beta": torch.zeros(3).double()}
    y = layer(x, alpha=given[0], shift=given[1], **columns)
    assert not y[0, :2].any()
    d_x, d_alpha, d_shift = torch.autograd.grad(y[0, :2].sum(), (x, *given))
    slope = SLOPES.get(name, 0)
    assert_close(d_x, torch.tensor([[slope / 2, slope / 2, 0]], dtype=torch.float64))
    assert not d_alpha and float(d_shift) == pytest.approx(2 * slope)


@pytest.mark.parametrize("layer", BEYOND, ids=lambda layer: layer.name)
def test_what_is_beyond_the_language_has_its_paper_and_a_reason(layer):
    assert layer.name == layer.name.lower() and layer.name not in ZOO
    digits, number = layer.arxiv.split(".")
    assert (len(digits), len(number)) in ((4, 4), (4, 5)) and number.isdigit()
    assert 2000 + int(digits[:2]) == layer.year
    assert layer.reference == f"{layer.paper}, arXiv {layer.arxiv}, {layer.year}"
    assert layer.reason.strip() and "\n" not in layer.reason
    assert len({row.name for row in BEYOND}) == len(BEYOND)


def test_the_compiler_does_not_know_the_names():
    package = Path(zoo.__file__).parents[1]
    for room in ("language", "program", "schedule", "backends"):
        for file in (package / room).rglob("*.py"):
            if file.name != "zoo.py":
                text = file.read_text("utf-8")
                assert not [name for name in ZOO if f'"{name}"' in text], file
