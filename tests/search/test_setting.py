"""Setting: to JSON and back, and what does not fit is named with its place."""

import json
import math
import re
from dataclasses import replace

import pytest

from normc.errors import NormcError
from normc.search.evaluate import check
from normc.search.evolve import Evolution
from normc.search.nets import Scale
from normc.search.objectives import Objective, expand, score_names
from normc.search.setting import Limits, Quality, Recipe, Setting, Stability
from normc.search.space import EVONORM, Space

OTHER = Setting(
    evolution=Evolution(
        seed=3, series="S", full=False, strategy="random", population=5, window=6,
        tournament=0.5, fewest=7, winner="average", mutations=1, fresh=0.0, lag=2,
    ),
    space=Space({"SIN": "sin(a)", "CLIP": "clamp(a, -1, b)"}, ("x", "alpha"), nodes=3),
    data="cifar10:/some/where",
    architectures=("mobilenet",),
    scale=Scale(4, (1, 2, 3)),
    objectives=("accuracy", "bytes"),
    recipe=Recipe(7, 8, 0.25, 0.0, 0.0, "constant"),
    quality=Quality(7, 0.0),
    stability=Stability(0, 1e4, 0.5, 2, 3),
    limits=Limits(1.5, 100),
    groups=8,
    eps=1e-3,
    backend="torch",
    device="cuda",
)  # fmt: skip


@pytest.mark.parametrize("setting", [Setting(), OTHER])
def test_a_setting_is_read_from_its_text(setting):
    text = setting.to_json()
    back = Setting.from_json(text)
    assert back == setting and back.to_json() == text
    assert Setting.from_json(text.encode()) == setting
    assert Setting.from_json(json.dumps(json.loads(text), indent=1)) == setting


def test_every_field_is_in_the_text():
    """Or a resumed run would be another one."""
    default, other = json.loads(Setting().to_json()), json.loads(OTHER.to_json())
    assert default.keys() == other.keys()
    for name, value in default.items():
        if not isinstance(value, dict):
            assert value != other[name], name
            continue
        assert value.keys() == other[name].keys()
        assert all(value[k] != other[name][k] for k in value), name


def test_what_is_left_out_is_as_by_default():
    assert Setting.from_json("{}") == Setting()
    text = '{"recipe": {"rate": 0.5}, "evolution": {"seed": 4, "series": "S"}, "groups": 4}'
    expected = Setting(Evolution(seed=4, series="S"), recipe=Recipe(rate=0.5), groups=4)
    assert Setting.from_json(text) == expected


def test_a_space_of_ones_own():
    space = {"operations": {"TWICE": "a + a", "groups": "a*b"}, "initial": ["x", "v"], "nodes": 2}
    found = Setting.from_json(json.dumps({"space": space})).space
    assert found == Space(space["operations"], ("x", "v"), 2)
    assert found.operation("TWICE").arity == 1
    partial = Setting.from_json('{"space": {"operations": {"NEG": "-a"}}}').space
    assert (partial.initial, partial.nodes) == (EVONORM.initial, EVONORM.nodes)


