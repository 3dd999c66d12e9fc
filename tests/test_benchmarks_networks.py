"""Networks learn digits; the page of their figures and of KNConv's says what its numbers say."""

import json

import pytest
import torch
import typer
from torch import nn

from benchmarks import kn_conv, networks, networks_page
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
    lines = "\n".join(networks_page._networks(record)).splitlines()
    (line,) = [x for x in lines if x.startswith("| NF-ResNet ")]
    assert line.split(" | ")[3] == "12.3"


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Both benchmarks with measurements that are at hand: a function that runs a part of one."""
    monkeypatch.setattr(networks, "row", lambda name, seeds: {"runs": [name] * seeds})
    monkeypatch.setattr(kn_conv, "_row", lambda row, batch, rounds: {"conv": row})
    threads = torch.get_num_threads()

    def run(which, words="", **options):
        path = tmp_path / f"{which}.json"
        if which == "networks":
            networks.main(**{"seeds": 2, "networks": words, "output": path, **options})
        else:
            kn_conv.main(
                **{"batch": 2, "rounds": 3, "layers": words, "threads": threads, "output": path}
                | options
            )
        return json.loads(path.read_text("utf-8"))

    return run, tmp_path


KINDS = [("networks", "KN", networks.NETWORKS), ("kn_conv", "square,stem", kn_conv.LAYERS)]


@pytest.mark.plain
@pytest.mark.parametrize("which, words, names", KINDS)
def test_a_part_takes_its_place_in_the_file(which, words, names, parts):
    run, folder = parts
    old = run(which)
    assert list(old["rows"]) == list(names)
    for row in old["rows"].values():
        row["old"], row["date"] = True, "2020-01-01"
    old["environment"]["date"] = "2020-01-01"
    (folder / f"{which}.json").write_text(json.dumps(old))
    new = run(which, words)
    assert list(new["rows"]) == list(names) and new["environment"] == old["environment"]
    fresh = [name for name, row in new["rows"].items() if "old" not in row]
    assert fresh == [name for name in names if any(word in name for word in words.split(","))]
    dates = {row["date"] for row in new["rows"].values()}
    assert len(dates) == 2 and "2020-01-01" in dates
    assert run(which)["environment"]["date"] in dates - {"2020-01-01"}, "all of it is new"


@pytest.mark.plain
@pytest.mark.parametrize("which, words, names", KINDS)
def test_a_part_of_another_kind_is_not_put_into_a_file(which, words, names, parts):
    run, folder = parts
    old = run(which)
    old["environment"]["torch"] = "1.0"
    (folder / f"{which}.json").write_text(json.dumps(old))
    with pytest.raises(typer.BadParameter, match=r"torch is .*, not 1\.0"):
        run(which, words)
    run(which)
    with pytest.raises(typer.BadParameter, match="no (layer|network)"):
        run(which, "nothing")
    other = {"seeds": 1} if which == "networks" else {"batch": 4}
    with pytest.raises(typer.BadParameter, match="have 2 runs each|batch is 4, not 2"):
        run(which, words, **other)


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
        pytest.param(name, marks=() if name == "NF-ResNet" else pytest.mark.thorough)
        for name in networks.NETWORKS
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_network_learns(name, monkeypatch):
    """In a quarter of the steps, far better than guessing."""
    monkeypatch.setattr(networks, "RECIPE", networks.Recipe(steps=150, batch=64, rate=0.05))
    run = networks.trained(networks.NETWORKS[name], 0)
    assert run["finite"] and run["accuracy"] > 60
