"""Formula: the public face of a parsed layer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from normc.errors import FormulaError, NormcError, nearest
from normc.language.definition import Definition, Input, Param, X
from normc.language.expr import postorder
from normc.language.names import misuse
from normc.language.parse import parse as parse_definition
from normc.language.show import show
from normc.language.zoo import ZOO, Entry


class Formula:
    """A normalization(-activation) layer as text, parsed and checked; immutable, equal by meaning.

    >>> f = parse("x*sigmoid(v*x)/group_std(x)")
    >>> [p.name for p in f.params]
    ['v']
    """

    def __init__(self, text: str, name: str = "", entry: Entry | None = None) -> None:
        self.text = text
        self.definition: Definition = parse_definition(text)
        self.entry = entry  # where it comes from, for a formula of the zoo
        self.name = name  # in the zoo, or ""

    @property
    def eps(self) -> float:
        """The epsilon of the paper or its code for a formula of the zoo, else 1e-5."""
        return self.entry.eps if self.entry else Entry.eps

    @property
    def params(self) -> tuple[Param, ...]:
        """The learned parameters, in order of first use."""
        return self.definition.params

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The tensors beside x that every call has to give."""
        return self.definition.inputs

    @cached_property
    def reads_x(self) -> bool:
        """Whether any result depends on the input."""
        return any(node is X for node in postorder(self.definition.results))

    @cached_property
    def shown(self) -> str:
        """The formula in normc's own spelling; parsing it gives an equal formula."""
        return show(self.definition)

    @cached_property
    def digest(self) -> str:
        """A stable name for the meaning: sha256 of the shown text, in hexadecimal."""
        return hashlib.sha256(self.shown.encode()).hexdigest()

    @property
    def label(self) -> str:
        """A name fit for kernels and files: the given one, or part of the digest."""
        return re.sub(r"\W", "_", self.name) or f"formula_{self.digest[:8]}"

    def latex(self) -> str:
        """The formula in LaTeX."""
        from normc.program.latex import latex_definition

        return latex_definition(self.definition)

    def canonical(self) -> Formula:
        """The same layer in canonical form: equal layers get equal text. Bounded in time."""
        from normc.program.canonical import canonical

        return Formula(show(canonical(self.definition)), self.name, self.entry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Formula) and self.definition == other.definition

    def __hash__(self) -> int:
        return hash(self.definition)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"normc.parse({self.text!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Formula, (self.text, self.name, self.entry)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        latex = f"${self.latex()}$"
        return {"text/plain": repr(self), "text/latex": latex, "text/markdown": latex}


@lru_cache(maxsize=4096)
def parse(text: str) -> Formula:
    """Parse a formula.

    Raises `FormulaError`, with the place in the text and the nearest known name, for anything that
    is not one. The text is never executed.
    """
    return Formula(text)


def formula_of(formula: Formula | str) -> Formula:
    """A formula itself, that of a text, or that of a name in the zoo.

    A text that is a single name means the zoo's formula; no formula is one name but ``x``. Raises
    `FormulaError`, and `ZooError` for a name that the zoo does not have.
    """
    if isinstance(formula, Formula):
        return formula
    if not isinstance(formula, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        kind = type(formula).__name__
        raise NormcError(f"a formula is text, a name in the zoo or a normc.Formula, not {kind}")
    word = formula.strip()
    if not word.isidentifier() or word == X.name:
        return parse(formula)
    if word not in ZOO and (problem := misuse(word)):  # relu, without its argument
        raise FormulaError(problem, formula, formula.index(word))
    return zoo[word]


class Zoo(Mapping[str, Formula]):
    """The named formulas: ``normc.zoo["evonorm_s0"]``."""

    def __getitem__(self, name: str) -> Formula:
        return _from_zoo(name)

    def __iter__(self) -> Iterator[str]:
        return iter(ZOO)

    def __len__(self) -> int:
        return len(ZOO)


@lru_cache(maxsize=1024)
def _from_zoo(name: str) -> Formula:
    if name not in ZOO:
        hint = nearest(name, ZOO) or ": `normc zoo` lists those there are"
        raise ZooError(f"no formula is called `{name}`{hint}")
    return Formula(ZOO[name].text, name, ZOO[name])


class ZooError(NormcError, KeyError):
    """The zoo has no formula of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


zoo = Zoo()
