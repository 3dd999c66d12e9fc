"""The page on the zoo: every layer with its formula, its curve, and the bytes that it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from docs.markdown import block, code, codes, math, prose, table
from docs.zoo_plots import GROUPS as IN_GROUPS
from docs.zoo_plots import REACH, SHAPE
from normc.formula import Formula, parse, zoo
from normc.language.axes import FULL
from normc.language.beyond import BEYOND, Beyond
from normc.language.definition import Input
from normc.language.geometry import declared
from normc.language.zoo import GROUPS, ZOO, Entry, Published
from normc.schedule.cost import Ways

Moves = Callable[[str, str, str], Sequence[Ways]]
"""What forward and backward move, for a backend, an order of axes and a layer."""

PAGE = """\
# The zoo

Printed by `make docs` from the table in `normc/language/zoo.py`, and the figures by
`docs/zoo_plots.py`; the text between is in `docs/zoo_page.py`.

{count} published layers, each one line of text. `normc.zoo["evonorm_s0"]` is the formula,
`normc zoo evonorm_s0` shows it with its paper, `normc show evonorm_s0` what it is compiled to.
Nothing in the compiler knows these names.

{overview}

Further below are {beyond} published layers that [no formula can be](#beyond-the-language).

**Formulas.** The axes below a statistic are those it is taken over: b samples, w,h positions, c
channels, c/g the channels of a group; [the language](language.md) spells them out in text. `eps`
stands in a formula where the paper or its code puts it. It is {eps}, and `groups` is `"auto"`,
where a section says nothing else; a `Layer` knows its `eps`, a call has to be given it.

**Figures.** One element of x goes from -{reach} to {reach}: a figure shows y of that element and,
lighter, its derivative. All other elements stay what they are, {shape} standard normal numbers
in {groups} groups. Parameters are where they start, other inputs are 1; of several results it is
the first. The curve of a mere normalization is bent by the share that the element has in its own
statistics: the fewer elements they are taken over, the more.

**Tables.** What forward + backward move, in A, the bytes of one tensor of x's size; backward is for
the gradients of x, of every input and of every parameter. The floor is what any kernels have to
read and write. C is what loops on a CPU ask for if nothing stays in its cache from one loop to the
next, but what they keep there on purpose. Triton's kernels for GPUs can be resident, which keep on
chip what they have read, or streaming, which read it again: [schedules](schedules.md) tells more,
and for which tensors there are other plans.

{sections}

## Beyond the language

{beyond_rows}
"""

STUDY = "pointwise_"
"""How the names begin of rows that differ in one statement only, and share a section."""

STUDY_TITLE = "Candidates of the study that found Derf"

F = "f = "
"""How that statement begins."""

ORDERS = ("first", "last")
"""Where channels are among the axes in memory."""

STUDY_SECTION = """\
### {title}

{count} functions f of u that the study compares, each between two affine maps. {paper}.

{text}

{facts}

{rows}

{moved}"""


def page(moves: Moves) -> str:
    """docs/zoo.md."""
    return PAGE.format(
        count=len(ZOO),
        overview=table(["", "layers"], [[title, _links(rows)] for title, rows in GROUPS.items()]),
        beyond=len(BEYOND),
        eps=_number(Entry.eps),
        reach=REACH,
        shape=" x ".join(map(str, SHAPE)),
        groups=IN_GROUPS,
        sections="\n\n".join(_group(title, rows, moves) for title, rows in GROUPS.items()),
        beyond_rows=table(["name", "paper", "why"], map(_beyond, BEYOND)),
    )


def _links(rows: Sequence[Entry]) -> str:
    anchor = STUDY_TITLE.lower().replace(" ", "-")
    words = [f"[{code(row.name)}](#{anchor if _in_study(row) else row.name})" for row in rows]
    return ", ".join(words)


def _in_study(row: Entry) -> bool:
    return row.name.startswith(STUDY)


def _group(title: str, rows: Sequence[Entry], moves: Moves) -> str:
    parts = [f"## {title}"]
    for joint, some in groupby(rows, _in_study):
        found = list(some)
        parts += [_study(found, moves)] if joint else [_section(row, moves) for row in found]
    return "\n\n".join(parts)


def _beyond(row: Beyond) -> list[str]:
    return [code(row.name), _paper(row), row.reason]


def _paper(row: Published) -> str:
    return f"[{row.paper}](https://arxiv.org/abs/{row.arxiv}), {row.year}"


# --- one layer -----------------------------------------------------------------------------------


def _section(row: Entry, moves: Moves) -> str:
    formula = zoo[row.name]
    parts = [
        f"### {row.name}",
        f"{_sentence(row.doc, formula)} {_paper(row)}.",
        block(math(formula.latex()), "math"),
        block(_lines(row.text)),
        _facts(row, formula),
        _picture(row),
        _moved([row], moves),
    ]
    return "\n\n".join(parts)


def _sentence(text: str, formula: Formula) -> str:
    """A description as a sentence; a name that it begins with keeps its letter."""
    first, names = text.split()[0], [row.name for row in (*formula.params, *formula.inputs)]
    named = first in names or not first.islower()
    return f"{prose(text if named else text[0].upper() + text[1:])}."


def _lines(text: str) -> str:
    """A formula in one line if it is short, else with a line for each statement."""
    return text if len(text) <= 90 else text.replace("; ", "\n")


def _facts(row: Entry, formula: Formula) -> str:
    """What a formula starts at, what else it is given, and what is not as everywhere."""
    params = codes(f"{declared(p)} = {p.init:g}" for p in formula.params)
    facts = [f"Parameters: {params}." if params else "No parameters."]
    if formula.inputs:
        facts.append(f"Inputs: {', '.join(map(_input, formula.inputs))}.")
    if row.eps != Entry.eps:
        facts.append(f"`eps` is {_number(row.eps)}.")
    if row.groups != Entry.groups:
        facts.append(f"`groups` is {row.groups}.")
    return " ".join(facts)


def _input(row: Input) -> str:
    return f"{code(row.name)} of x's size" if row.axes == FULL else code(declared(row))


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _picture(row: Entry) -> str:
    return f"![y and dy/dx of {row.name}](figures/zoo/{row.name}.svg)"


# --- several layers in one section ---------------------------------------------------------------


def _study(rows: Sequence[Entry], moves: Moves) -> str:
    first, texts = rows[0], [row.text.split("; ") for row in rows]
    common = [some[0] if len(set(some)) == 1 else f"{F}..." for some in zip(*texts, strict=True)]
    functions = [next(s for s in text if s not in common).removeprefix(F) for text in texts]
    lines = [_candidate(*pair) for pair in zip(rows, functions, strict=True)]
    return STUDY_SECTION.format(
        title=STUDY_TITLE,
        count=len(rows),
        paper=_paper(first),
        text=block("\n".join(common)),
        facts=_facts(first, zoo[first.name]),
        rows=table(["f", "curve"], lines),
        moved=_moved(rows, moves),
    )


def _candidate(row: Entry, function: str) -> list[str]:
    latex = math(parse(f"input u; {function}").latex().removeprefix("y = "))
    parts = [code(row.name), prose(row.doc), code(function), f"$`{latex}`$"]
    return ["<br><br>".join(parts), _picture(row)]


# --- what is moved -------------------------------------------------------------------------------


def _moved(rows: Sequence[Entry], moves: Moves) -> str:
    """A line for each order of axes, and for those of the layers that move the same."""
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for order in ORDERS:
        names: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            cells = _cells(moves("c", order, row.name), moves("triton", order, row.name))
            names.setdefault(cells, []).append(row.name)
        for cells, some in names.items():
            which = f": {codes(some)}" if len(some) < len(rows) else ""
            lines.setdefault((which, cells), []).append(order)
    head = ["A, forward + backward", "floor", "C", "Triton, resident", "Triton, streaming"]
    return table(
        head,
        [
            [f"channels {' or '.join(orders)}{which}", *cells]
            for (which, cells), orders in lines.items()
        ],
    )


def _cells(c: Sequence[Ways], triton: Sequence[Ways]) -> tuple[str, ...]:
    columns = [
        [found.floor for found in triton],
        [found.streaming for found in c],
        [found.once for found in triton],
        [found.streaming for found in triton],
    ]
    return tuple("+".join(f"{traffic.full}" for traffic in both) for both in columns)
