"""Write the pages that come from tables and stages, and the outputs that README.md quotes:
``python docs/generate.py``.

What is said between the tables is in this file; what stands in a table, and every output of a
stage, is asked of normc. tests/test_docs.py fails when a page differs from what this file prints.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from typer.testing import CliRunner

from normc import config
from normc.backends import contract
from normc.cli import stages
from normc.cli.main import app
from normc.cli.stages import Subject
from normc.errors import FormulaError
from normc.formula import parse, zoo
from normc.language import axes, check, names
from normc.language.axes import AXIS_SETS, LETTERS
from normc.language.definition import RESERVED, STARTS_AT_ZERO, X
from normc.language.geometry import MOST_GROUPS, declared
from normc.language.primitives import COMPARISONS, PRIMITIVES, Primitive
from normc.language.reductions import REDUCTIONS, Reduction
from normc.language.show import show_expr
from normc.language.zoo import ZOO, Entry
from normc.program.algebra import derivative
from normc.program.interpret import evaluate

DOCS = Path(__file__).parent
FORMULA = "x*sigmoid(v*x)/group_std(x)*gamma + beta"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a ``|`` inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", r"\|") for c in line) + " |" for line in lines
    )


def code(text: str) -> str:
    """Text as it is, in a cell or a sentence."""
    return f"`{text}`"


def block(text: str, language: str = "text") -> str:
    """Text as it is, on lines of its own."""
    return f"```{language}\n{text.rstrip()}\n```"


# --- the language --------------------------------------------------------------------------------

LANGUAGE = """\
# The language

Printed by `make docs` from the tables in `normc/language/`; edit those, or `docs/generate.py`.

A formula is a line of text, or a few. Operators have Python's precedence, a name that nothing
declares is a parameter learned per channel, and the last statement is the result:

{example}

It is read by [a grammar](../grammar/formula.lark) and is never executed as code.

## Axes

Every tensor is seen over four axes. (N, C, H, W), (N, C), (B, L, C) and channels-last tensors of
rank 2 to 5 differ only in their strides; `channel_dim` says which dimension holds the channels,
and the first of the others is the sample.

{letters}

`groups` divides the channels into G groups of K; `groups="auto"` is the largest divisor of the
channel count not above {most_groups}.

## Statistics

`group_std(x)` is a named set of axes and a reduction; `std[k,s](x)` names the axes one by one. The
argument is any expression, statistics included.

{axis_sets}

{reductions}

* A statistic treats its argument as if it were broadcast to the shape of `x`: `layer_sum(1)`
  counts the elements of a sample, and `channel_mean(instance_l2(x))` is a mean over channels.
* `eps` is given at the call (1e-5 unless said otherwise) and is a name of its own:
  `x/max(instance_l2(x), eps)`.
* Statistics over samples have running values in a `Layer`, see its `momentum`; those of `var`
  take the unbiased variance, as `nn.BatchNorm2d` does.

## Functions

Every function works element by element. At a kink the derivative is a convention, torch's:

{functions}

## Operators

From loose to tight; operators of one line group from the left, `**` from the right.

{operators}

The comparisons {comparisons} make the first argument of
`where(a > b, c, d)`, and stand nowhere else.

## Names

* `x` is the input. A name that nothing declares is a parameter of shape (C,) which starts at 1;
  {zeros} start at 0.
* `param v[c] = 1` declares one per channel, `param alpha = 0.5` a scalar.
* `input residual` declares a second tensor of x's shape, `input scale[n,c]` one over fewer axes:
  any of `n`, `c` and `s`. Inputs are given at every call.
* `h = x + residual` gives an expression a name. A name is given once, before its first use, and
  has to be used.
* A new line or `;` ends a statement, `#` starts a comment, inside brackets lines go on. Several
  results are separated by commas.
* Reserved are the names of functions and statistics, and {reserved}.

The spelling of papers is read as well:

{greek}

`·`, `⋅` and `×` multiply, `−` subtracts, `√x` is `sqrt(x)`, `x²` is `x**2` and `x³` is `x**3`.
Called, `σ(x)` is `sigmoid(x)`, while `group_σ(x)` is `group_std(x)` and `group_μ(x)` is
`group_mean(x)`.

