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
from math import cosh, sqrt, tanh
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from docs import zoo_plots
from normc.analysis.agreement import FACTOR, TOLERANCE
from normc.cli.main import app
from normc.language.beyond import BEYOND
from normc.language.zoo import ZOO

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


# --- the zoo -------------------------------------------------------------------------------------

ZOO_PAGE = ROOT / "docs" / "zoo.md"
FIGURES = ROOT / "docs" / "figures" / "zoo"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
MINUS = "\N{MINUS SIGN}"
FEW = list(ZOO)[::13]


def decimals(number: str) -> int:
    return len(number.partition(".")[2])


def read(name: str, kind: str) -> list[tuple[float, float]]:
    """The points of a curve as its ticks say: not as the code that draws it counts."""
    root = ElementTree.parse(FIGURES / f"{name}.svg").getroot()
    (path,) = (node for node in root.findall("{*}path") if node.get("class") == kind)
    pixels = [float(word) for word in path.get("d", "").removeprefix("M").split()]
    texts = root.findall(".//{*}text")

    def scale(attribute: str, place: str, shift: float, values: list[float]) -> list[float]:
        ticks = [
            (float(node.get(attribute, "")) - shift, float((node.text or "").replace(MINUS, "-")))
            for node in texts
            if node.get("class") == f"tick {place}"
        ]
        (p, v), (q, w) = ticks[0], ticks[-1]
        return [v + (w - v) * (value - p) / (q - p) for value in values]

    across = scale("x", "middle", 0, pixels[::2])
    up = scale("y", "end", 4, pixels[1::2])  # a number stands a little below its line
    return list(zip(across, up, strict=True))


def test_every_layer_of_the_zoo_has_its_place_on_the_page() -> None:
    page = ZOO_PAGE.read_text("utf-8")
    links = re.findall(r"\[`(\w+)`\]\(#", page)
    assert links == list(ZOO)
    for name, row in ZOO.items():
        assert f"\n### {name}\n" in page or f"\n| `{name}`" in page
        assert page.count(f"(figures/zoo/{name}.svg)") == 1
        assert f"[{row.paper}](https://arxiv.org/abs/{row.arxiv}), {row.year}" in page
    for row in BEYOND:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.arxiv}), {row.year}"
        assert f"\n| `{row.name}` | {paper} | {row.reason} |\n" in page


def test_the_formulas_of_the_zoo_are_such_as_github_shows() -> None:
    """It refuses a few macros, and a formula may not be cut by the cells of a table."""
    page = ZOO_PAGE.read_text("utf-8")
    inline = re.findall(r"\$`(.*?)`\$", page)
    assert len(blocks(ZOO_PAGE, "math")) + len(inline) == len(ZOO)
    assert not any("|" in text for text in inline)
    for text in (*blocks(ZOO_PAGE, "math"), *inline):
        assert not re.search(r"\\(operatorname|mbox|def|newcommand|require|href)", text)
        assert text.count("{") == text.count("}")
        assert text.count(r"\left") == text.count(r"\right")


def test_the_figures_of_the_zoo_are_those_of_its_layers() -> None:
    assert {path.stem for path in FIGURES.iterdir()} == set(ZOO)
    for path in FIGURES.iterdir():
        text = path.read_text("utf-8")
        assert len(text) < 8000
        assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.thorough) for n in ZOO]
)
def test_a_figure_of_the_zoo_is_up_to_date(name: str) -> None:
    """But for a last digit, which another CPU may round otherwise."""
    there, made = (FIGURES / f"{name}.svg").read_text("utf-8"), zoo_plots.figure(ZOO[name])
    assert NUMBER.sub("", there) == NUMBER.sub("", made), "run make docs"
    for old, new in zip(NUMBER.findall(there), NUMBER.findall(made), strict=True):
        digits = max(decimals(old), decimals(new))
        unit = 10.0**-digits if digits else 0  # a whole number is no measure
        assert abs(float(old) - float(new)) <= 1.5 * unit, "run make docs"


@pytest.mark.parametrize(
    ("name", "y", "slope"),
    [
        ("tlu", lambda x: max(x, 0.0), lambda x: float(x > 0)),
        ("dyt", lambda x: tanh(x / 2), lambda x: 0.5 / cosh(x / 2) ** 2),
        ("film", lambda x: x + 1, lambda _: 1.0),
        ("grn", lambda x: x, lambda _: 1.0),
    ],
)
def test_a_curve_without_statistics_is_the_function(name, y, slope) -> None:
    for kind, function in (("y", y), ("slope", slope)):
        points = read(name, kind)
        assert points[0][0] == pytest.approx(-4, abs=0.01)
        assert points[-1][0] == pytest.approx(4, abs=0.01)
        assert len(points) == zoo_plots.POINTS
        for at, value in points:
            assert value == pytest.approx(function(at), abs=0.02)


def test_the_curve_of_batch_norm_is_that_of_its_definition() -> None:
    """And nearly a line through zero, as one of 64 elements has little share in its statistics."""
    channel = zoo_plots.sample()[:, 0].flatten()
    points = read("batch_norm", "y")
    for at, value in points:
        channel[0] = at
        mean, variance = float(channel.mean()), float(channel.var(correction=0))
        assert value == pytest.approx((at - mean) / sqrt(variance + 1e-5), abs=0.03)
    assert all(abs(value - at) < 0.7 for at, value in points)
    assert all(0.6 < slope < 1 for _, slope in read("batch_norm", "slope"))


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


COMMANDS = [line for text in blocks(ADDING, "sh") for line in text.splitlines() if "pytest" in line]


@pytest.mark.cpu
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(line, id=line.split()[-1], marks=pytest.mark.thorough if i else ())
        for i, line in enumerate(COMMANDS)
    ],
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
