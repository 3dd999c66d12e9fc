"""Random formulas that stay the same: ``python -m benchmarks.formulas`` draws them anew.

They are drawn by the strategy of `tests.properties.formulas`. Runs on different machines are to be
compared, and not every machine has Hypothesis, so the text is kept in a file, one formula a line.
"""

from __future__ import annotations

from pathlib import Path

from normc.formula import Formula, parse
from normc.language.definition import X
from normc.language.expr import Reduce, postorder

FILE = Path(__file__).with_name("formulas.txt")
COUNT = 200
SMALLEST = 25  # characters: what is shorter, the zoo covers


def stored() -> list[str]:
    """The formulas of the file, in its order."""
    return FILE.read_text("utf-8").splitlines()


def draw(count: int = COUNT) -> list[str]:
    """So many different formulas; the same ones for the same version of Hypothesis."""
    found: dict[str, str] = {}  # by meaning
    number = 0
    while len(found) < count:
        if text := _draw(number):
            found.setdefault(parse(text).digest, text)
        number += 1
    return list(found.values())


def _draw(number: int) -> str:
    """The last of a few examples worth keeping; one of each seed, as neighbours are much alike."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.properties.formulas import formulas

    kept = [""]

    @seed(number)
    @settings(
        max_examples=10,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(formulas())
    def collect(text: str) -> None:
        if len(text) >= SMALLEST and _interesting(parse(text)):
            kept.append(text)

    collect()
    return kept[-1]


def _interesting(formula: Formula) -> bool:
    """Whether it has a statistic, and x in it."""
    nodes = postorder(formula.definition.results)
    return X in nodes and any(isinstance(node, Reduce) for node in nodes)


if __name__ == "__main__":
    FILE.write_text("\n".join(draw()) + "\n", encoding="utf-8")