## Limits

Text from anywhere is answered at once: it is small, or it is refused with the limit it broke.

{limits}

## Errors

An error names the place and the nearest known name:

{errors}
"""

EXAMPLE = """\
param alpha = 0.5            # a learned scalar; declarations are optional
input residual               # a second tensor, given at every call
h = x + residual             # a local name
h*sigmoid(alpha*h)/group_std(h)*gamma + beta, h"""

MISTAKES = ("x/gruop_std(x)", "x*sigmoid(v x)", "x/std(x)", "x > 0", "x^2")


def language() -> str:
    """docs/language.md."""
    parse(EXAMPLE)
    return LANGUAGE.format(
        example=block(EXAMPLE),
        letters=table(["letter", "axis", "what it counts"], _letters()),
        most_groups=MOST_GROUPS,
        axis_sets=table(["set", "axes", "one value"], _axis_sets()),
        reductions=table(
            ["reduction", "what it is", "computed as"], map(_reduction, REDUCTIONS.values())
        ),
        functions=table(["function", "value", "at a kink"], _functions()),
        operators=table(["operator", "meaning"], OPERATORS),
        comparisons=", ".join(map(code, COMPARISONS)),
        zeros=" and ".join(map(code, STARTS_AT_ZERO)),
        reserved=", ".join(map(code, RESERVED)),
        greek=table(["letter", "read as"], _greek()),
        limits=table(["limit", "at most"], _limits()),
        errors=block("\n\n".join(map(_mistake, MISTAKES))),
    )


COUNTED = {
    "n": "samples",
    "c": "channels, that is `g` and `k` together",
    "g": "groups of channels",
    "k": "channels within a group",
    "s": "positions: all spatial dimensions as one",
}


def _letters() -> list[list[str]]:
    return [[code(letter), axes.show(a), COUNTED[letter]] for letter, a in LETTERS.items()]


def _axis_sets() -> list[list[str]]:
    return [[code(row.name), code(axes.spell(row.axes)), row.doc] for row in AXIS_SETS.values()]


def _reduction(row: Reduction) -> list[str]:
    if row.lower is None:
        return [code(row.name), row.doc, ""]
    over = AXIS_SETS["group"].axes
    return [code(row.name), row.doc, code(show_expr(row.lower(X, over)))]


def _functions() -> list[list[str]]:
    rows = [row for row in PRIMITIVES.values() if row.callable and row.name != "where"]
    return [[code(f"{row.name}({', '.join(row.args)})"), row.doc, _kinks(row)] for row in rows]


def _kinks(row: Primitive) -> str:
    """The derivatives at the kinks of a row, all arguments being at the kink."""
    if not row.kinks:
        return ""
    parts: list[str] = []
    for kink in row.kinks:
        here = dict.fromkeys(row.args, kink)
        slopes = [f"{float(evaluate(slope, here)):g}" for slope in derivative(row.name)]
        point = f"{kink:g}" if len(row.args) == 1 else "a tie"
        parts.append(f"{' and '.join(slopes)} at {point}")
    return ", ".join(parts)


OPERATORS = [
    ["`+`, `-`", "sum and difference"],
    ["`*`, `/`", "product and quotient"],
    ["`-x`, `+x`", "sign; `-x**2` is `-(x**2)`"],
    ["`**`", "power; the exponent may have a sign: `x**-2`"],
]


def _greek() -> list[list[str]]:
    return [[code(letter), code(name)] for letter, name in names.GREEK.items()]


def _limits() -> list[list[str]]:
    return [
        ["characters", f"{check.CHARACTERS:,}"],
        ["brackets within brackets", f"{check.NESTING}"],
        ["distinct nodes (numbers, names, operations)", f"{check.NODES}"],
        ["operations on the longest way from a result to a name", f"{check.DEPTH}"],
        ["characters of a name", f"{check.NAME}"],
        ["parameters", f"{check.PARAMS}"],
        ["results, or arguments in one list", f"{check.ITEMS}"],
        ["digits of a number in a row", f"{check.DIGITS}"],
        ["an integer exponent, in magnitude", f"{check.EXPONENT}"],
        ["a constant, in magnitude", f"0, or {check.SMALLEST:g} to {check.LARGEST:g}"],
    ]


def _mistake(text: str) -> str:
    try:
        parse(text)
    except FormulaError as error:
        return str(error)
    raise AssertionError(f"not a mistake: {text}")


# --- the zoo -------------------------------------------------------------------------------------

ZOO_PAGE = """\
# The zoo

