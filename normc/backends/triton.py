"""The Triton backend, as long as it is because no other file may import triton.

The text of kernels comes from `tiles`, the sizes of tiles from `tile_choice`, what a launch is from
`launches`, and `calls` takes tensors to it. Here the text becomes a file in the cache and is
imported from there; its kernels are compiled, for the GPU that is there or ahead of time for one
that need not be, or run by Triton's interpreter on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from normc import config
from normc.backends import cache
from normc.backends.artefacts import Argument, Artefact, amd_report, contiguous, cubin_report, full
from normc.backends.calls import Kind, Runner, Start
from normc.backends.contract import Job, Run, Source, joined
from normc.backends.gpus import MACHINES, Machine
from normc.backends.launches import ALIGNED, MOST, Launch, divisor, followers, main_launch, sized
from normc.backends.settle import Choose, Maker, Report, offered
from normc.backends.tile_choice import Schedule, candidates
from normc.backends.tile_scope import WAIT
from normc.backends.tiles import printed, source
from normc.backends.tiling import SCHEDULES
from normc.backends.tuned import preferred
from normc.errors import BackendError, nearest
from normc.language.axes import FULL
from normc.language.geometry import Geometry
from normc.schedule.plan import Able, Kernel


def _part(name: str) -> Any:
    """A module of Triton, which has no types; None where there are no wheels for this machine."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton, tl = _part("triton"), _part("triton.language")

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_SHORT = {
    "float32": "fp32",
    "float64": "fp64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
}
_only: ContextVar[str] = ContextVar("only", default="")


def usual(job: Job, kernel: Kernel, geometry: Geometry, machine: Machine) -> list[Schedule]:
    """The `candidates`; on a GPU, after what was the fastest there when it was tuned."""
    choose = candidates if interpreted() else preferred(candidates)
    return choose(job, kernel, geometry, machine)


@dataclass(frozen=True)
class TritonBackend:
    """Prints, imports, compiles and launches Triton kernels."""

    choose: Choose = usual
    name: str = "triton"
    able: Able = Able(carry=True, share=True)

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
        return Source(lambda: source(job), job.entry, ".py")

    def unit(self, jobs: Sequence[Job], sources: Sequence[Source]) -> str:
        return joined(sources)

    def load(self, jobs: Sequence[Job], sources: Sequence[Source]) -> list[Run]:
        if triton is None:
            raise BackendError(self.why_not("float32", "cuda"))
        kind = _Interpreter if interpreted() else _Driver
        return [Runner(job, kind(self.choose)) for job in jobs]

    def machine(self, device: torch.device) -> Machine:
        """What schedules are chosen for."""
        return MACHINES["sm_90"] if interpreted() else machine_of(device.index)


backend = TritonBackend()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@contextmanager
def forced(schedule: str) -> Generator[None, None, None]:
    """Take one schedule for every kernel that has it, in ops that are compiled in the ``with``.

    ``schedule`` is resident, streaming, cluster or split; a kernel whose instances do not fit on
    chip has no resident one, and so on: such a kernel is launched as it would be without.
    """
    if schedule not in SCHEDULES:
        choices = ", ".join(SCHEDULES)
        raise BackendError(
            f"no schedule is called `{schedule}`{nearest(schedule, SCHEDULES)}: {choices}"
        )
    token = _only.set(schedule)
    try:
        yield
    finally:
        _only.reset(token)


def module_of(job: Job, schedule: Schedule) -> Any:
    """The kernels of a schedule, as they are launched: printed for it alone, and imported."""
    name = f"{job.entry}_{schedule[0].form.kernel.name}_{schedule[0].form.schedule}"
    return _module(Source(printed(job, [c.form for c in schedule]), name, ".py"))


