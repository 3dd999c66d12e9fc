"""Which activation follows a norm: by order in nn.Sequential, else by name and by the methods."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import FunctionType

from torch import nn

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.LogSigmoid, nn.Threshold),
)
"""What counts as an activation. nn.Sigmoid and nn.Hardsigmoid are left out: they are gates."""

_NORM = re.compile(r"(?:bn|norm)(\d*)")


def follower(parent: nn.Module, norm: str) -> str | None:
    """The name of the activation that is applied to the child ``norm``, and nowhere else."""
    children = parent._modules  # pyright: ignore[reportPrivateUsage]
    names = list(children)
    at = names.index(norm) + 1
    behind = next((n for n in names[at:] if _does_something(parent, n)), None)
    if behind is None or not isinstance(children[behind], ACTIVATIONS):
        return None
    if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
        return behind
    number = _NORM.fullmatch(norm)
    if number is None or behind not in (f"act{number[1]}", f"relu{number[1]}"):
        return None
    return behind if _applied_to(parent, behind, norm) else None


def _does_something(parent: nn.Module, name: str) -> bool:
    """Whether a member is there, and is more than nn.Identity."""
    member = getattr(parent, name, None)
    return member is not None and type(member) is not nn.Identity


def _applied_to(parent: nn.Module, act: str, norm: str) -> bool:
    """Whether there is ``act(norm(...))``, or both in two statements, and ``act`` only there.

    The names alone do not tell: a residual block's ``act2`` follows the sum, not ``bn2``.
    """
    every = [node for tree in _methods(type(parent)) for node in ast.walk(tree)]
    loads = [
        n for n in every if _member(n) == act and isinstance(getattr(n, "ctx", None), ast.Load)
    ]
    if len(loads) != 1:
        return False
    if any(_called(n) == act and _called(_argument(n)) == norm for n in every):
        return True
    return any(_successive(body, parent, act, norm) for body in _bodies(every))


@lru_cache(maxsize=256)
def _methods(kind: type[nn.Module]) -> tuple[ast.AST, ...]:
    """The methods of a class that are not torch's own; none if one has no source."""
    found: dict[str, FunctionType] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            if isinstance(value, FunctionType):
                found.setdefault(name, value)
    try:
        return tuple(ast.parse(textwrap.dedent(inspect.getsource(f))) for f in found.values())
    except (OSError, TypeError, SyntaxError):
        return ()


def _successive(body: list[ast.stmt], parent: nn.Module, act: str, norm: str) -> bool:
    """Whether ``y = self.norm(...)`` and ``... = self.act(y)`` follow each other."""
    real = [s for s in body if not _idle(s, parent)]
    for first, second in zip(real, real[1:], strict=False):
        if not (isinstance(first, ast.Assign) and isinstance(second, ast.Assign | ast.Return)):
            continue
        pair = _called(first.value), _called(second.value)
        if pair == (norm, act) and _same_name(first.targets, _argument(second.value)):
            return True
    return False


def _idle(statement: ast.stmt, parent: nn.Module) -> bool:
    """Whether a statement does nothing here: a call of nn.Identity, or its test is a None."""
    if isinstance(statement, ast.Assign):
        name = _called(statement.value)
        same = _same_name(statement.targets, _argument(statement.value))
        return same and name is not None and not _does_something(parent, name)
    if isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare):
        test = statement.test
        name = _member(test.left)
        not_none = isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
        missing = name is not None and getattr(parent, name, parent) is None
        return not_none and missing and not statement.orelse
    return False


def _same_name(targets: list[ast.expr], given: ast.AST | None) -> bool:
    """Whether what is assigned to, one variable, is what is given."""
    if len(targets) != 1 or not isinstance(targets[0], ast.Name):
        return False
    return isinstance(given, ast.Name) and given.id == targets[0].id


def _bodies(nodes: Iterable[ast.AST]) -> Iterator[list[ast.stmt]]:
    for node in nodes:
        for part in ("body", "orelse"):
            body = getattr(node, part, None)
            if isinstance(body, list):
                yield body


def _member(node: ast.AST | None) -> str | None:
    """The name of ``self.name``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None


def _called(node: ast.AST | None) -> str | None:
    """The name of ``self.name(...)``."""
    return _member(node.func) if isinstance(node, ast.Call) else None


def _argument(node: ast.AST | None) -> ast.AST | None:
    """The one argument of a call."""
    return node.args[0] if isinstance(node, ast.Call) and len(node.args) == 1 else None