Printed by `make docs` from the table in `normc/language/zoo.py`; edit it there.

{count} published layers, each one line of text. `normc.zoo["evonorm_s0"]` is the formula,
`normc zoo evonorm_s0` shows it with its paper, `normc show evonorm_s0` what it is compiled to.
Nothing in the compiler knows these names. `eps` stands in a formula where the paper or its code
puts it; where the table says another number than 1e-5, give it to `Layer` or to the call.

{rows}
"""


def zoo_page() -> str:
    """docs/zoo.md."""
    head = ["name", "formula", "what it is", "starts at", "eps", "paper"]
    rows = table(head, map(_entry, ZOO.values()))
    return ZOO_PAGE.format(count=len(ZOO), rows=rows)


def _entry(row: Entry) -> list[str]:
    formula = zoo[row.name]
    text = "<br>".join(code(part.strip()) for part in row.text.split(";"))
    starts = ", ".join(f"{declared(p)} = {p.init:g}" for p in formula.params)
    paper = f"[{row.paper}](https://arxiv.org/abs/{row.arxiv}), {row.year}"
    return [code(row.name), text, row.doc, starts, f"{row.eps:g}".replace("e-0", "e-"), paper]


# --- the pipeline --------------------------------------------------------------------------------

PIPELINE = """\
# One formula through every stage

Printed by `make docs`; the text between the stages is in `docs/generate.py`, the stages are what
`normc show --stage NAME` prints. The formula is EvoNorm-S0:

{formula}

`normc/pipeline.py` is the table of contents: every stage in order. A stage is a function from one
frozen type to the next, and each type prints itself.

```text
       parse          flatten, tidy        schedule      render         load
text --------> Definition --------> Program --------> Plan --------> Source --------> kernels
                                     |   ^
                                     +---+ vjp: forward to backward
```

## parse

Text becomes expressions. Equal expressions are one object, so a formula is a graph with as many
nodes as it has distinct parts. On the right stand the axes over which a node varies: `n5`, a
standard deviation, has one value per sample and group.

{parse}

## algebra

For people, not on the way to a kernel: the canonical form, under which equal layers have equal
text, and the gradients, each put together again as a formula. `d_y` is the gradient that arrives.
Below, the same in LaTeX.

{algebra}

## program

The formula as straight-line code: inputs, statistics, outputs. `group_std(x)` has become
`sqrt(s0 + eps)` with the statistic `s0 = var[K S] x`; division by it has become multiplication by
its reciprocal, which is computed once per group. Forward also keeps the mean `s3`: it is
accumulated on the way to the variance, and backward wants it.

{program}

## backward

Reverse mode maps this Program to another: `d_x` stands for the gradient of x. Statistics are
symbols; the adjoint of a statistic is one more statistic over the same axes, and the gradient of
a parameter is a sum over the axes it lacks. `gamma*d_y*x*sigmoid(v*x)` summed over a group has
been split into a sum over positions (`s1`), which the gradient of gamma needs too, and a sum over
channels of `gamma*s1`.

{backward}

## plan

The scheduler decides by axes alone how often memory is read. A sweep is one pass over memory; A
is the number of bytes of one tensor. `floor` counts what any plan has to move, `streaming` what
this one moves if nothing stays on chip from one sweep to the next. `s7_part` is a partial sum:
one instance of `k0` has its own sample and group, and `k1` adds them up in a fixed order, without
atomics. `kept0` is the part of `d_x` that is known before the sums are: it holds the sigmoid, which
is computed once, and kept in the cache for one instance at a time.

{plan}

## c

