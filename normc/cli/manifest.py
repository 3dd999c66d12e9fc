"""Manifest: kernels compiled ahead of time, as files and one record of all it takes to launch them.

    manifest ::= format, formula, digest, target, dtype, eps, shape, ..., versions, {job}
    job      ::= part, source, {tensor}, {kernel}             forward, then backward
    kernel   ::= name, schedule, symbol, binary, assembly, grid, block, shared, ..., {argument}
    tensor   ::= name, role, dtype, shape, strides
    argument ::= name, kind, type, tensor and aligned | value

The kernels of a job are launched in order, one after the other. Pointers and numbers are passed in
the order in which they stand; a constant is part of the machine code and is not passed. Strides are
in elements. A tensor is an ``input``, an ``output``, ``saved`` (forward writes it, and backward
has it as an input) or ``scratch``; one with ``zeros`` is filled with zeros before it is used for
the first time. The machine code relies on the numbers, and on addresses that are multiples of 16
bytes where they are ``aligned``. A ``cooperative`` kernel's programs wait for each other, so it has
to be launched as one of which all programs run at the same time. ``shared`` is in bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

from normc.backends.contract import Job
from normc.backends.triton import Artefact, compile_all
from normc.cli.folder import MANIFEST
from normc.formula import Formula
from normc.language.axes import CHANNEL, FULL, Axis
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs, all_programs
from normc.ops.target import target_ahead

FORMAT = "normc-kernels-1"
"""Changes when a reader of older manifests would be misled."""

Files = dict[str, bytes]
Record = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is to be compiled, and for which tensors."""

    formula: Formula
    target: str
    dtype: str
    geometry: Geometry
    order: tuple[Axis, ...]  # of axes in memory
    eps: float

    @property
    def cuda(self) -> bool:
        """Whether it is for a GPU of Nvidia's, and not of AMD's."""
        return self.target.startswith("sm_")

    def jobs(self) -> list[Job]:
        """Forward, and backward if anything can be differentiated."""
        about = target_ahead(self.formula, "triton", self.dtype, self.geometry, self.order)
        return all_jobs(self.formula, about)


def build(wanted: Wanted) -> tuple[Record, Files]:
    """The manifest, and every file by name, the manifest's own included; nothing is written."""
    files: Files = {}
    planned = wanted.jobs()
    made = compile_all(planned, wanted.target, wanted.geometry, wanted.eps)
    jobs = [_job(wanted, job, one, files) for job, one in zip(planned, made, strict=True)]
    geometry, f = wanted.geometry, wanted.formula
    record: Record = {
        "format": FORMAT,
        "formula": f.text,
        "name": f.label,
        "digest": f.digest,
        "target": wanted.target,
        "dtype": wanted.dtype,
        "eps": wanted.eps,
        "shape": list(geometry.shape_of()),
        "channel_dim": geometry.channel_dim,
        "groups": geometry.g,
        "gradients": dict(all_programs(f).gradients),
        "layout": "channels-last" if wanted.order[-1] & CHANNEL else "channels-first",
        "versions": {name: version(name) for name in ("normc", "triton", "torch")},
        "jobs": jobs,
    }
    files[MANIFEST] = (_show(record) + "\n").encode()
    return record, files


def _show(value: Any, indent: str = "") -> str:
    """JSON for people to read: what fits stands on one line."""
    flat = json.dumps(value)
    if not isinstance(value, (dict, list)) or len(indent) + len(flat) <= 100:
        return flat
    inner = indent + " "
    if isinstance(value, list):
        rows = [inner + _show(each, inner) for each in cast(list[Any], value)]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    named = cast(Record, value).items()
    rows = [f"{inner}{json.dumps(key)}: {_show(each, inner)}" for key, each in named]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def _job(wanted: Wanted, job: Job, made: Mapping[str, Artefact], files: Files) -> Record:
    """The record of a job; its files are added to ``files``."""
    return {
        "part": job.part,
        "tensors": list(_tensors(wanted, job, list(made.values()))),
        "kernels": [_kernel(wanted, artefact, files) for artefact in made.values()],
    }


def _file(files: Files, name: str, content: bytes) -> Record:
    files[name] = content
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# --- kernels -------------------------------------------------------------------------------------


