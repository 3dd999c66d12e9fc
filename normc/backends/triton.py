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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normc import config
from normc.backends import cache
from normc.backends.contract import Bound, Job, Run, Source, joined
from normc.backends.memory import Strides, full_input, strides_of, unview, view, walkable
from normc.backends.tiles import source
from normc.backends.tiling import PARTS, Config, choose, sum_name
from normc.errors import BackendError
from normc.language.axes import CHANNEL, FULL, NONE
from normc.language.expr import Var
from normc.language.geometry import Geometry
from normc.program.program import Stat
from normc.schedule.plan import Able, Kernel


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
    able: Able = Able(carry=True)

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

    def unit(self, jobs: Sequence[Job], sources: Sequence[Source]) -> str:
        return joined(sources)

    def load(self, jobs: Sequence[Job], sources: Sequence[Source]) -> list[Run]:
        every = zip(jobs, sources, strict=True)
        return [_Runner(job, _module(source), self.choose) for job, source in every]


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


@dataclass(frozen=True)
class _Ready:
    """All that one geometry and one set of strides settle about a job."""

    launches: tuple[tuple[Launch, dict[str, Any]], ...]  # each with its keyword arguments
    copied: tuple[str, ...]  # full-size inputs that cannot be walked as they are
    room: Mapping[str, tuple[int, ...]]  # what is allocated in the wide type


class _Runner:
    """Launches the kernels of a job, one after the other."""

    def __init__(self, job: Job, module: Any, choose: Choose) -> None:
        self.job = job
        self.module = module
        self.choose = choose
        self.storage, self.wide = getattr(torch, job.dtype), getattr(torch, job.wide)
        inputs, outputs = job.plan.program.inputs, job.plan.program.outputs
        self.whole = [i.name for i in inputs if i.axes == FULL]
        self.small = [i for i in inputs if i.axes != FULL]
        self.written = [o.name for o in outputs if o.axes == FULL]
        self.reduced = [(o.name, o.axes) for o in outputs if o.axes != FULL]
        self.ready = lru_cache(maxsize=256)(self._ready)

    def bind(self, geometry: Geometry, tensors: Mapping[str, Any]) -> Bound:
        return partial(self, geometry)

    def __call__(
        self, geometry: Geometry, tensors: Mapping[str, Any], eps: float
    ) -> dict[str, Any]:
        x = full_input(self.job.plan.program, tensors)
        strides = tuple(tensors[name].stride() for name in self.whole)
        ready = self.ready(geometry, strides, x.stride(), eps)
        known = {name: tensors[name] for name in self.whole}
        known |= {name: known[name].contiguous() for name in ready.copied}
        known |= {i.name: self._packed(i, tensors[i.name], geometry) for i in self.small}
        known |= {name: torch.empty_like(x, dtype=self.storage) for name in self.written}
        room = torch.empty if ready.launches else torch.zeros  # of no elements, all sums are zero
        for name, shape in ready.room.items():
            known[name] = room(shape, dtype=self.wide, device=x.device)
        with torch.cuda.device_of(x):
            for launch, keywords in ready.launches:
                given = (known[name] for name in launch.tensors)
                function = getattr(self.module, launch.name)
                function[(launch.programs,)](*given, *launch.numbers, **keywords)
        results = {name: unview(known[name], axes, geometry) for name, axes in self.reduced}
        return results | {name: known[name] for name in (*self.written, *self.job.plan.saved)}

    def _packed(self, i: Var, tensor: Tensor, geometry: Geometry) -> Tensor:
        """A tensor smaller than x, dense over (N, G, K, S)."""
        if i.name in self.job.dense or i.axes in (CHANNEL, NONE):
            return tensor.contiguous()
        return view(tensor, i.axes, geometry).contiguous()

    def _ready(
        self,
        geometry: Geometry,
        strides: tuple[tuple[int, ...], ...],
        like: tuple[int, ...],
        eps: float,
    ) -> _Ready:
        def held(stride: tuple[int, ...]) -> Tensor:
            return torch.empty_strided(geometry.shape_of(), stride, device="meta")

        given = {name: held(stride) for name, stride in zip(self.whole, strides, strict=True)}
        walked = {name: walkable(tensor, FULL, geometry) for name, tensor in given.items()}
        copied = tuple(name for name, tensor in given.items() if walked[name] is not tensor)
        if self.written:
            walked |= dict.fromkeys(self.written, torch.empty_like(held(like)))
        steps = {name: strides_of(tensor, FULL, geometry) for name, tensor in walked.items()}
        known = {name: step for name, step in steps.items() if step is not None}
        kernels = self.job.plan.kernels if geometry.count(FULL) else ()
        configs = (self.choose(self.job, kernel, geometry) for kernel in kernels)
        every = [one for c in configs for one in launches(c, geometry, known, eps)]
        hip = torch.version.hip is not None
        keywords = [{**launch.constants, **launch.options(hip)} for launch in every]
        ready = tuple(zip(every, keywords, strict=True))
        return _Ready(ready, copied, self._room(every, geometry))

    def _room(self, every: Sequence[Launch], geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """The shapes of small outputs, statistics that go through memory, and parts of sums."""
        plan = self.job.plan
        passed = {name for launch in every for name in launch.tensors}.union(plan.saved)
        room = {name: geometry.sizes(axes) for name, axes in self.reduced}
        room |= {s.name: geometry.sizes(s.kept) for s in plan.program.stats if s.name in passed}
        for launch in every:
            for stat in plan.carries:
                if launch.name == sum_name(self.job, stat):
                    room[_parts(stat)] = launch.numbers[:2]
        return room


def _full(job: Job) -> list[str]:
    """The names of the tensors of x's shape."""
    program = job.plan.program
    every = (*program.inputs, *(o.var for o in program.outputs))
    return [v.name for v in every if v.axes == FULL]


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
    names = list(function.arg_names)
    constants = {i: 1 for i, value in enumerate(values) if value == 1}
    constants |= {names.index(name): value for name, value in launch.constants.items()}
    signature = {name: "constexpr" if i in constants else types[i] for i, name in enumerate(names)}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, value in enumerate(values) if value % 16 == 0
    }
    fixed = {(i,): value for i, value in constants.items()}
    return triton.compiler.ASTSource(function, signature, fixed, attributes)


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
