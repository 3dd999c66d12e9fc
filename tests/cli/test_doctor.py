"""`normc doctor`: a line for everything, whatever is broken."""

import pytest
from typer.testing import CliRunner

from normc.cli import doctor
from normc.cli.main import app


def run():
    return CliRunner().invoke(app, ["doctor", "--no-color"])


def broken():
    raise OSError("[it] broke\nin two lines")


@pytest.mark.aot  # compiles for a GPU, and C
def test_every_part_is_tried():
    result = run()
    assert result.exit_code == 0
    for name, _, _ in doctor.PROBES:
        assert name in result.output
    assert "compiled and ran in" in result.output
    assert "lines of PTX" in result.output
    assert "mode 700" in result.output


def test_a_broken_part_is_a_line_with_advice(monkeypatch):
    probes = (("torch", lambda: "fine", ""), ("GPU", broken, "buy one"))
    monkeypatch.setattr(doctor, "PROBES", probes)
    result = run()
    assert result.exit_code == 0
    assert "missing" in result.output and "[it] broke" in result.output
    assert "two lines" not in result.output
    assert "buy one" in result.output


def test_without_torch_the_status_is_1(monkeypatch):
    monkeypatch.setattr(doctor, "PROBES", (("torch", broken, "reinstall"),))
    assert run().exit_code == 1


def test_a_backend_that_computes_nonsense_is_broken(monkeypatch):
    for room in ("ops.judge", "analysis.agreement"):
        monkeypatch.setattr(f"normc.{room}.TOLERANCE", {"float32": 0.0})
    monkeypatch.setattr("normc.ops.judge.FACTOR", 0.0)
    with pytest.raises(RuntimeError, match="is wrong"):
        doctor._run("torch")
