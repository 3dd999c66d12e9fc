"""`normc demo`, with settings so small that it trains in seconds."""

import sys

import pytest
import torch
from typer.testing import CliRunner

from normc.cli import digits
from normc.cli.demo import BASELINE, run
from normc.cli.digits import Training
from normc.cli.main import app
from normc.cli.shell import console
from normc.formula import zoo

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def data():
    return digits.load()


@pytest.fixture
def torch_backend(monkeypatch):
    """Nothing to compile, so that only the demo itself is measured."""
    monkeypatch.setenv("NORMC_BACKEND", "torch")


def layers(channels):
    return torch.nn.Sequential(torch.nn.BatchNorm2d(channels), torch.nn.ReLU())


def test_the_digits_are_split_once_and_for_all(data):
    assert len(data.train) + len(data.test) == 1797
    assert data.train.shape[1:] == (1, 8, 8)
    assert 0 <= data.train.min() and data.train.max() == 1
    assert torch.equal(digits.load().test, data.test)


def test_training_learns_and_follows_from_the_seed(data):
    assert digits.train(layers, data, Training(epochs=3)) > 0.8
    how = Training(epochs=1, seed=3, batches=4)
    assert digits.train(layers, data, how) == digits.train(layers, data, how)


def test_plain_torch_is_the_same_layer(data):
    x = data.train[:4].expand(4, 16, 8, 8)
    layer = digits.Eager(zoo["evonorm_s0"], 16)
    assert sorted(name for name, _ in layer.named_parameters()) == ["beta", "gamma", "v"]
    assert layer(x).shape == x.shape


@pytest.mark.usefixtures("torch_backend")
def test_the_demo_ends_in_a_table(capsys):
    threads = torch.get_num_threads()
    scores = run("x*tanh(v*x)/group_std(x)", console(True), epochs=1, seeds=1, batches=2)
    assert [s.name for s in scores] == [BASELINE, "EvoNorm-S0", "EvoNorm-B0", "yours"]
    assert all(0 <= a <= 1 for s in scores for a in s.accuracies)
    assert all(s.eager > 0 and (s.compiled or 1) > 0 for s in scores)
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    for part in (
        "x*tanh(v*x)/group_std(x)",
        "d_v = ",
        "fwd: floor 2A",
        "gradients",
        "test accuracy",
    ):
        assert part in text


def test_without_scikit_learn_there_is_a_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert "pip install scikit-learn" in result.stderr
