"""Write the pages that come from tables and stages, the outputs that README.md quotes, and the
figures of the zoo: ``python docs/generate.py``.

What is said between the tables is in this file, for the zoo in zoo_page.py; what stands in a table,
and every output of a stage, is asked of normc. tests/test_docs.py fails when a page differs from
what this file prints, or a figure from what zoo_plots.py draws.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from normc import config
from normc.backends import contract
from normc.backends.gpus import MACHINES
from normc.cli import stages
from normc.cli.main import app
from normc.cli.stages import Subject
from normc.errors import FormulaError
from normc.formula import parse, zoo
from normc.language import axes, check, names
from normc.language.axes import AXIS_SETS, LETTERS
from normc.language.definition import RESERVED, STARTS_AT_ZERO, X
from normc.language.geometry import MOST_GROUPS
from normc.language.primitives import COMPARISONS, PRIMITIVES, Primitive
from normc.language.reductions import REDUCTIONS, Reduction
from normc.language.show import show_expr
from normc.language.zoo import ZOO
from normc.ops.target import FEW, MANY
from normc.program.algebra import derivative
from normc.program.interpret import evaluate
from normc.schedule.cost import Ways, ways
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

sys.path.append(str(Path(__file__).parents[1]))  # a script looks into its own folder only

from benchmarks.rows import ROWS
from docs import zoo_page, zoo_plots
from docs.markdown import block, code, table

DOCS = Path(__file__).parent
FORMULA = "x*sigmoid(v*x)/group_std(x)*gamma + beta"


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
channel count not above {most_groups}. Up to {most_groups} channels that makes groups of one
channel, with the statistics of an instance: give a number there, or "isometric" to a `Layer`.

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


# --- what schedules move -------------------------------------------------------------------------

SCHEDULES = """\
# Schedules on a GPU, and the bytes they move

Printed by `make docs` from the plans of the zoo; the text is in `docs/generate.py`.

What a normalization layer costs on a GPU is above all what crosses between memory and chip. It is
counted here in A, the bytes of one tensor of x's size. Forward has to read x and write y, backward
has to read x and the gradient that arrives and write another: the floor of most layers is 2A and
3A. `normc show evonorm_s0 --stage plan --backend triton` prints, beside the small tensors moved:

{example}

## Four schedules

A kernel has *instances*, which do not depend on each other: the samples and groups of group
normalization, the rows of a LayerNorm. The Triton backend can run any kernel in four ways:

{four}

* **resident**: what belongs to an instance is loaded into registers, reduced there, and used again
  from there. Every tensor is read once, if an instance fits.
* **cluster**: programs hold a box of the instance each, hand each other their partial sums through
  memory, and wait until all have done so. Every tensor is read once here as well, but all programs
  of an instance have to run at the same time; no AMD GPU is asked for that.
* **streaming**: a loop over the instance for its statistics, another one for the result. Every
  sweep reads again what it needs, and an instance may have any size.
* **split**: as streaming, but several programs loop over a share each. The kernel ends where they
  would have to wait, and another launch goes on: for few and large instances.

Where a plan has several kernels, each has a schedule of its own: it may move less than one column
below says, and more than another.

## How one is chosen

When tensors of new sizes come, every schedule that is possible is written down with tiles that suit
those sizes, and `normc.backends.gpus.estimate` orders them by the time that their bytes, launches
and meetings may take on this GPU. They are compiled in that order, one that spills registers to
memory again with twice the warps, and the first that spills none is launched; if all of the first
few spill, the one that spills least. `with normc.backends.triton.forced("split"):` takes
one of the four for ops that are compiled in it, wherever a kernel has it.

The estimate promises nothing, and nothing on this page was measured on a GPU: under these schedules
no kernel has run on one yet. Verified is:

* the results: Triton's interpreter runs every layer of the zoo under each of the four schedules, in
  both orders of axes, with tiles smaller than the tensors; results and all gradients are compared
  with the oracle (`tests/backends/test_triton_interpret.py`);
* the counts below: for every entry, the text of the kernels has as many loads and stores of
  full-size tensors (`tests/schedule/test_cost.py`), and for five layers the interpreter reads every
  element as often, except in clusters (`tests/schedule/test_cost_measured.py`);