@pytest.mark.parametrize(
    "text, place",
    [
        ('{"colour": 1}', "$.colour"),
        ('{"recipe": {"step": 3}}', "$.recipe.step"),
        ('{"evolution": {"seed": 1, "sead": 2}}', "$.evolution.sead"),
        ('{"space": {"operations": {"NEG": "-a"}, "node": 3}}', "$.space.node"),
        ('{"scale": {"widths": 3}}', "$.scale.widths"),
        ('{"limits": {"": 3}}', "$.limits."),
    ],
)
def test_an_unknown_name_is_told(text, place):
    with pytest.raises(NormcError, match=f"nothing is called {re.escape(place)}$"):
        Setting.from_json(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"groups": "many"}', "$.groups"),
        ('{"groups": 2.5}', "$.groups"),
        ('{"data": 3}', "$.data"),
        ('{"recipe": {"steps": "300"}}', "$.recipe.steps"),
        ('{"recipe": {"steps": 1.5}}', "$.recipe.steps"),
        ('{"recipe": {"schedule": "linear"}}', "$.recipe.schedule"),
        ('{"recipe": []}', "$.recipe"),
        ('{"evolution": {"series": "b"}}', "$.evolution.series"),
        ('{"evolution": {"seed": null}}', "$.evolution.seed"),
        ('{"architectures": "resnet"}', "$.architectures"),
        ('{"scale": {"depth": [1, "2"]}}', "$.scale.depth[1]"),
        ('{"space": {"operations": {"NEG": 1}}}', "$.space.operations"),
        ('{"space": {"nodes": 3}}', "operations"),
    ],
)
def test_a_value_of_another_type_is_told_with_its_place(text, message):
    with pytest.raises(NormcError, match=re.escape(message)):
        Setting.from_json(text)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"eps": 1e999}', b"\xff", "[" * 9999]
)
def test_what_is_no_setting_is_told(text):
    with pytest.raises(NormcError, match="no setting of a search"):
        Setting.from_json(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"recipe": {"rate": 0}}', r"recipe.rate is 0.*more than 0.*\$.recipe"),
        ('{"recipe": {"batch": -1}}', r"recipe.batch is -1.*\$.recipe"),
        ('{"quality": {"steps": 0}}', r"quality.steps is 0.*\$.quality"),
        ('{"stability": {"networks": 0}}', r"stability.networks is 0.*\$.stability"),
        ('{"limits": {"seconds": 0}}', r"limits.seconds is 0.*\$.limits"),
        ('{"evolution": {"lag": 0}}', r"lag is 0: expected at least 1.*\$.evolution"),
        ('{"evolution": {"fresh": 1.5}}', r"fresh is 1.5: expected a share.*\$.evolution"),
        ('{"recipe": {"steps": 99}}', r"judged after 100 steps, but training has 99"),
        ('{"architectures": []}', "at least one architecture"),
        ('{"objectives": []}', "at least one architecture and one objective"),
        ('{"space": {"operations": {}}}', r"operations and initial nodes.*\$.space"),
        ('{"space": {"operations": {"NEG": "-a"}, "nodes": 0}}', r"at least one node.*\$.space"),
        ('{"space": {"operations": {"ONE": "1 + x"}}}', r"ONE reads no node.*\$.space"),
        ('{"space": {"operations": {"BAD": "a +"}}}', r"(?s)a \+.*\$.space"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_with_its_place(text, message):
    with pytest.raises(NormcError, match=message):
        Setting.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"scale": {"width": 0}}',
        '{"groups": 0}',
        '{"groups": 3}',
        '{"recipe": {"momentum": -0.5}}',
        '{"backend": "abacus"}',
        '{"device": "abacus"}',
    ],
)
def test_a_setting_under_which_nothing_works_is_refused(text):
    with pytest.raises(NormcError):
        check(Setting.from_json(text), ())


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0])
def test_rates_are_positive_numbers(value):
    with pytest.raises(NormcError, match="recipe.rate is"):
        Recipe(rate=value)
    with pytest.raises(NormcError, match="stability.limit is"):
        Stability(limit=value)


def test_names_are_looked_up_before_a_search():
    check(Setting(), ())
    with pytest.raises(NormcError, match="no architecture is called `resnext`.*resnet"):
        check(replace(Setting(), architectures=("resnet", "resnext")), ())
    with pytest.raises(NormcError, match="no objective is called `byte`.*bytes"):
        check(replace(Setting(), objectives=("byte",)), ())
    short = Objective("short", lambda trained: 0.0)
    mine = replace(Setting(), objectives=("short", "accuracy", "bytes"))
    with pytest.raises(NormcError, match="`short`.*passed as an Objective"):
        check(mine, ())
    check(mine, [short])
    assert expand(mine, [short])[0] is short
    names = [objective.name for objective in expand(mine, [short])]
    assert score_names(mine) == tuple(names) == (
        "short", "accuracy resnet", "accuracy mobilenet", "accuracy efficientnet", "bytes",
    )  # fmt: skip
