"""The documentation is true: printed pages are up to date, code runs, output is real, links lead
somewhere, and the recipes for newcomers work."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from normc.analysis.agreement import FACTOR, TOLERANCE
from normc.cli.main import app

ROOT = Path(__file__).parents[1]
ADDING = ROOT / "docs" / "adding.md"
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if path.name != "environment.md"  # its own test compares it
)


def load(path: Path) -> ModuleType:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """What stands between the fences of one language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def labelled(page: Path, label: str) -> list[tuple[str, str]]:
    """Blocks below a comment ``<!-- label: about -->``, with what it says they are about."""
    pattern = rf"^<!-- {label}: (.*?) -->\n```\w*\n(.*?)^```$"
    return re.findall(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


# --- printed pages --------------------------------------------------------------------------------


PRINTED = load(ROOT / "docs" / "generate.py").PAGES


@pytest.mark.parametrize("name", PRINTED)
def test_a_printed_page_is_up_to_date(name: str) -> None:
    """Also the outputs that the README quotes."""
    page = (ROOT / "docs" / name).read_text("utf-8")
    assert page == PRINTED[name](), f"{name} is out of date: run make docs"


def test_the_tolerances_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "numerics.md").read_text("utf-8")
    assert all(f"| {dtype} | {tolerance:g} |" in text for dtype, tolerance in TOLERANCE.items())
    assert f"at most {FACTOR:g} times" in text


# --- code ----------------------------------------------------------------------------------------


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command with normc taken from ``folder``."""
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def run_python(page: Path, tree: Path, folder: Path) -> None:
    """Run all Python of a page as one file, with normc taken from ``tree``."""
    file = folder / f"{page.stem}_code.py"
    file.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    run([sys.executable, str(file)], tree)


@pytest.mark.cpu
def test_the_readme_runs(tmp_path: Path) -> None:
    run_python(ROOT / "README.md", ROOT, tmp_path)


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| `normc (\w+)", text, re.MULTILINE)
    there = [command.callback for command in app.registered_commands]
    assert listed == [function.__name__ for function in there if function]


# --- the recipes ----------------------------------------------------------------------------------


def apply(diff: str, tree: Path) -> None:
    """Apply a diff by its context; line numbers are not needed."""
    head, *hunks = re.split(r"^@@\n", diff, flags=re.MULTILINE)
    path = tree / re.findall(r"^\+\+\+ b/(.*)$", head, re.MULTILINE)[0]
    text = path.read_text("utf-8")
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(old) == 1, f"where does this go in {path.name}?\n{hunk}"
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree in which every recipe has been followed."""
    tree = tmp_path_factory.mktemp("recipes")
    ignore = shutil.ignore_patterns("__pycache__", "golden")
    for name in ("normc", "grammar", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for diff in blocks(ADDING, "diff"):
        apply(diff, tree)
    for name, text in labelled(ADDING, "file"):
        (tree / name).write_text(text, encoding="utf-8")
    return tree


@pytest.mark.cpu
@pytest.mark.parametrize(
    "command",
    [line for text in blocks(ADDING, "sh") for line in text.splitlines() if "pytest" in line],
    ids=lambda line: line.split()[-1],
)
def test_a_recipe_passes_the_tests_it_names(recipes: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "python"
    run([sys.executable, *arguments, "-q", "-p", "no:cacheprovider"], recipes)


@pytest.mark.cpu
def test_the_python_of_the_recipes_runs(recipes: Path, tmp_path: Path) -> None:
    run_python(ADDING, recipes, tmp_path)


# --- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"