def _kernel(wanted: Wanted, made: Artefact, files: Files) -> Record:
    """The record of a kernel: what is launched, how, and with which arguments."""
    binary, assembly = (".cubin", ".ptx") if wanted.cuda else (".hsaco", ".amdgcn")
    launch, wide = made.launch, 32 if wanted.cuda else 64
    warps = launch.options(hip=not wanted.cuda)["num_warps"]
    return {
        "name": launch.name,
        "schedule": launch.schedule,
        "source": _file(files, made.file, made.source.encode()),
        "symbol": made.symbol,
        "binary": _file(files, launch.name + binary, made.binary),
        "assembly": _file(files, launch.name + assembly, made.text.encode()),
        "grid": [launch.programs, 1, 1],
        "block": [warps * wide, 1, 1],
        "warps": warps,
        "shared": made.shared,
        "cooperative": launch.meets > 0,
        "registers": made.registers,
        "spills": made.spills,
        "arguments": [*_arguments(made), *_hidden(made)],
    }


def _arguments(made: Artefact) -> Iterator[Record]:
    """The arguments in order; the pointers among them are the tensors of the launch."""
    tensors = iter(made.launch.tensors)
    for a in made.arguments:
        about: Record = {"name": a.name, "kind": a.kind, "type": a.type}
        if a.kind == "pointer":
            yield about | {"tensor": next(tensors), "aligned": a.aligned}
        elif a.kind == "number":
            yield about | {"value": a.value}
        else:
            plain = isinstance(a.value, (bool, int, float, str))
            yield about | {"value": a.value if plain else str(a.value)}


def _hidden(made: Artefact) -> Iterator[Record]:
    """Pointers that Triton adds behind its arguments, to room that none of our kernels asks for."""
    passed = [a for a in made.arguments if a.kind != "constant"]
    for i in range(len(parameters(made.text)) - len(passed)):
        yield {"name": f"unused_{i}", "kind": "number", "type": "i64", "value": 0}


def parameters(text: str) -> list[int]:
    """The sizes in bytes of what a kernel is passed, as its assembly declares them.

    What AMD's runtime passes by itself is left out.
    """
    entry = re.search(r"\.entry \w+\((.*?)\)", text, re.DOTALL)
    if entry:
        return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[1])]
    (listed,) = re.findall(r"^ +\.args:\n(.*?)^    \.\w", text, re.DOTALL | re.MULTILINE)
    found = re.findall(r"\.size: +(\d+)\n +\.value_kind: +(\w+)", listed)
    return [int(size) for size, kind in found if not kind.startswith("hidden_")]


# --- tensors -------------------------------------------------------------------------------------


def _tensors(wanted: Wanted, job: Job, made: Sequence[Artefact]) -> Iterator[Record]:
    """Every tensor that a kernel of the job is passed, in order of first use."""
    over, rooms = _axes(job), {room.name: room for m in made for room in m.launch.rooms}
    passed = [a for m in made for a in _arguments(m) if a["kind"] == "pointer"]
    for name, type_ in {a["tensor"]: a["type"] for a in passed}.items():
        about: Record = {"name": name, "role": _role(job, name), "dtype": _DTYPES[type_]}
        shape, strides = _placed(wanted, over[name]) if name in over else ([rooms[name].count], [1])
        yield about | {"shape": shape, "strides": strides, "zeros": type_ == _COUNTER}


_COUNTER = "*i64"  # counts how many programs have come to a meeting, and only grows

_DTYPES = {
    "*fp16": "float16",
    "*bf16": "bfloat16",
    "*fp32": "float32",
    "*fp64": "float64",
    _COUNTER: "int64",
}


def _axes(job: Job) -> Mapping[str, Axis]:
    """The axes of everything that has a name in the program."""
    program = job.plan.program
    named = (*program.inputs, *(s.var for s in program.stats), *(o.var for o in program.outputs))
    return {v.name: v.axes for v in named}


def _role(job: Job, name: str) -> str:
    program = job.plan.program
    if name in (i.name for i in program.inputs):
        return "input"
    if name in (o.name for o in program.outputs):
        return "output"
    return "saved" if name in job.plan.saved else "scratch"


def _placed(wanted: Wanted, axes: Axis) -> tuple[list[int], list[int]]:
    """Shape and strides of a tensor over some axes, in the order of x's dimensions.

    Whatever the layout of full-size tensors, smaller ones are dense in the order N, C, space.
    """
    geometry = wanted.geometry
    dims = list(geometry.dims(axes))  # N, C, space
    if axes == FULL and wanted.order[-1] & CHANNEL:
        dims.append(dims.pop(1))
    shape = dict(zip(sorted(dims), geometry.shape_of(axes), strict=True))
    strides: dict[int, int] = {}
    step = 1
    for d in reversed(dims):
        strides[d] = step
        step *= shape[d]
    return list(shape.values()), [strides[d] for d in shape]
