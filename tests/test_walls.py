"""The walls of the house: who imports whom, what is never used, and how long things may be.

Each rule is a function from a source tree to the places where it is broken. It is tried on the real
tree, where it finds none, and on small trees with one planted violation, where it finds that one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
Rule = Callable[[Path], Iterator[str]]

_BASE = {"errors", "config"}
_COMPILER = {*_BASE, "language", "program", "schedule", "backends"}
_OPS = {*_COMPILER, "formula", "pipeline", "reference"}
_HOUSE = {*_OPS, "ops", "nn", "analysis", "search"}

MAY_IMPORT: dict[str, set[str]] = {
    # room: the other rooms it may import. Read top to bottom: arrows only run up.
    "errors": set(),
    "config": {"errors"},
    "grammar": set(),
    "language": {*_BASE, "grammar"},
    "program": {*_BASE, "language"},
    "schedule": {*_BASE, "language", "program"},
    "backends": {*_BASE, "language", "program", "schedule"},
    "formula": {*_BASE, "language", "program"},
    "pipeline": _COMPILER,
    "reference": {*_BASE, "language"},  # the oracle shares no code with derivation and codegen
    "ops": _OPS,
    "nn": {*_OPS, "ops"},
    "analysis": {*_OPS, "ops"},
    "search": {*_OPS, "ops", "nn", "analysis"},
    "normc": _HOUSE,  # normc/__init__.py: the public names
    "cli": {*_HOUSE, "normc"},
}

HOME = {  # of each foreign system: the one file that may import it
    "sympy": "normc/program/algebra.py",
    "lark": "normc/language/parse.py",
    "triton": "normc/backends/triton.py",
}

UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
EVALUATORS = {"eval", "exec", "__import__", "sympify", "parse_expr", "lambdify"}
DOTTED = {
    *("builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
LOADERS = {"spec_from_file_location", "exec_module", "SourceFileLoader"}


# --- reading a tree -------------------------------------------------------------------------------


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Every Python file of the package: its path from the root, and its text."""
    for top in ("normc", "grammar"):
        for path in sorted((root / top).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text("utf-8")


def nodes(root: Path) -> Iterator[tuple[str, ast.AST]]:
    for name, text in sources(root):
        for node in ast.walk(ast.parse(text)):
            yield name, node


def imports(root: Path) -> Iterator[tuple[str, int, str]]:
    """Every import, also within functions: file, line, and the dotted name of what is imported."""
    for name, node in nodes(root):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield name, node.lineno, alias.name
            case ast.ImportFrom():
                origin = _origin(name, node)
                for alias in node.names:
                    yield name, node.lineno, f"{origin}.{alias.name}"
            case ast.Call(args=[ast.Constant(str(text)), *_]) if _called(node) == "import_module":
                yield name, node.lineno, text
            case ast.Call(args=[ast.JoinedStr(values=[ast.Constant(str(text)), *_]), *_]) if (
                _called(node) == "import_module"
            ):
                yield name, node.lineno, text
            case _:
                pass


def _origin(name: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = Path(name).parts[: -node.level]
    return ".".join([*package, *filter(None, [node.module])])


def _called(node: ast.Call) -> str:
    return _dotted(node.func).rpartition(".")[2]


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` for a name with attributes; anything else in the place of the name is ``?``."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{_dotted(value)}.{attr}"
        case _:
            return "?"


def _room(dotted: str) -> str | None:
    """The room that an imported name lies in; None for what is not ours."""
    top, _, rest = dotted.partition(".")
    first = rest.partition(".")[0]
    if top == "grammar":
        return top
    if top != "normc":
        return None
    return first if first in MAY_IMPORT else "normc"


def _home(name: str) -> str:
    """The room that a file lies in."""
    parts = Path(name).with_suffix("").parts
    if parts[0] == "grammar":
        return "grammar"
    return "normc" if parts[1] == "__init__" else parts[1]


# --- the rules ------------------------------------------------------------------------------------


def arrows(root: Path) -> Iterator[str]:
    """Imports run one way."""
    for name, _ in sources(root):
        if _home(name) not in MAY_IMPORT:
            yield f"{name}: `{_home(name)}` is no room of the house (see MAY_IMPORT)"
    for name, line, dotted in imports(root):
        here, there = _home(name), _room(dotted)
        if there and there != here and there not in MAY_IMPORT.get(here, set()):
            yield f"{name}:{line}: {here} may not import {there}"


def doors(root: Path) -> Iterator[str]:
    """A foreign system is imported by one file only."""
    for name, line, dotted in imports(root):
        top = dotted.partition(".")[0]
        if name != HOME.get(top, name):
            yield f"{name}:{line}: {top} is imported in {HOME[top]} only"
    for name, _ in sources(root):
        if re.match(r"normc/backends/triton", name) and name != HOME["triton"]:
            yield f"{name}: the Triton backend is one file"


def execution(root: Path) -> Iterator[str]:
    """Text is never executed, and nothing is unpickled."""
    for name, line, dotted in imports(root):
        if dotted.partition(".")[0] in UNPICKLERS:
            yield f"{name}:{line}: {dotted} runs what a file says"
        if dotted in DOTTED or dotted.rpartition(".")[2] in EVALUATORS:
            yield f"{name}:{line}: {dotted} runs text"
    for name, node in nodes(root):
        found = _runs(node)
        if found in LOADERS and name == HOME["triton"]:
            continue  # the one loader of our own emitted source
        if found:
            yield f"{name}:{node.lineno}: {found} runs text"  # type: ignore[attr-defined]


def _runs(node: ast.AST) -> str:
    """What in a node runs text, or nothing."""
    match node:
        case ast.Name(id=name) if name in EVALUATORS | LOADERS:
            return name
        case ast.Attribute(attr=attr):
            dotted = _dotted(node)
            if dotted in DOTTED or attr in (EVALUATORS - {"eval", "exec"}) | LOADERS:
                return attr if attr in LOADERS else dotted
        case ast.Call():
            return _runs_call(node)
        case _:
            pass
    return ""


def _runs_call(node: ast.Call) -> str:
    given = {k.arg: k.value for k in node.keywords if k.arg}
    for flag in ("shell", "allow_pickle"):
        if flag in given and not _is_constant(given[flag], False):
            return f"{flag}=True"
    mode = given.get("mode", node.args[2] if len(node.args) > 2 else None)
    modes = ("exec", "eval", "single")
    if _called(node) == "compile" and mode and any(_is_constant(mode, m) for m in modes):
        return "compile"
    return "sympy.S" if _called(node) == "S" else ""


def _is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def texture(root: Path) -> Iterator[str]:
    """Short functions; a long file says why in its first line; what is to do stands in an issue."""
    for name, node in nodes(root):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > 60:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, more than 60"
    for name, text in sources(root):
        lines = text.splitlines()
        if len(lines) > 350 and not re.search(r"\blong(er)?\b", lines[0], re.IGNORECASE):
            yield f'{name}: {len(lines)} lines, and the first does not say why ("long because ...")'
        for number, line in enumerate(lines, 1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", line):
                yield f"{name}:{number}: something to do is an issue, not a comment"


RULES: list[Rule] = [arrows, doors, execution, texture]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    assert list(rule(ROOT)) == []


def test_the_house_is_there() -> None:
    names = [name for name, _ in sources(ROOT)]
    assert {"normc/__init__.py", "normc/pipeline.py", "grammar/__init__.py"} <= set(names)
    assert len(list(imports(ROOT))) > 100


# --- planted violations ---------------------------------------------------------------------------

LONG = "def f():\n" + "    pass\n" * 60

PLANTED: list[tuple[Rule, str, str, str]] = [
    # rule, file, its text, what the rule says
    (arrows, "normc/language/a.py", "from normc.program import tidy", "may not import program"),
    (arrows, "normc/language/a.py", "import normc.ops.op", "may not import ops"),
    (arrows, "normc/language/a.py", "from ..program import tidy", "may not import program"),
    (arrows, "normc/language/a.py", "from .. import pipeline", "may not import pipeline"),
    (arrows, "normc/language/__init__.py", "from ..ops import op", "may not import ops"),
    (arrows, "normc/errors.py", "from normc import config", "may not import config"),
    (arrows, "normc/program/a.py", "def f():\n    from normc.schedule import plan", "schedule"),
    (arrows, "normc/reference.py", "from normc.program.program import P", "may not import program"),
    (arrows, "normc/formula.py", "from normc.ops.op import Op", "may not import ops"),
    (arrows, "normc/pipeline.py", "from normc.ops.op import Op", "may not import ops"),
    (arrows, "normc/backends/a.py", "from normc.pipeline import build", "may not import pipeline"),
    (arrows, "normc/backends/a.py", "from normc.reference import r", "may not import reference"),
    (arrows, "normc/ops/a.py", "from normc.nn import KernelNorm", "may not import nn"),
    (arrows, "normc/ops/a.py", "import importlib as i\ni.import_module('normc.nn')", "import nn"),
    (arrows, "normc/ops/a.py", "import_module(f'normc.search.{name}')", "may not import search"),
    (arrows, "normc/nn/a.py", "from normc.analysis import gains", "may not import analysis"),
    (arrows, "normc/search/a.py", "from normc.cli import main", "may not import cli"),
    (arrows, "normc/search/a.py", "import normc", "may not import normc"),
    (arrows, "normc/search/a.py", "from normc import Layer", "may not import normc"),
    (arrows, "normc/__init__.py", "from normc.cli.main import main", "may not import cli"),
    (arrows, "grammar/__init__.py", "from normc.errors import E", "may not import errors"),
    (arrows, "normc/utils.py", "", "no room of the house"),
    (doors, "normc/program/a.py", "import sympy", "sympy is imported in"),
    (
        doors,
        "normc/program/a.py",
        "def f():\n    from sympy.core import Add",
        "sympy is imported in",
    ),
    (doors, "normc/language/a.py", "from lark import Lark", "lark is imported in"),
    (doors, "normc/ops/a.py", "import triton.language as tl", "triton is imported in"),
    (doors, "normc/ops/a.py", "importlib.import_module('triton')", "triton is imported in"),
    (doors, "normc/backends/triton_split.py", "", "one file"),
    (doors, "normc/backends/triton/a.py", "", "one file"),
    (execution, "normc/a.py", "eval('1')", "eval"),
    (execution, "normc/a.py", "run = exec", "exec"),
    (execution, "normc/a.py", "import builtins\nbuiltins.eval('1')", "builtins.eval"),
    (execution, "normc/a.py", "compile(text, 'f', 'exec')", "compile"),
    (execution, "normc/a.py", "compile(text, 'f', mode='eval')", "compile"),
    (execution, "normc/a.py", "import pickle", "pickle"),
    (execution, "normc/a.py", "from pickle import loads", "pickle"),
    (execution, "normc/a.py", "import numpy\nnumpy.load(f, allow_pickle=True)", "allow_pickle"),
    (execution, "normc/a.py", "torch.load(f, weights_only=True)", "torch.load"),
    (execution, "normc/a.py", "from torch import load", "torch.load"),
    (execution, "normc/program/algebra.py", "sympy.sympify('x')", "sympify"),
    (execution, "normc/program/algebra.py", "from sympy import lambdify", "lambdify"),
    (execution, "normc/program/algebra.py", "sympy.S('x')", "sympy.S"),
    (execution, "normc/program/algebra.py", "parse_expr('x')", "parse_expr"),
    (execution, "normc/a.py", "subprocess.run(c, shell=True)", "shell"),
    (execution, "normc/a.py", "subprocess.run(c, shell=flag)", "shell"),
    (execution, "normc/a.py", "os.system('ls')", "os.system"),
    (execution, "normc/a.py", "__import__('os')", "__import__"),
    (execution, "normc/backends/c.py", "spec.loader.exec_module(m)", "exec_module"),
    (execution, "normc/backends/c.py", "util.spec_from_file_location('a')", "spec_from_file"),
    (texture, "normc/a.py", LONG, "61 lines, more than 60"),
    (texture, "normc/a.py", '"""A file."""\n' * 351, "does not say why"),
    (texture, "normc/a.py", "x = 1  # TODO later", "an issue"),
    (texture, "grammar/a.py", "# FIXME", "an issue"),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (arrows, "normc/language/a.py", "from normc.errors import E\nfrom normc import config"),
    (arrows, "normc/language/a.py", "from . import expr\nfrom .expr import E\nimport torch"),
    (arrows, "normc/ops/a.py", "from normc.pipeline import build\nfrom normc.reference import r"),
    (arrows, "normc/search/a.py", "from normc.nn import K\nfrom normc.analysis import c"),
    (arrows, "normc/cli/main.py", "import normc\nfrom normc import Layer"),
    (arrows, "normc/__init__.py", "from normc.ops.op import Op"),
    (doors, "normc/program/algebra.py", "import sympy"),
    (doors, "normc/language/parse.py", "from lark import Lark"),
    (doors, "normc/backends/triton.py", "import triton.language as tl"),
    (doors, "normc/ops/a.py", "find_spec('triton')\nfrom normc.backends import triton"),
    (execution, "normc/a.py", "model.eval()\nre.compile('x', flags)\nnormc.compile(f, 'c')"),
    (execution, "normc/a.py", "subprocess.run(c, shell=False)\nconnection.exec(q)"),
    (execution, "normc/program/algebra.py", "sympy.S.Half\nsympy.Symbol('x')"),
    (execution, "normc/backends/triton.py", "spec.loader.exec_module(m)"),
    (texture, "normc/a.py", LONG.replace("    pass\n", "", 1)),
    (texture, "normc/a.py", '"""A table, long because it has many rows."""\n' * 351),
]


def _plant(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


@pytest.mark.parametrize(("rule", "name", "text", "says"), PLANTED)
def test_a_planted_violation_is_found(
    tmp_path: Path, rule: Rule, name: str, text: str, says: str
) -> None:
    found = list(rule(_plant(tmp_path, name, text)))
    assert found and all(name in line for line in found)
    assert any(says in line for line in found)


@pytest.mark.parametrize(("rule", "name", "text"), ALLOWED)
def test_what_is_allowed_is_not_found(tmp_path: Path, rule: Rule, name: str, text: str) -> None:
    assert list(rule(_plant(tmp_path, name, text))) == []


# --- what is shipped ------------------------------------------------------------------------------


def test_every_package_is_shipped() -> None:
    """setuptools is told the packages by name; a new folder must not be left out of the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {p.parent for p in (ROOT / "normc").rglob("*.py")}
    there = {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert set(listed["packages"]) == there | {"normc.grammar"}
    assert len(listed["packages"]) == len(set(listed["packages"]))
    assert all((folder / "__init__.py").exists() for folder in folders)
