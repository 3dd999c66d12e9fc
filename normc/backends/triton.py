"""The Triton backend, as long as it is because no other file may import triton.

The text of kernels comes from `normc.backends.tiles`, the sizes of their tiles from
`normc.backends.tiling`. Here the text becomes a file in the cache and is imported from there; its
kernels are launched on a GPU, or under Triton's interpreter on the CPU, or compiled ahead of time
for a GPU that need not be present.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normc import config
from normc.backends import cache
from normc.backends.contract import Job, Run, Source
from normc.backends.memory import Strides, empty, full_input, strides_of, unview, view, walkable
from normc.backends.tiles import source
from normc.backends.tiling import PARTS, Config, choose, sum_name
from normc.errors import BackendError
from normc.language.axes import CHANNEL, FULL, NONE, Axis
from normc.language.expr import Var
from normc.language.geometry import Geometry
from normc.program.program import Stat
from normc.schedule.plan import Kernel


def _part(name: str) -> Any:
    """A module of Triton, which has no types; None where there are no wheels for this machine."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton, tl = _part("triton"), _part("triton.language")

Choose = Callable[[Job, Kernel, Geometry], Config]

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_MOST = 2**31 - 1  # programs of a launch, and what a 32-bit index can hold


@dataclass(frozen=True)
class TritonBackend:
    """Prints, imports and launches Triton kernels."""

    choose: Choose = choose
    name: str = "triton"
    carries: bool = True

    def why_not(self, dtype: str, device: str) -> str:
        if triton is None:
            return "Triton is not installed: pip install triton"
        if dtype not in _DTYPES:
            return f"the Triton backend stores {', '.join(_DTYPES)}, not {dtype}"
        if device == "cuda" or (device == "cpu" and interpreted()):
            return ""
        return (
            f"the Triton backend runs on a GPU, not on {device}; "
            "with TRITON_INTERPRET=1 set before Python starts, it also runs on the CPU, slowly"
        )

    def render(self, job: Job) -> Source:
        return Source(source(job), job.entry, ".py")

    def load(self, job: Job, source: Source) -> Run:
        return _Runner(job, _module(source), self.choose)