One skeleton turns every plan into loops, one printer every expression into text. Values that do
not change in a loop have moved out of it. What the numbers are computed in is told in
[numerics](numerics.md). Forward:

{c_forward}

<details><summary>Backward</summary>

{c_backward}

</details>

## triton

Each kernel is printed in two forms. The resident one holds all that belongs to an instance in one
tile and reads it once; the streaming one loops over it and merges the blocks. Which is launched
is decided by the sizes of the call. `normc show --stage triton` prints backward as well; forward:

<!-- fmt: off -->
{triton_forward}
<!-- fmt: on -->

## ptx

`normc show --stage ptx` compiles the Triton kernels for a GPU that need not be there, and prints
the assembly with the registers and spills that ptxas reports.
"""


CLAIMS = (
    "n5 = std[K S] n0",
    "s0 = var[K S] x\ns3 = mean[K S] x",
    "s1 = sum[S] d_y*x*sigmoid(v*x)\ns2 = sum[K] gamma*s1",
    "s7_part = sum[S] d_y\ns7 = sum[N] s7_part",
)
"""What the text between the stages takes for granted."""


def pipeline() -> str:
    """docs/pipeline.md."""
    subject = Subject(parse(FORMULA))
    stage: dict[str, Callable[[Subject], str]] = {
        "parse": stages.parse,
        "algebra": stages.algebra,
        "program": stages.program,
        "backward": stages.backward,
        "plan": stages.plan,
    }
    texts = {name: block(print_stage(subject)) for name, print_stage in stage.items()}
    for backend, language in (("c", "c"), ("triton", "py")):
        sources = {
            job.part: contract.find(backend).render(job).text for job in subject.jobs(backend)
        }
        texts |= {f"{backend}_{part}": block(text, language) for part, text in sources.items()}
    outputs = "\n".join(texts.values())
    for claim in CLAIMS:
        assert claim in outputs, f"the text of pipeline.md speaks of {claim!r}, which is gone"
    return PIPELINE.format(formula=block(FORMULA), **texts)


# --- what the README quotes ----------------------------------------------------------------------

README = DOCS.parent / "README.md"

QUOTE = re.compile(r"^(<!-- output of: (.*?) -->\n```\w*\n)(.*?)^```$", re.MULTILINE | re.DOTALL)
"""``<!-- output of: normc show ... | first | last -->``, above the lines between these two."""


def readme() -> str:
    """README.md, with what it quotes brought up to date."""
    text = README.read_text("utf-8")
    text = SPEED.sub(lambda found: f"{found[1]}{speed()}\n{found[2]}", text)
    return QUOTE.sub(lambda found: f"{found[1]}{quote(found[2])}\n```", text)


SPEED = re.compile(r"^(<!-- speed -->\n).*?(<!-- end of speed -->)$", re.MULTILINE | re.DOTALL)
"""Where the README has a few columns of the benchmark."""


def speed() -> str:
    """The largest contiguous float32 tensors of docs/benchmarks/cpu.json, as a table."""
    found = json.loads((DOCS / "benchmarks" / "cpu.json").read_text("utf-8")).values()
    rows = [r for r in found if (r["dtype"], r["layout"]) == ("float32", "contiguous")]
    largest = max(r["size"] for r in rows)
    lines = ["| layer | time / floor | torch.compile / ours | eager / ours |", "|---|--:|--:|--:|"]
    for row in (r for r in rows if r["size"] == largest):
        times = row["passes"]["forward+backward"]["times"]
        ratios = [times["normc"]["over_floor"]]
        ratios += [times[who]["times_ours"] for who in ("inductor", "eager")]
        lines.append(f"| `{row['row']}` | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    return "\n".join(lines)


def quote(about: str) -> str:
    """Of a command's output, what stands from the first line that contains one text to the next
    that contains another."""
    command, first, last = about.split(" | ")
    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    lines = result.output.splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return "\n".join(lines[start : stop + 1])


# --- all of them ---------------------------------------------------------------------------------

PAGES: dict[str, Callable[[], str]] = {
    "../README.md": readme,
    "environment.md": config.markdown,
    "language.md": language,
    "pipeline.md": pipeline,
    "zoo.md": zoo_page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
