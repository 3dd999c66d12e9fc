"""Every example runs, without a warning, and prints something."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.timeout(120)  # a few seconds are enough, where a machine has nothing else to do
def test_an_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
    assert all(path.name[:2].isdigit() for path in EXAMPLES), "numbered in the order to read them"
