"""Shapes: x seen as (N, G, K, S), and what is said of shapes that do not fit."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normc.errors import ShapeError
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.geometry import Geometry, auto_groups

N, G, K, S = Axis.N, Axis.G, Axis.K, Axis.S

LAYOUTS = [
    # shape of x, channel_dim, sizes over N G K S with 2 groups, spatial sizes
    ((3, 4, 5, 6), 1, (3, 2, 2, 30), (5, 6)),
    ((3, 5, 6, 4), -1, (3, 2, 2, 30), (5, 6)),
    ((3, 5, 4, 6), 2, (3, 2, 2, 30), (5, 6)),
    ((4, 3, 5, 6), 0, (3, 2, 2, 30), (5, 6)),
    ((3, 7, 4), -1, (3, 2, 2, 7), (7,)),
    ((3, 4), 1, (3, 2, 2, 1), ()),
    ((3, 4), -1, (3, 2, 2, 1), ()),
    ((3, 4, 2, 5, 6), 1, (3, 2, 2, 60), (2, 5, 6)),
    ((0, 4, 5), 1, (0, 2, 2, 5), (5,)),
]


@pytest.mark.parametrize(("shape", "channel_dim", "sizes", "spatial"), LAYOUTS)
def test_sizes(shape, channel_dim, sizes, spatial):
    geometry = Geometry.of(shape, 2, channel_dim)
    assert geometry.sizes() == sizes
    assert geometry.spatial == spatial
    assert geometry.channel_dim == channel_dim % len(shape)
    assert (geometry.rank, geometry.channels) == (len(shape), 4)
    assert geometry.shape_of(FULL) == shape


@pytest.mark.parametrize(
    ("axes", "nchw", "channels_last"),
    [
        (NONE, (), ()),
        (N, (3,), (3,)),
        (CHANNEL, (4,), (4,)),
        (S, (5, 6), (5, 6)),
        (N | CHANNEL, (3, 4), (3, 4)),
        (N | S, (3, 5, 6), (3, 5, 6)),
        (CHANNEL | S, (4, 5, 6), (5, 6, 4)),
        (FULL, (3, 4, 5, 6), (3, 5, 6, 4)),
        (G, (2,), (2,)),
        (K | S, (2, 5, 6), (5, 6, 2)),
    ],
)
def test_a_tensor_has_the_shape_of_x_without_the_missing_dimensions(axes, nchw, channels_last):
    assert Geometry.of((3, 4, 5, 6), 2).shape_of(axes) == nchw
    assert Geometry.of((3, 5, 6, 4), 2, -1).shape_of(axes) == channels_last


def test_counts():
    geometry = Geometry.of((3, 4, 5, 6), 2)
    assert geometry.count(NONE) == 1
    assert geometry.count(K | S) == 60
    assert geometry.count(CHANNEL) == 4
    assert geometry.count(FULL) == 360
    assert geometry.sizes(N | K) == (3, 1, 2, 1)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.data())
def test_unfolding_and_back_is_the_identity(shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    axes = data.draw(st.sampled_from([N, CHANNEL, S, N | S, N | CHANNEL, CHANNEL | S, FULL]))
    geometry = Geometry.of(shape, "auto", dim)
    user, there, back = (
        geometry.shape_of(axes),
        geometry.to_unfolded(axes),
        geometry.from_unfolded(axes),
    )
    assert tuple(user[d] for d in there) == geometry.unfolded(axes)
    assert tuple(there[d] for d in back) == tuple(range(len(user)))
    assert prod(user) == geometry.count(axes)


@given(st.integers(0, 5000))
def test_auto_groups_is_the_largest_divisor_up_to_32(channels):
    expected = max((d for d in range(1, 33) if d <= channels and channels % d == 0), default=1)
    assert auto_groups(channels) == expected
    assert Geometry.of((1, channels), "auto").g == expected


@pytest.mark.parametrize(
    ("shape", "groups", "channel_dim", "says"),
    [
        ((4,), 1, 0, ["2 to 5 dimensions", "(4,)"]),
        ((1, 2, 3, 4, 5, 6), 1, 1, ["2 to 5 dimensions, not 6"]),
        ((), 1, 0, ["not 0", "()"]),
        ((2, 8), 1, 2, ["channel_dim=2", "use -2 to 1"]),
        ((2, 8, 3), 1, -4, ["channel_dim=-4", "(2, 8, 3)"]),
        ((2, 8, 3), 3, 1, ["groups=3", "8 channels", "dimension 1", "groups=2", '"auto"']),
        ((2, 8, 3), 16, 1, ["groups=16", "groups=8"]),
        ((2, 8, 3), 0, 1, ["positive whole number", "not 0"]),
        ((2, 8, 3), -2, 1, ["not -2"]),
        ((2, 8, 3), 2.0, 1, ["not 2.0"]),
        ((2, 8, 3), "all", 1, ["not 'all'"]),
    ],
)
def test_a_wrong_shape_is_named_with_the_way_out(shape, groups, channel_dim, says):
    with pytest.raises(ShapeError) as error:
        Geometry.of(shape, groups, channel_dim)
    for words in says:
        assert words in str(error.value)
