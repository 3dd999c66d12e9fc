"""How tests run: by cost, with their own cache, reproducibly, and with golden texts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
COSTS = ("plain", "tiny", "cpu", "interpret", "aot", "gpu")  # cheapest first
WORKER = "PYTEST_XDIST_WORKER" in os.environ
INTERPRETER = os.environ.get("TRITON_INTERPRET", "0") == "1"

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50, suppress_health_check=_SLOW
)
settings.register_profile(
    "fuzz", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts")


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the machine, and repeatable results want a fixed number of threads anyway.
    torch.set_num_threads(1 if WORKER else min(4, os.cpu_count() or 1))
    if not WORKER:  # workers start later, inherit the variable and share the folder
        folder = tempfile.mkdtemp(prefix="normc-tests-")
        os.environ["NORMC_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _cost(item) == 0:
            item.add_marker("plain")
        for reason in _skips(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=_cost)


def _cost(item: pytest.Item) -> int:
    return max(rank if item.get_closest_marker(cost) else 0 for rank, cost in enumerate(COSTS))


def _skips(item: pytest.Item) -> list[str]:
    """Triton decides at import whether it interprets, so one process cannot do both."""
    cost = COSTS[_cost(item)]
    if cost == "interpret" and not INTERPRETER:
        return ["interprets Triton kernels: needs TRITON_INTERPRET=1"]
    if cost in ("aot", "gpu") and INTERPRETER:
        return ["compiles Triton kernels: not under TRITON_INTERPRET=1"]
    if cost == "gpu" and not torch.cuda.is_available():
        return ["needs a CUDA device"]
    return []


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden("name", text)`` compares with tests/golden/<module>/<name>.txt.

    <module> is the test file's path without ``test_`` and ``.py``: backends/c for
    tests/backends/test_c.py. ``pytest --update-golden`` writes instead; read the diff like code.
    """
    module = request.path.relative_to(TESTS)
    folder = TESTS / "golden" / module.parent / module.stem.removeprefix("test_")

    def check(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists():
            pytest.fail(f"no golden text {path}: write it with pytest --update-golden")
        else:
            assert text == path.read_text("utf-8"), f"{path} differs; see pytest --update-golden"

    return check


@pytest.fixture
def one_thread() -> Generator[None, None, None]:
    """For small tensors: on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
