"""`normc zoo`: the table, and one entry."""

import pytest
from typer.testing import CliRunner

import normc
from normc.cli.main import app


def run(*args):
    result = CliRunner().invoke(app, ["zoo", *args, "--no-color"])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_has_every_entry():
    text = run()
    for name in normc.zoo:
        assert name in text
    assert "2004.02967" in text


@pytest.mark.parametrize("name", ["evonorm_s0", "ada_layer_norm", "qk_norm"])
def test_an_entry_in_detail(name):
    text, entry = run(name), normc.zoo[name].entry
    for fact in (name, entry.arxiv, entry.doc, f"{entry.eps:g}", *normc.zoo[name].params):
        assert getattr(fact, "name", fact) in text


def test_inputs_are_declared_with_their_axes():
    assert "x, scale[n,c], shift[n,c]" in run("ada_layer_norm")