backend = TritonBackend()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def _module(source: Source) -> Any:
    """The source as a module: written to the cache, verified there, and imported."""
    if triton is None:
        raise BackendError(backend.why_not("float32", "cuda"))
    key = cache.key(source.text, "triton", triton.__version__, "")
    file = f"{source.entry}{source.suffix}"
    folder = cache.get_or_build(key, lambda where: _write(where / file, source.text))
    spec = importlib.util.spec_from_file_location(f"normc_{key}", folder / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    config.debug(1, f"wrote {path.name}")


@dataclass(frozen=True)
class Launch:
    """One launch, but for its tensors."""

    name: str  # of the function in the source
    programs: int
    tensors: tuple[str, ...]
    numbers: tuple[int, ...]  # strides and sizes
    constants: Mapping[str, Any]  # EPS, INDEX and the extents of tiles
    warps: int

    def options(self, hip: bool) -> dict[str, Any]:
        """What Triton is told beside the arguments; a warp of an AMD GPU is twice as wide.

        Products and sums are not contracted: what two kernels compute is the same number in both,
        so that a tie of max or min in forward is a tie again in backward.
        """
        warps = max(1, self.warps // 2) if hip else self.warps
        return {"num_warps": warps, "enable_fp_fusion": False}


Steps = Mapping[str, Strides]


def launches(config: Config, geometry: Geometry, steps: Steps, eps: float) -> list[Launch]:
    """How a kernel is launched on full-size tensors of these strides over (N, G, K, S)."""
    form, programs = config.form, config.programs(geometry)
    if programs > _MOST:
        raise BackendError(f"{form.name} would need {programs} programs, and a GPU runs {_MOST}")
    carries = form.kernel.carries
    if carries:
        programs = min(programs, PARTS)
    at = {"n": 0, "c": 2, "s": 3}
    numbers = (
        *(steps[name][at[letter]] for name, letter in form.strides),
        *(geometry.count(d.axes) for d in form.sizes),
    )
    tensors = (*(v.name for v in form.pointers), *(_parts(stat) for stat in carries))
    index = tl.int64 if _reach(geometry, steps) > _MOST else tl.int32
    constants = {"EPS": eps, "INDEX": index, **dict(config.blocks)}
    first = Launch(form.name, programs, tensors, numbers, constants, config.warps)
    rest = [_sum(form.job, stat, programs, geometry) for stat in carries]
    return [launch for launch in (first, *rest) if launch.programs]


def _sum(job: Job, stat: Stat, parts: int, geometry: Geometry) -> Launch:
    """The launch that adds up the parts of a carried sum."""
    size = geometry.count(stat.kept)
    tile = {"BLOCK_PARTS": 32, "BLOCK": 64}
    numbers = (parts, size, geometry.count(stat.over))
    tensors = (_parts(stat), stat.name)
    return Launch(sum_name(job, stat), -(-size // tile["BLOCK"]), tensors, numbers, tile, 8)


def _parts(stat: Stat) -> str:
    """What the parts of a carried sum are called: like no tensor of a user."""
    return f"{stat.name} parts"


def _reach(geometry: Geometry, steps: Steps) -> int:
    """The largest offset into any tensor."""
    sizes = geometry.sizes()
    ends = (
        sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        for strides in steps.values()
    )
    return max([prod(sizes), *ends])


class _Runner:
    """Launches the kernels of a job, one after the other."""

    def __init__(self, job: Job, module: Any, choose: Choose) -> None:
        self.job = job
        self.module = module
        self.choose = choose
        self.storage, self.wide = getattr(torch, job.dtype), getattr(torch, job.wide)
        self.launches = lru_cache(maxsize=256)(self._launches)

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        program, saved = self.job.plan.program, self.job.plan.saved
        x = full_input(program, tensors)
        known = {i.name: self._input(i, tensors[i.name], geometry) for i in program.inputs}
        known |= {o.name: self._room(o.axes, geometry, x) for o in program.outputs}
        launches = self.launches(geometry, self._steps(known, geometry), eps)
        known |= self._stats(launches, geometry, x)
        self._run(launches, known, x)
        results = {o.name: _shaped(known[o.name], o.axes, geometry) for o in program.outputs}
        return results | {name: known[name] for name in saved}

    def _run(self, launches: tuple[Launch, ...], known: Mapping[str, Tensor], x: Tensor) -> None:
        hip = torch.version.hip is not None
        with torch.cuda.device_of(x):
            for launch in launches:
                function = getattr(self.module, launch.name)
                tensors = (known[name] for name in launch.tensors)
                function[(launch.programs,)](
                    *tensors, *launch.numbers, **launch.constants, **launch.options(hip)
                )

    def _launches(
        self, geometry: Geometry, steps: tuple[tuple[str, Strides], ...], eps: float
    ) -> tuple[Launch, ...]:
        configs = (self.choose(self.job, kernel, geometry) for kernel in self.job.plan.kernels)
        return tuple(launch for c in configs for launch in launches(c, geometry, dict(steps), eps))

    def _input(self, i: Var, tensor: Tensor, geometry: Geometry) -> Tensor:
        """A full-size tensor as it is, if it can be walked; a smaller one densely packed."""
        if i.axes == FULL:
            return walkable(tensor, i.axes, geometry)
        if i.name in self.job.dense or i.axes in (CHANNEL, NONE):
            return tensor.contiguous()
        return view(tensor, i.axes, geometry).contiguous()

    def _room(self, axes: Axis, geometry: Geometry, x: Tensor) -> Tensor:
        """Space for an output: in x's memory format if it is full-size, else wide and dense."""
        if axes == FULL:
            return empty(axes, geometry, x, self.storage)
        return torch.empty(geometry.sizes(axes), dtype=self.wide, device=x.device)

    def _stats(
        self, launches: tuple[Launch, ...], geometry: Geometry, x: Tensor
    ) -> dict[str, Tensor]:
        """Space for the statistics that go through memory, and for the parts of sums."""
        job = self.job
        passed = {name for launch in launches for name in launch.tensors}.union(job.plan.saved)
        room = {s.name: geometry.sizes(s.kept) for s in job.plan.program.stats if s.name in passed}
        for launch in launches:
            for stat in job.plan.carries:
                if launch.name == sum_name(job, stat):
                    parts, size, _ = launch.numbers
                    room[_parts(stat)] = (parts, size)
        return {
            name: torch.empty(shape, dtype=self.wide, device=x.device)
            for name, shape in room.items()
        }

    def _steps(
        self, known: Mapping[str, Tensor], geometry: Geometry
    ) -> tuple[tuple[str, Strides], ...]:
        found = ((name, strides_of(known[name], FULL, geometry)) for name in _full(self.job))
        return tuple((name, steps) for name, steps in found if steps is not None)


def _full(job: Job) -> list[str]:
    """The names of the tensors of x's shape."""
    program = job.plan.program
    every = (*program.inputs, *(o.var for o in program.outputs))
    return [v.name for v in every if v.axes == FULL]


def _shaped(tensor: Tensor, axes: Axis, geometry: Geometry) -> Tensor:
    return tensor if axes == FULL else unview(tensor, axes, geometry)


# --- ahead of time -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Artefact:
    """One kernel compiled for a GPU: its assembly, its binary, and what it asks of the machine."""

    launch: Launch
    text: str  # PTX or AMD assembly
    binary: bytes
    registers: int  # per thread
    spills: int  # bytes per thread, of registers written to memory
    shared: int  # bytes per program


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compile_ahead(job: Job, target: str, geometry: Geometry | None = None) -> dict[str, Artefact]:
    """Compile the kernels that would be launched for tensors of a geometry; no GPU is needed.

    ``target`` is one of `TARGETS`; without a geometry, 32 images of 256 channels in 32 groups and
    28 x 28 positions. The tensors are taken to be contiguous and aligned, as PyTorch makes them.
    """
    if target not in TARGETS:
        raise BackendError(f"no target is called `{target}`: {', '.join(TARGETS)}")
    if triton is None or interpreted():
        raise BackendError("compiling ahead of time needs Triton, and TRITON_INTERPRET unset")
    geometry = geometry or Geometry.of((32, 256, 28, 28), 32)
    module = _module(backend.render(job))
    steps = dict.fromkeys(_full(job), _contiguous(job, geometry))
    configs = (backend.choose(job, kernel, geometry) for kernel in job.plan.kernels)
    every = (launch for c in configs for launch in launches(c, geometry, steps, 1e-5))
    return {
        launch.name: _compile(job, getattr(module, launch.name), launch, target) for launch in every
    }


def _compile(job: Job, function: Any, launch: Launch, target: str) -> Artefact:
    cuda = target.startswith("sm_")
    machine, options = _machine(target), launch.options(hip=not cuda)
    made = triton.compile(_specialised(job, function, launch), target=machine, options=options)
    text = made.asm["ptx" if cuda else "amdgcn"]
    registers, spills = _ptxas(text, machine.arch) if cuda else _amd(text)
    binary = made.asm["cubin" if cuda else "hsaco"]
    return Artefact(launch, text, binary, registers, spills, made.metadata.shared)


def _machine(target: str) -> Any:
    machine = _part("triton.backends.compiler").GPUTarget
    cuda = target.startswith("sm_")
    return machine("cuda", int(target[3:]), 32) if cuda else machine("hip", target, 64)


def _specialised(job: Job, function: Any, launch: Launch) -> Any:
    """What Triton compiles at launch, where it sees which numbers are 1 or multiples of 16."""
    values = [16 for _ in launch.tensors] + list(launch.numbers)  # addresses are multiples of 16
    types = [f"*{_pointee(job, name)}" for name in launch.tensors]
    types += ["i32" if number <= _MOST else "i64" for number in launch.numbers]
    constants = {i: 1 for i, value in enumerate(values) if value == 1}
    constants |= dict(enumerate(launch.constants.values(), len(values)))
    types += ["constexpr" for _ in launch.constants]
    signature = {
        name: "constexpr" if i in constants else types[i]
        for i, name in enumerate(function.arg_names)
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, value in enumerate(values) if value % 16 == 0
    }
    return triton.compiler.ASTSource(
        function, signature, {(i,): c for i, c in constants.items()}, attributes
    )


def _pointee(job: Job, name: str) -> str:
    """The type behind a pointer: storage for tensors of the user, wide for normc's own."""
    users = {i.name for i in job.plan.program.inputs}.union(_full(job)).difference(job.dense)
    short = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}
    return short[job.dtype if name in users else job.wide]


def _contiguous(job: Job, geometry: Geometry) -> Strides:
    """The strides of a contiguous tensor whose axes lie in the order of the job."""
    c, s = geometry.channels, geometry.s
    n, c, s = (c * s, 1, c) if job.plan.order[-1] & CHANNEL else (c * s, s, 1)
    return n, c * geometry.k, c, s


def _ptxas(text: str, arch: int) -> tuple[int, int]:
    """Registers and bytes spilled, from the report of the ptxas that Triton brings along."""
    ptxas = _part("triton.backends.nvidia.compiler").get_ptxas(arch).path
    name = re.findall(r"^\.target (\w+)", text, re.MULTILINE)[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={name}", file.name]
        done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"ptxas refused a kernel:\n{done.stderr[:2000]}")
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return int(registers), sum(map(int, spilled))


def _amd(text: str) -> tuple[int, int]:
    """Vector registers and bytes spilled, from the metadata that ends the assembly."""
    (registers,) = re.findall(r"\.vgpr_count: *(\d+)", text)
    (spilled,) = re.findall(r"\.vgpr_spill_count: *(\d+)", text)
    return int(registers), 4 * int(spilled)
