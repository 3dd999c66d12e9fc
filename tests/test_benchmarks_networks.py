"""Networks learn digits; the page of their figures and of KNConv's says what its numbers say."""

import json

import pytest
import torch
from torch import nn

from benchmarks import networks, networks_page
from normc.nn.kernel_norm import KernelNorm2d1x1
from normc.nn.kn_conv import KNConv2d


def kept(name):
    return json.loads((networks_page.FOLDER / name).read_text("utf-8"))


@pytest.mark.plain
def test_the_page_is_up_to_date():
    page = networks_page.page(kept("networks.json"), kept("kn_conv.json"))
    assert networks_page.PAGE.read_text("utf-8") == page


@pytest.mark.plain
def test_a_line_has_the_accuracies_of_its_network():
    record = kept("networks.json")
    assert list(record["rows"]) == list(networks.NETWORKS)
    record["rows"]["NF-ResNet"]["runs"][1]["accuracy"] = 12.34
    (line,) = [x for x in networks_page._networks(record) if x.startswith("| NF-ResNet ")]
    assert line.split(" | ")[3] == "12.3"


@pytest.mark.cpu
def test_the_twin_has_the_same_convolutions_and_batch_norm():
    torch.manual_seed(0)
    kernel, batch = networks.kn_resnet_digits(), networks.twin()
    mine = [m for m in kernel.modules() if isinstance(m, nn.Conv2d)]
    theirs = [m for m in batch.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in mine] == [m.weight.shape for m in theirs]
    assert not any(isinstance(m, (KNConv2d, KernelNorm2d1x1)) for m in batch.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in batch.modules()) == len(mine) + 1
    x = torch.randn(2, 1, 8, 8)
    assert kernel.stages(kernel.stem(x)).shape == batch.stages(batch.stem(x)).shape


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("NF-ResNet", "KNResNet") else pytest.mark.thorough)
        for name in networks.NETWORKS
    ],
)
def test_a_network_learns(name, monkeypatch):
    """In a quarter of the steps, far better than guessing."""
    monkeypatch.setattr(networks, "RECIPE", networks.Recipe(steps=150, batch=64, rate=0.05))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = networks.trained(networks.NETWORKS[name], 0)
    torch.set_num_threads(before)
    assert run["finite"] and run["accuracy"] > 60
