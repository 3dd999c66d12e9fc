"""`normc bench` on tensors so small that only its own words are tested."""

import json

import pytest
from typer.testing import CliRunner

from normc.analysis import machine, providers
from normc.cli.main import app

TINY = ("--shape", "2,8,5,3", "--groups", "4", "--rounds", "2", "--no-color")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Nothing to compile, and an allocator that is left alone."""
    monkeypatch.setenv("NORMC_BACKEND", "torch")
    monkeypatch.setattr(machine, "reuse_memory", lambda: "system")


def run(*args):
    return CliRunner().invoke(app, ["bench", *args])


def test_a_table_of_ours_and_eager():
    result = run("evonorm_s0", *TINY, "--against", "eager", "--threads", "1")
    assert result.exit_code == 0, result.output
    for part in (
        "x * sigmoid(v*x) / group_std(x) * gamma + beta",
        "x (2, 8, 5, 3) float32, A = 960 B, groups 4, threads 1, backend torch",
        "floor: forward 2A, forward+backward 5A",
        "/ normc",
        "x, v, gamma + ",
    ):
        assert part in result.output
    lines = [line.split()[0] for line in result.output.splitlines() if line]
    assert "normc" in lines and "eager" in lines and "inductor" not in lines


def test_every_number_goes_into_a_file(tmp_path):
    path = tmp_path / "out.json"
    words = ("--shape", "2,5,8", "--channel-dim", "-1", "--rounds", "2", "--json", str(path))
    result = run("add_rms_norm", *words, "--against", "eager", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert (found["shape"], found["dtype"], found["eps"]) == ([2, 5, 8], "bfloat16", 1e-6)
    assert (found["bytes"], found["channel_dim"], found["rounds"]) == (160, -1, 2)
    assert set(found["passes"]) == {"forward", "forward+backward"}
    times = found["passes"]["forward"]["times"]
    assert set(times) == set(found["errors"]) == set(found["saved"]) == {"normc", "eager"}
    assert times["normc"]["times_ours"] == 1 and times["eager"]["ms"] > 0
    assert set(found["errors"]["normc"]) == {"y0", "y1", "d_x", "d_residual", "d_gamma"}
    assert found["environment"]["malloc"] == "system"


def test_native_where_torch_has_the_layer():
    result = run("gamma*(x - mean[s](x))/std[s](x) + beta", *TINY, "--against", "native")
    assert result.exit_code == 0, result.output
    assert any(line.startswith("native ") for line in result.output.splitlines())
    assert "left out" not in result.output


def test_native_is_left_out_where_torch_has_none():
    result = run("evonorm_s0", *TINY, "--against", "native")
    assert result.exit_code == 0, result.output
    assert "native is left out: torch has no function of its own" in result.output


def test_what_does_not_run_is_left_out_with_its_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setitem(providers.PROVIDERS, "inductor", broken)
    result = run("evonorm_s0", *TINY, "--against", "inductor,eager")
    assert result.exit_code == 0, result.output
    assert "inductor is left out: no C++ compiler" in result.output
    assert "long story" not in result.output


def test_what_is_wrong_is_not_timed(monkeypatch):
    ours = providers.PROVIDERS["normc"]
    monkeypatch.setitem(
        providers.PROVIDERS,
        "normc",
        lambda *about: lambda **tensors: 1.001 * ours(*about)(**tensors),
    )
    result = run("evonorm_s0", *TINY, "--against", "eager")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: normc is not timed: the relative error of y is 1.0e-03")


MISTAKES = [
    # words after the formula, and what the message says
    (["--against", "egaer"], "did you mean `eager`?): choose from eager, inductor, native"),
    (["--shape", "2,8,x"], "--shape is '2,8,x'"),
    (["--shape", "2,0,5"], "expected sizes from 1"),
    (["--shape", "8"], "2 to 5 dimensions"),
    (["--shape", "2,8", "--groups", "3"], "use groups=2"),
    (["--shape", "2,8", "--channel-dim", "4"], "channel_dim=4"),
    (["--json", "no/such/folder.json"], "there is no folder 'no/such'"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_a_clean_message(words, message):
    result = run("evonorm_s0", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.output


def test_what_never_reads_x():
    result = run("1", *TINY, "--against", "eager")
    assert result.exit_code == 2
    assert "never reads `x`" in result.stderr


def test_a_name_that_the_zoo_lacks():
    result = run("evonorm_s9", *TINY)
    assert result.exit_code == 2
    assert "did you mean" in result.stderr
