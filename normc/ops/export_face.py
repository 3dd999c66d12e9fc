"""The face of an exported file: its docstring, the function to call, its place in autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from string import Template
from textwrap import fill, indent

from normc.language.axes import CHANNEL, FULL, NONE, Axis, spell
from normc.language.definition import Param
from normc.ops.derivative import show_derivatives
from normc.ops.export_layer import Layer
from normc.ops.export_names import WIDTH, arguments, assigned, local, quoted, unpacked, wrapped
from normc.pipeline import COTANGENT

_DOCSTRING = '''\
"""$name: a layer, forward and backward, as Triton kernels and as plain torch operations.

$formula

Its gradients; $arriving:

$derivative

Use:

$use

$shapes

$paths

$check

Made by normc $version. This file needs torch and triton, and nothing of normc.
"""'''

_PATHS = (
    "On a GPU, x of type float32, float16 or bfloat16 goes through the Triton kernels: one set is "
    "for channels first in memory (N, C, H, W), one for channels last (also tokens, and x of two "
    "dimensions). They compute in float32. Everything else, on the CPU or float64, goes through "
    "plain torch operations, forward and backward; float64 is computed in float64. A second "
    "derivative is not there: to ask for one is an error."
)
_CHECK = (
    "`python $file` compares results and gradients with the formula as it is written, in "
    "float64 and differentiated by autograd, and exits with 1 if they differ. The kernels take "
    "part where there is a GPU, or with TRITON_INTERPRET=1, which runs them on the CPU, slowly."
)


def docstring(layer: Layer, file: str) -> str:
    """The docstring: formula, derivative, how to use it, what it does."""
    one = len(layer.found.results) == 1
    arriving = "what arrives at the result is d_y" if one else _arriving(layer.cotangents)
    call = f"{', '.join(layer.found.results)} = {layer.name}("
    given = [*layer.given, 'groups="auto"', "eps=1e-5", "channel_dim=1"]
    fields = {
        "name": layer.name,
        "formula": indent(quoted(layer.formula.text.strip()), "    "),
        "arriving": arriving,
        "derivative": indent(show_derivatives(layer.formula.definition), "    "),
        "use": "\n".join(arguments(call, given, ")", "    ")),
        "shapes": _shapes(layer),
        "paths": _filled(_PATHS),
        "check": _filled(Template(_CHECK).substitute(file=file)),
        "version": version("normc"),
    }
    return Template(_DOCSTRING).substitute(fields)


def _filled(text: str) -> str:
    return fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _arriving(cotangents: Sequence[str]) -> str:
    return f"what arrives at the results is {', '.join(cotangents)}"


def _shapes(layer: Layer) -> str:
    """A line for everything that goes in or comes out."""
    lines = {"x": "2 to 5 dimensions, any strides"}
    for row in layer.rows:
        start = f", to start at {row.init:g}" if isinstance(row, Param) else ""
        lines[row.name] = f"{_shape(row.axes)}{start}"
    auto = 'divides the C channels; "auto" is the largest divisor up to 32'
    lines["groups"] = auto if layer.splits else "any divisor of C: no statistic tells groups apart"
    lines["eps"] = "what std and rms add below the root, and eps in the formula"
    lines["channel_dim"] = "the dimension of x with its channels, -1 for (batch, position, channel)"
    lines |= dict.fromkeys(layer.found.results, "shape, type and layout of x")
    width = max(map(len, lines))
    return "\n".join(f"    {name:<{width}}  {text}" for name, text in lines.items())


def _shape(axes: Axis) -> str:
    known = {FULL: "the shape of x", CHANNEL: "shape (C,)", NONE: "shape ()"}
    lacks = {Axis.N: "samples", Axis.K: "channels", Axis.S: "positions"}
    missing = [name for axis, name in lacks.items() if not axis & axes]
    return known.get(axes) or f"the shape of x without its {' and '.join(missing)}"


def public_function(layer: Layer) -> str:
    """The function that a user calls."""
    given = [*layer.given, "*", 'groups="auto"', "eps=1e-5", "channel_dim=1"]
    pairs = [f'"{row.name}": {row.name}' for row in layer.rows]
    last = ["groups", "eps", "channel_dim"]
    call = arguments("return _run(", ["x", f"{{{', '.join(pairs)}}}", *last], ")", "    ")
    if len(call) > 1:
        tensors = ["    {", *(f"        {row}" for row in wrapped(pairs, 12)), "    },"]
        inside = ["    x,", *tensors, f"    {', '.join(last)},"]
        call = [f"    {line}" for line in ["return _run(", *inside, ")"]]
    doc = f'    """{_one_line(layer)}; see the head of this file."""'
    return "\n".join([*arguments(f"def {layer.name}(", given, "):"), doc, *call])


def _one_line(layer: Layer) -> str:
    text = "; ".join(layer.formula.shown.splitlines())
    return text if len(text) < 60 else "The layer"


def tables(layer: Layer) -> str:
    """The axes of every tensor that is given."""
    axes = [f'"{n}": "{a}"' for n, a in zip(layer.given, _axes(layer), strict=True)]
    lines = ["# What each tensor varies over: n samples, c channels, s positions."]
    lines += arguments("_AXES = {", axes, "}")
    lines += [
        "_STORED = (torch.float32, torch.float16, torch.bfloat16)  # by the kernels",
        '_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # they run on the CPU',
    ]
    return "\n".join(lines)


def _axes(layer: Layer) -> list[str]:
    return [spell(axes).replace(",", "") for axes in (FULL, *(row.axes for row in layer.rows))]


def autograd_function(layer: Layer) -> str:
    """The autograd function: forward and backward, along one of the paths."""
    given, kept = _local(layer.given), _local(layer.kept)
    return "\n".join(
        [
            "class _Layer(torch.autograd.Function):",
            '    """The results, with the gradients of everything that was given."""',
            "",
            "    @staticmethod",
            *arguments("def forward(", ["ctx", "call", *given], "):", "    "),
            "        with torch.cuda.device_of(x):",
            *_run(layer, "forward"),
            "        ctx.call = call",
            *(arguments("ctx.save_for_backward(", kept, ")", " " * 8) if kept else []),
            f"        return {', '.join(_local(layer.found.results))}",
            "",
            *_backward(layer),
        ]
    )


def _backward(layer: Layer) -> list[str]:
    """The backward method: a gradient for everything given that wants one and has one."""
    arriving, kept = _local(layer.cotangents), _local(layer.kept)
    gradients = layer.found.gradients
    outs = [gradients.get(COTANGENT + name) for name in layer.given]
    named = [local(out) if out else "None" for out in outs]
    tail = ",)" if len(named) == 1 else ")"
    return [
        "    @staticmethod",
        "    @once_differentiable",
        *arguments("def backward(", ["ctx", *arriving], "):", "    "),
        "        call = ctx.call",
        *(assigned(kept, "ctx.saved_tensors", " " * 8) if kept else []),
        f"        with torch.cuda.device_of({arriving[0]}):",
        *_run(layer, "backward"),
        *arguments("found = (", named, tail, " " * 8),
        "        wanted = ctx.needs_input_grad[1:]",
        "        return None, *[d if want else None for d, want in zip(found, wanted)]",
    ]


def _run(layer: Layer, part: str) -> list[str]:
    """The call of forward or backward along the path that was chosen."""
    program, made = layer.parts[part]
    arriving, names = _local(layer.cotangents), _local(i.name for i in program.inputs)
    items = ["call", *(f"call.laid({n})" if n in arriving else n for n in names)]
    call = f"_{part.upper()}[call.path]("
    line = arguments(f"{unpacked(_local(made))} = {call}", items, ")", " " * 12)
    if len(line[0]) <= WIDTH:
        return line
    called = arguments(f"found = {call}", items, ")", " " * 12)
    return [*called, *assigned(_local(made), "found", " " * 12)]


def _local(names: Iterable[str]) -> list[str]:
    return [local(name) for name in names]