def _module(source: Source) -> Any:
    """The source as a module: written to the cache, verified there, and imported."""
    key = cache.key(source.text, "triton", triton.__version__, "")
    file = f"{source.entry}{source.suffix}"
    folder = cache.get_or_build(key, lambda where: _write(where / file, source.text))
    spec = importlib.util.spec_from_file_location(f"normc_{key}", folder / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not interpreted():
        with _PARSING:
            _library()
            _parse(module)
    return module


@once
def _library() -> None:
    """Parse what `tl.sum` and its like are made of."""
    _parse(_part("triton.language.standard"))


def _parse(module: Any) -> None:
    """Parse its functions now, one after the other: CPython's `ast.parse` fails in two threads."""
    for function in vars(module).values():
        if isinstance(function, triton.JITFunction):
            tree = function.parse()
            function.parse = lambda tree=tree: tree


_PARSING = Lock()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    config.debug(1, f"wrote {path.name}")


def _constants(launch: Launch) -> dict[str, Any]:
    """The constants of a launch as Triton takes them."""
    named = {"int32": tl.int32, "int64": tl.int64}
    return {name: named.get(value, value) if isinstance(value, str) else value
            for name, value in launch.constants.items()}  # fmt: skip


# --- the interpreter -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Interpreter:
    """Runs programs one after the other, in Python."""

    choose: Choose

    def only(self) -> str:
        return _only.get()

    def settle(self, kind: Kind, eps: float, aligned: bool) -> list[tuple[Launch, Start]]:
        found: list[tuple[Launch, Start]] = []
        machine = MACHINES["sm_90"]
        for _, schedules in offered(self.choose, kind.only, kind.job, kind.geometry, machine):
            module = module_of(kind.job, schedules[0])
            for c in schedules[0]:
                first = main_launch(c, kind.geometry, kind.steps, eps)
                first = sized(first, machine, 2 * first.parts)  # two instances at a time
                assert first is not None, "there is room for two"
                every = (first, *followers(c, first, kind.geometry))
                found += [(one, self.start(getattr(module, one.name), one)) for one in every]
        return found

    def start(self, function: Any, launch: Launch) -> Start:
        """Programs run in turn, so none can wait: launched again, each finds what others left."""
        constants = _constants(launch)
        if WAIT in constants:
            constants[WAIT] = False

        def start(tensors: Sequence[Any]) -> None:
            for _ in range(1 + launch.meets):
                function[(launch.programs,)](*tensors, *launch.numbers, **constants)

        return start

    def hold(self, tensor: Tensor) -> Any:
        return tensor

    def guard(self, tensor: Tensor) -> Any:
        return None

    def stream(self, tensor: Tensor) -> int | None:
        return 0


# --- a GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Driver:
    """Compiles for the GPU that is there, and launches through Triton's launcher."""

    choose: Choose

    def only(self) -> str:
        return _only.get()

    def settle(self, kind: Kind, eps: float, aligned: bool) -> list[tuple[Launch, Start]]:
        device = kind.device.index
        target = triton.runtime.driver.active.get_current_target()
        make = partial(_made, kind, target=target, aligned=aligned)
        maker = Maker(kind, machine_of(device), eps, module_of, make, _loaded)
        with torch.cuda.device(device):
            found = maker.settled(self.choose, kind.only)
        stream = triton.runtime.driver.active.get_current_stream
        return [(one, start(one, made, device, stream)) for one, made in found]

    def hold(self, tensor: Tensor) -> Any:
        return tensor.data_ptr()

    def guard(self, tensor: Tensor) -> Any:
        index = tensor.device.index
        return None if torch.cuda.current_device() == index else torch.cuda.device(index)

    def stream(self, tensor: Tensor) -> int | None:
        if torch.cuda.is_current_stream_capturing():
            return None
        return triton.runtime.driver.active.get_current_stream(tensor.device.index)


def _loaded(made: Any) -> Report:
    """What a kernel asks for, from the driver that has loaded it."""
    made._init_handles()
    return Report(made.n_regs, made.n_spills, made.metadata.shared)


def start(launch: Launch, made: Any, device: int, stream: Callable[[int], int]) -> Start:
    """A launch through Triton's launcher, which is given addresses."""
    run, function, packed = made.run, made.function, made.packed_metadata
    tail = (*launch.numbers, *_constants(launch).values())
    programs = launch.programs

    def begin(places: Sequence[Any]) -> None:
        run(programs, 1, 1, stream(device), function, packed, None, None, None, *places, *tail)

    return begin


@once
def machine_of(device: int) -> Machine:
    """The GPU of an index, as far as schedules depend on it."""
    found = torch.cuda.get_device_properties(device)
    known = MACHINES.get(f"sm_{found.major}{found.minor}", MACHINES["sm_80"])
    processors, waits = found.multi_processor_count, torch.version.hip is None
    return replace(known, name=found.name, processors=processors, waits=waits)


def _made(kind: Kind, function: Any, launch: Launch, target: Any, aligned: bool) -> Any:
    """One kernel compiled for a GPU, which need not be there."""
    made = _specialised(kind, function, launch, aligned)
    options = launch.options(target.backend == "hip")
    try:
        return triton.compile(made, target=target, options=options)
    except triton.compiler.CompilationError as error:
        raise BackendError(f"Triton refuses {launch.name}: {error}") from error


def _specialised(kind: Kind, function: Any, launch: Launch, aligned: bool) -> Any:
    """What Triton compiles: with the largest power of two that divides each number, up to 16."""
    names, values = list(function.arg_names), [ALIGNED if aligned else 1 for _ in launch.tensors]
    values += launch.numbers
    types = [f"*{_SHORT[pointee(kind, name)]}" for name in launch.tensors]
    types += ["i32" if number <= MOST else "i64" for number in launch.numbers]
    first = len(launch.tensors)
    constants = {i: 1 for i, value in enumerate(values) if value == 1 and i >= first}
    constants |= {names.index(name): value for name, value in _constants(launch).items()}
    signature = {name: "constexpr" if i in constants else types[i] for i, name in enumerate(names)}
    attributes = {
        (i,): [["tt.divisibility", divisor(value)]]
        for i, value in enumerate(values)
        if divisor(value) > 1 and i not in constants
    }
    fixed = {(i,): value for i, value in constants.items()}
    return triton.compiler.ASTSource(function, signature, fixed, attributes)


def pointee(kind: Kind, name: str) -> str:
    """The type behind a pointer: a user's tensor has its own, normc's statistics are wide."""
    job = kind.job
    if name in kind.dtypes:
        return kind.dtypes[name]
    if any(o.name == name and o.axes == FULL for o in job.plan.program.outputs):
        return job.dtype
    return "int64" if "arrived" in name and name.endswith("(scratch)") else job.wide


# --- ahead of time -------------------------------------------------------------------------------


TARGETS = tuple(MACHINES)


def compile_ahead(
    job: Job,
    target: str,
    geometry: Geometry | None = None,
    eps: float = 1e-5,
    choose: Choose = candidates,
) -> dict[str, Artefact]:
    """Compile the kernels that would be launched for tensors of a geometry; no GPU is needed.

    ``target`` is one of `TARGETS`; without a geometry, 32 images of 256 channels in 32 groups and
    28 x 28 positions. The tensors are taken to be contiguous and aligned, as PyTorch makes them.
    The launches come in order, by the names of their functions.
    """
    kind, machine = _ahead(job, target, geometry)
    make = partial(_made, kind, target=_target(target), aligned=True)
    found = Maker(kind, machine, eps, module_of, make, _report).settled(choose, _only.get())
    return {one.name: _artefact(kind, one, made) for one, made in found}


def compile_all(
    jobs: Sequence[Job], target: str, geometry: Geometry | None = None, eps: float = 1e-5
) -> list[dict[str, Artefact]]:
    """`compile_ahead` of several jobs, side by side: those of forward and backward, say."""

    def one(job: Job) -> Any:
        return copy_context().run, partial(compile_ahead, job, target, geometry, eps)

    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        return list(pool.map(lambda pair: pair[0](pair[1]), map(one, jobs)))


def legal(job: Job, target: str, geometry: Geometry | None = None) -> None:
    """Raise `BackendError` unless Triton accepts the kernels that would be launched.

    They are lowered to Triton's own IR and no further: what a search asks before it spends ten
    times as long on machine code.
    """
    kind, machine = _ahead(job, target, geometry)
    for _, schedules in offered(candidates, _only.get(), job, kind.geometry, machine):
        module = module_of(job, schedules[0])
        for c in schedules[0]:
            first = main_launch(c, kind.geometry, kind.steps, 1e-5)
            if first.programs:
                _lower(kind, getattr(module, first.name), first, _target(target))


def _lower(kind: Kind, function: Any, launch: Launch, target: Any) -> None:
    compiler = triton.compiler.compiler
    machine = compiler.make_backend(target)
    made = _specialised(kind, function, launch, True)
    options = machine.parse_options(
        {**launch.options(target.backend == "hip"), **made.parse_options()}
    )
    context, stages, metadata = (
        compiler.ir.context(),
        dict[str, Any](),
        dict[str, Any](vars(options)),
    )
    machine.add_stages(stages, options, made.language)
    compiler.ir.load_dialects(context)
    machine.load_dialects(context)
    try:
        module = made.make_ir(
            target, options, machine.get_codegen_implementation(options),
            machine.get_module_map(), context,
        )  # fmt: skip
        stages["ttir"](module, metadata)
    except Exception as error:  # Triton's own errors have no common base
        raise BackendError(f"Triton refuses {launch.name}: {error}") from error


def _ahead(job: Job, target: str, geometry: Geometry | None) -> tuple[Kind, Machine]:
    """What compiling for a GPU that is not there starts from."""
    if target not in TARGETS:
        raise BackendError(f"no target is called `{target}`: {', '.join(TARGETS)}")
    if triton is None or interpreted():
        raise BackendError("compiling ahead of time needs Triton, and TRITON_INTERPRET unset")
    geometry = geometry or Geometry.of((32, 256, 28, 28), 32)
    steps = dict.fromkeys(full(job), contiguous(job, geometry))
    users = {i.name: job.dtype for i in job.plan.program.inputs if i.name not in job.dense}
    kind = Kind(job, geometry, steps, users, torch.device("cuda", 0))
    return kind, MACHINES[target]


def _artefact(kind: Kind, launch: Launch, made: Any) -> Artefact:
    cuda = "cubin" in made.asm
    text, binary = (made.asm[key] for key in (("ptx", "cubin") if cuda else ("amdgcn", "hsaco")))
    report, file = _report(made), Path(inspect.getfile(made.src.fn.fn))
    return Artefact(
        launch, text, binary, report.registers, report.spills, report.shared,
        file.read_text("utf-8"), file.name, made.metadata.name,
        tuple(_arguments(kind, made.src, launch)),
    )  # fmt: skip


def _arguments(kind: Kind, made: Any, launch: Launch) -> Iterator[Argument]:
    values = dict(enumerate((*launch.tensors, *launch.numbers)))
    pointers = len(launch.tensors)
    for i, (name, spelled) in enumerate(made.signature.items()):
        if spelled == "constexpr":
            value = made.constants[i,]
            plain = value if isinstance(value, int | float | bool | str) else str(value)
            yield Argument(name, "constant", type(plain).__name__, plain, False)
        elif i < pointers:
            yield Argument(name, "pointer", spelled, values[i], True)
        else:
            yield Argument(name, "number", spelled, values[i], False)


def _report(made: Any) -> Report:
    """What a compiled kernel asks for, without a GPU that loads it."""
    shared = made.metadata.shared
    if "cubin" in made.asm:
        return cubin_report(made.asm["cubin"], shared, triton.knobs.nvidia.cuobjdump.path)
    return amd_report(made.asm["amdgcn"], shared)


def _target(target: str) -> Any:
    machine = _part("triton.backends.compiler").GPUTarget
    cuda = target.startswith("sm_")
    return machine("cuda", int(target[3:]), 32) if cuda else machine("hip", target, 64)
