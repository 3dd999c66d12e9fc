"""The page of a search's figures says what its numbers say."""

import json

import pytest

from benchmarks import search_page

pytestmark = pytest.mark.plain


def kept(name):
    return json.loads((search_page.FOLDER / name).read_text("utf-8"))


def test_the_page_is_up_to_date():
    page = search_page.page(kept("search.json"), kept("evolution.json"))
    assert search_page.PAGE.read_text("utf-8") == page


def test_seeds_that_evolution_wins_are_counted():
    record = kept("evolution.json")
    for row in record["rows"]:
        row["random"]["hypervolume"], row["evolution"]["hypervolume"] = 0.5, 0.4
    record["rows"][0]["evolution"]["hypervolume"] = 0.6
    (line,) = [x for x in search_page._evolution(record) if "ahead" in x]
    assert f"**1 of {len(record['rows'])}**" in line


def test_a_way_that_is_slower_is_said_to_be():
    way = {"candidates": 3, "per_minute": 30.0, "normc_on_the_same": 15.0, "normc_faster": 0.5}
    assert search_page._loop({"per_minute": {"eager": way}})[-2].endswith("| 15.0 | 0.50x |")
