"""The command line as a whole: help, versions, and errors without a traceback."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from normc.cli.main import app

COMMANDS = (
    *("show", "check", "bench", "compile", "zoo", "doctor", "demo"),
    *("search", "resume", "rerank", "report"),
)


def run(*args):
    return CliRunner().invoke(app, list(args))


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


MISTAKES = [
    # command, its words, and what the message says
    (["show", "x/grup_std(x)"], "did you mean `group_std`?"),
    (["show", "instance_nrm"], "did you mean `instance_norm`?"),
    (["zoo", "grnn"], "did you mean `grn`?"),
    (["check", "x +"], "x +"),
    (["demo", "input z; x*z"], "no input beside x"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_a_clean_message(words, message):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_commands_import_nothing_heavy_until_they_run():
    """Beyond what `import normc` itself brings along."""
    code = (
        "import sys; import normc; before = set(sys.modules); import normc.cli.main; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("triton", "sklearn", "sympy"):
        assert f"'{heavy}'" not in done.stdout