* machine code: for a few layers, the schedule that comes first compiles ahead of time for
  {targets} (`tests/backends/test_triton_aot.py`).

## What each layer moves

In A; backward is for the gradients of x, of every input and of every parameter. Bold is, on chip,
what exceeds the floor, and in loops, what exceeds it by more than one read of each tensor that is
read: what is above 2A and 3A, or 3A and 5A, in a layer with no input but x.

Channels first, (N, C, H, W):

{first}

Channels last, (N, H, W, C), and tokens, (B, L, C):

{last}

Not in these numbers are parameters, statistics and what programs hand each other, all of which are
small; nor the parts of sums over rows, to which a streaming kernel adds in the cache. A read counts
even where a cache may answer it: loops over an instance that fits there can be faster than this.

## What is above, and why

{why}

`dyt`, `derf` and others like them have no statistic, and are read once under every schedule where
channels are last. Where they are first, the gradients of their parameters are sums over positions,
which backward takes in a sweep before the one that writes the gradient of x: 3A on chip, 5A in
loops.

For fewer than {few} reductions over {many:,} elements or more, an op takes another plan, whatever
its backend, in which each reduction is shared among instances of a kernel. Several kernels then
read x, and what is on chip in each of them saves nothing: 3A and 5A under every schedule, for most
layers. `op.explain(x)` shows the plan for tensors like x; the tables are about all others.
"""

LAYOUTS = {"first": CHANNELS_FIRST, "last": CHANNELS_LAST}

FOUR = [
    ["all of it on chip, read once", "resident", "cluster"],
    ["loops, which read again", "streaming", "split"],
]

ABOVE: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    # the orders of axes, the layers, the reason
    (
        ("last",),
        (
            *("batch_norm", "batch_instance_norm", "l1_batch_norm", "evonorm_b0", "evonorm_b1"),
            *("evonorm_b2", "bn_relu", "bn_silu", "bn_add_relu", "batch_renorm", "spade"),
        ),
        "forward and backward with channels last. Instances would be channels, which lie next to "
        "each other in memory, and nothing else would be left to run in parallel. So a first "
        "kernel takes statistics per sample, a small one puts them together, and a third applies "
        "them: the first and the third read x each, whatever stays on chip within one.",
    ),
    (
        ("first",),
        (
            *("layer_norm_tokens", "rms_norm", "rms_norm_centred_gain", "add_rms_norm"),
            *("gated_rms_norm", "ada_layer_norm", "add_layer_norm", "peri_norm", "l2_norm"),
            *("layer_norm_scaling", "ln_gelu", "rms_silu"),
        ),
        "backward with channels first. The statistics are per position, the gradients of "
        "parameters sums over positions: that makes two kernels, and both read x and the gradient "
        "that arrives. With channels last, programs carry these sums from row to row.",
    ),
    (
        ("last",),
        ("ada_layer_norm", "film"),
        "backward with channels last: the gradients of `scale` and `shift` are sums over the "
        "positions of each sample, and only sums over all rows are carried.",
    ),
    (
        ("first", "last"),
        ("switchable_norm", "batch_channel_norm"),
        "forward and backward in both orders. Statistics per sample and statistics per channel "
        "have instances that cut across each other: that makes several kernels, which each read x.",
    ),
    (
        ("first",),
        ("l1_batch_norm",),
        "forward with channels first, in loops only. The mean absolute deviation needs the mean, "
        "so x is read for the mean, for the deviation and for the result.",
    ),
    (
        ("first", "last"),
        ("divisive_norm", "centred_weight_norm"),
        "in both orders, in loops only. One statistic is of what another has centred, so x is read "
        "for the one, for the other and for the result.",
    ),
    (
        ("last",),
        ("peri_norm",),
        "forward with channels last, in loops only: the second norm is of a sum that needs the "
        "first one's statistic.",
    ),
]


def schedules() -> str:
    """docs/schedules.md."""
    found = {(order, name): moves("triton", order, name) for order in LAYOUTS for name in ZOO}
    above = {key for key, both in found.items() if any(map(_above, both))}
    listed = {(order, name) for orders, names, _ in ABOVE for order in orders for name in names}
    assert above == listed, f"ABOVE needs a reason for {above - listed}, none for {listed - above}"
    shown = _output("normc show evonorm_s0 --stage plan --backend triton")
    lines = [line.partition(" (small")[0] for line in shown if "floor" in line]
    return SCHEDULES.format(
        example=block("\n".join(lines)),
        four=table(["", "one program per instance", "several programs share it"], FOUR),
        targets=_names(list(MACHINES)),
        **{order: _traffic(order, found) for order in LAYOUTS},
        why="\n".join(_bullet(f"{_names(names)}, {why}") for _, names, why in ABOVE),
        few=FEW,
        many=MANY,
    )


@cache
def moves(backend: str, order: str, name: str) -> tuple[Ways, ...]:
    """What forward and backward of a layer of the zoo move, as they are planned for a backend."""
    jobs = Subject(zoo[name], order=LAYOUTS[order], backend=backend).jobs()
    return tuple(ways(job.plan, job.dense) for job in jobs)


def _above(found: Ways) -> bool:
    """Whether a plan moves more than its floor on chip, or reads a tensor twice again in loops."""
    return found.once.full > found.floor.full or found.split.full > _twice(found)


def _twice(found: Ways) -> int:
    """The floor, and one more read of all that it reads."""
    return found.floor.full + sum(v.axes == axes.FULL for v in found.floor.reads)


def _traffic(order: str, found: Mapping[tuple[str, str], Sequence[Ways]]) -> str:
    columns = ["floor", "resident, cluster", "streaming", "split"]
    head = ["layer", *(f"{part} {c}" for part in ("forward:", "backward:") for c in columns)]
    rows = [[code(name), *(c for w in found[order, name] for c in _cells(w))] for name in ZOO]
    return table(head, rows)


def _cells(found: Ways) -> list[str]:
    least, most = found.floor.full, _twice(found)
    pairs = [(found.once, least), (found.streaming, most), (found.split, most)]
    return [str(least), *(_bold(traffic.full, usual) for traffic, usual in pairs)]


def _bold(count: int, usual: int) -> str:
    return f"**{count}**" if count > usual else str(count)


def _bullet(text: str) -> str:
    return textwrap.fill(f"* {text}", 100, subsequent_indent="  ", break_on_hyphens=False)


def _names(names: Sequence[str]) -> str:
    *first, last = map(code, names)
    return f"{', '.join(first)} and {last}" if first else last


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

Each kernel is printed under four [schedules](schedules.md). The resident one holds all that belongs
to an instance in one tile and reads it once; the streaming one loops over it and merges the blocks;
in a cluster or a split, several programs share an instance. Which is launched is decided by the
sizes of the call. `normc show --stage triton` prints backward as well; forward:

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
    """The largest contiguous float32 tensors of docs/benchmarks/cpu.json, as a table.

    A layer is named as `normc bench` takes it: by its name in the zoo, or its formula.
    """
    found = json.loads((DOCS / "benchmarks" / "cpu.json").read_text("utf-8")).values()
    rows = [r for r in found if (r["dtype"], r["layout"]) == ("float32", "contiguous")]
    largest = max(r["size"] for r in rows)
    lines = ["| layer | time / floor | torch.compile / ours | eager / ours |", "|---|--:|--:|--:|"]
    for row in (r for r in rows if r["size"] == largest):
        times = row["passes"]["forward+backward"]["times"]
        ratios = [times["normc"]["over_floor"]]
        ratios += [times[who]["times_ours"] for who in ("inductor", "eager")]
        cells = [code(ROWS[row["row"]].text), *(f"{r:.2f}" for r in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quote(about: str) -> str:
    """Of a command's output, what stands from the first line that contains one text to the next
    that contains another."""
    command, first, last = about.split(" | ")
    lines = _output(command)
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return "\n".join(lines[start : stop + 1])


def _output(command: str) -> list[str]:
    """The lines that a command prints."""
    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    return result.output.splitlines()


# --- all of them ---------------------------------------------------------------------------------

PAGES: dict[str, Callable[[], str]] = {
    "../README.md": readme,
    "environment.md": config.markdown,
    "language.md": language,
    "pipeline.md": pipeline,
    "schedules.md": schedules,
    "zoo.md": lambda: zoo_page.page(moves),
}


def main() -> None:
    """Write every page, and the figures of the zoo."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    zoo_plots.write()


if __name__ == "__main__":
    main()
