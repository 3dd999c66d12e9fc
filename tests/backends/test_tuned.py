"""The record of tuning: what comes of it, what it looks like, and what it survives."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import normc
from normc import config
from normc.backends import triton, tuned, tuned_file
from normc.backends.contract import Job
from normc.backends.gpus import MACHINES, Machine
from normc.backends.settle import Maker, Measured, Report
from normc.backends.tile_choice import Schedule, candidates, wider
from normc.backends.tuned import Trial, preferred, remember, show
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.plan import Kernel
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

MACHINE = replace(MACHINES["sm_90"], name="NVIDIA H100 80GB HBM3")
GEOMETRY = Geometry.of((32, 64, 56, 56), 32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with config.override(cache_dir=tmp_path / "cache", cache=True, tune=False):
        yield tmp_path / "cache" / "tuned"


def job_of(
    name: str = "evonorm_s0", dtype: str = "float32", order: Any = CHANNELS_FIRST, part: int = 0
) -> tuple[Job, Kernel]:
    job = all_jobs(normc.zoo[name], Target("triton", dtype, order))[part]
    return job, job.plan.kernels[0]


def offer(job: Job, kernel: Kernel, geometry: Geometry = GEOMETRY) -> list[Schedule]:
    found = candidates(job, kernel, geometry, MACHINE)
    assert len(found) > 2
    return found


def measured(schedules: list[Schedule], best: int) -> list[Trial]:
    return [Trial(s, 10.0 if i == best else 20.0 + i, 1e-7, "y") for i, s in enumerate(schedules)]


def record(best: int = -1, wide: bool = False, **kind: Any) -> Schedule:
    """Put a kernel on record; what was the fastest."""
    job, kernel = job_of(**kind)
    offered = offer(job, kernel)
    schedules = list(map(wider, offered)) if wide else offered
    best %= len(schedules)
    remember(job, kernel, GEOMETRY, MACHINE, measured(schedules, best))
    return schedules[best]


def chosen(
    machine: Machine = MACHINE, geometry: Geometry = GEOMETRY, **kind: Any
) -> list[Schedule]:
    job, kernel = job_of(**kind)
    return preferred(candidates)(job, kernel, geometry, machine)


def usual(geometry: Geometry = GEOMETRY, **kind: Any) -> list[Schedule]:
    return candidates(*job_of(**kind), geometry, MACHINE)


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.json")
    return found


# --- what comes of it -----------------------------------------------------------------------------


def test_without_a_record_nothing_changes(folder: Path) -> None:
    assert chosen() == usual()
    assert not folder.exists()


@pytest.mark.parametrize("wide", [False, True], ids=["as offered", "wider"])
def test_the_fastest_comes_first_and_the_rest_as_before(wide: bool) -> None:
    best = record(wide=wide)
    first, *rest = chosen()
    assert isinstance(first, Measured) and first == best
    assert rest == [s for s in usual() if s != best]


def test_another_kind_is_as_before() -> None:
    record()
    other = Geometry.of((32, 64, 56, 57), 32)
    assert chosen(geometry=other) == usual(other)
    for kind in (
        {"dtype": "bfloat16"},
        {"order": CHANNELS_LAST},
        {"name": "rms_norm"},
        {"part": 1},
    ):
        assert chosen(**kind) == usual(**kind)
    for machine in (replace(MACHINE, name="NVIDIA H200"), replace(MACHINE, processors=114)):
        assert chosen(machine) == candidates(*job_of(), GEOMETRY, machine)


def test_what_a_plan_saves_makes_it_another() -> None:
    job, kernel = job_of()
    record()
    bare = replace(job, plan=replace(job.plan, saved=()))
    assert tuned.digest(bare) != tuned.digest(job) != tuned.digest(replace(job, unit=False))
    found = preferred(candidates)(bare, kernel, GEOMETRY, MACHINE)
    assert not isinstance(found[0], Measured)


def test_a_formula_under_another_name_is_the_same() -> None:
    best = record()
    job, kernel = job_of()
    other = replace(job, name="mine")
    assert preferred(candidates)(other, kernel, GEOMETRY, MACHINE)[0] != best  # has other kernels
    assert tuned.told(preferred(candidates)(other, kernel, GEOMETRY, MACHINE)[0]) == tuned.told(
        best
    )


def test_a_new_measurement_takes_the_place_of_the_old(folder: Path) -> None:
    record(0)
    best = record(1)
    assert chosen()[0] == best
    assert len(json.loads(the_file(folder).read_text())["entries"]) == 1


def test_who_is_refused_is_never_chosen(folder: Path) -> None:
    job, kernel = job_of()
    first, second, *rest = offer(job, kernel)
    trials = [Trial(first, refused="y is off by 3.0e-01"), Trial(second, 30.0, 1e-7, "y")]
    remember(job, kernel, GEOMETRY, MACHINE, [*trials, *(Trial(s, refused="wrong") for s in rest)])
    assert chosen()[0] == second
    (entry,) = json.loads(the_file(folder).read_text())["entries"]
    assert "y is off by 3.0e-01" in [t.get("refused") for t in entry["others"]]
    remember(
        job, kernel, GEOMETRY, MACHINE, [Trial(s, refused="wrong") for s in offer(job, kernel)]
    )
    assert chosen() == usual() and not isinstance(chosen()[0], Measured)
    assert json.loads(the_file(folder).read_text())["entries"][0]["winner"] is None


def test_a_choice_that_was_made_already_is_kept() -> None:
    record(0, wide=True)
    job, kernel = job_of()
    fixed = [Measured(offer(job, kernel)[0])]  # on trial, while its wider form is on record
    found = preferred(lambda *_: fixed)(job, kernel, GEOMETRY, MACHINE)  # type: ignore[arg-type]
    assert found == fixed


def test_without_a_cache_no_record_is_read(folder: Path) -> None:
    record()
    with config.override(cache=False):
        assert chosen() == usual()
        best = record(0)
        assert chosen()[0] == best, "what this process has measured, it uses"
    assert chosen()[0] != best
    assert len(list(folder.glob("*.json"))) == 1


# --- where it is asked ----------------------------------------------------------------------------


def test_a_gpu_follows_the_record_and_machine_code_ahead_of_time_does_not() -> None:
    pytest.importorskip("triton")
    best = record()
    assert triton.TritonBackend().choose is triton.usual
    found = triton.usual(*job_of(), GEOMETRY, MACHINE)
    if triton.interpreted():
        assert found == usual()
    else:
        assert isinstance(found[0], Measured) and found[0] == best
    assert triton.compile_ahead.__defaults__[-1] is candidates  # type: ignore[index]


class Counting:
    """A compiler: wide programs spill less, and some can never run all at once."""

    def __init__(self, together: bool = True) -> None:
        self.machine = MACHINE if together else replace(MACHINE, registers=0, processors=1)
        self.made: list[int] = []

    def settled(self, schedules: list[Schedule]) -> list[int]:
        """The warps of what is launched."""
        job, kernel = job_of()
        job = replace(job, plan=replace(job.plan, kernels=(kernel,)))
        kind: Any = type("Kind", (), {"job": job, "geometry": GEOMETRY, "steps": STEPS})
        maker = Maker(kind, self.machine, 1e-5, self.functions, self.make, self.report)
        return [launch.warps for launch, _ in maker.settled(lambda *_: schedules, "")]

    def functions(self, job: Job, schedule: Schedule) -> Any:
        return type("Module", (), {"__getattr__": lambda self, name: name})()

    def make(self, function: Any, launch: Any) -> int:
        self.made.append(launch.warps)
        return launch.warps

    def report(self, made: int) -> Report:
        return Report(128, 64 // made, 0)


STEPS = dict.fromkeys(("x", "y"), (64 * 56 * 56, 2 * 56 * 56, 56 * 56, 1))


def test_what_was_measured_is_taken_even_if_it_spills() -> None:
    (schedule, *_) = (s for s in offer(*job_of()) if s[0].form.schedule == "streaming")
    few = tuple(replace(c, warps=4) for c in schedule)
    assert Counting().settled([few]) == [8]  # spills half as much
    assert Counting().settled([Measured(few), wider(few)]) == [4]


def test_what_cannot_run_any_more_is_passed_over() -> None:
    found = offer(*job_of())
    (cluster, *_) = (s for s in found if s[0].form.schedule == "cluster")
    (loops, *_) = (s for s in found if s[0].form.schedule == "streaming")
    meets = tuple(replace(c, blocks=tuple(together(c.blocks))) for c in cluster)
    assert Counting(False).settled([Measured(meets), Measured(loops)]) == [loops[0].warps]
    alone = Counting(False)
    with pytest.raises(AssertionError, match="can be launched"):
        alone.settled([Measured(meets)])
    assert set(alone.made) == {meets[0].warps}, "on trial is this one and no wider"


def together(blocks: tuple[tuple[str, int], ...]) -> Iterator[tuple[str, int]]:
    """Extents with which two programs share an instance."""
    for name, n in blocks:
        yield name, 2 if name.startswith(("PARTS", "MERGE")) else n


@pytest.mark.aot
def test_machine_code_of_what_was_measured_has_its_warps() -> None:
    job, kernel = job_of()
    (best, *_) = (s for s in offer(job, kernel) if s[0].form.schedule == "streaming")
    with config.override(cache_dir=os.environ["NORMC_CACHE_DIR"]):
        choose = lambda *_: [Measured(wider(best))]  # noqa: E731
        made = triton.compile_ahead(job, "sm_90", GEOMETRY, choose=choose)
    assert made[best[0].form.name].launch.warps == 2 * best[0].warps


# --- what it looks like ---------------------------------------------------------------------------


def test_a_person_can_read_it(folder: Path) -> None:
    best = record()
    path = the_file(folder)
    assert path.name == f"NVIDIA-H100-80GB-HBM3-132-triton-{tuned.versions()['triton']}.json"
    text = path.read_text()
    data = json.loads(text)
    assert data["machine"] == "NVIDIA H100 80GB HBM3, 132 processors"
    (entry,) = data["entries"]
    assert entry["formula"] == normc.zoo["evonorm_s0"].text
    assert (entry["part"], entry["kernel"], entry["dtype"]) == ("forward", "k0", "float32")
    assert entry["sizes"] == {"N": 32, "G": 32, "K": 2, "S": 3136} and entry["order"] == "NGKS"
    assert entry["winner"]["schedule"] == best[0].form.schedule
    assert entry["winner"]["launches"][0]["warps"] == best[0].warps
    assert entry["winner"]["launches"][0]["blocks"] == dict(best[0].blocks)
    assert (entry["winner"]["us"], entry["winner"]["error"]) == (10.0, 1e-7)
    assert [t["us"] for t in entry["others"]] == sorted(t["us"] for t in entry["others"])
    assert entry["versions"].keys() == {"normc", "torch", "triton"} and len(entry["date"]) == 10
    assert max(map(len, text.splitlines())) < 300
    assert '"sizes": {"N": 32, "G": 32, "K": 2, "S": 3136}' in text


def test_its_text_does_not_depend_on_the_order_of_writing(folder: Path) -> None:
    kinds = [{"name": n, "dtype": d} for n in ("rms_norm", "evonorm_s0") for d in ("float32",)]
    kinds += [{"name": "evonorm_s0", "dtype": "bfloat16"}, {"name": "evonorm_s0", "part": 1}]
    texts: set[str] = set()
    for order in (kinds, kinds[::-1], [*kinds, *kinds]):
        for kind in order:
            record(**kind)
        texts.add(the_file(folder).read_text())
        the_file(folder).unlink()
    (text,) = texts
    entries = json.loads(text)["entries"]
    keys = [(e["formula"], e["part"], e["kernel"], e["dtype"]) for e in entries]
    assert keys == sorted(keys) and len(keys) == len(kinds)


def test_schedules_have_lines_of_their_own() -> None:
    every = [s for one in offer(*job_of()) for s in (one, wider(one))]
    assert len({show(s) for s in every}) == len({json.dumps(tuned.told(s)) for s in every})
    assert any(show(s).startswith("split BLOCK_N=") for s in every)


def test_the_oldest_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_file, "MOST", 2)
    for dtype in ("float32", "float16"):
        record(dtype=dtype)
    change(folder, lambda data: data["entries"][1].update(date="1999-12-31"))
    record(dtype="bfloat16")
    found = {e["dtype"] for e in json.loads(the_file(folder).read_text())["entries"]}
    assert found == {"float16", "bfloat16"}


# --- what it survives -----------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    path = the_file(folder)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edited(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        change(path.parent, edit)

    return harm


def winner(data: Any) -> Any:
    return data["entries"][0]["winner"]


def blocks(data: Any) -> Any:
    return winner(data)["launches"][0]["blocks"]


STALE: dict[str, Callable[[Any], object]] = {
    "a schedule of old": lambda d: winner(d).update(schedule="persistent"),
    "another extent": lambda d: blocks(d).update(BLOCK_N=3),
    "a block more": lambda d: blocks(d).update(BLOCK_Q=1),
    "a block less": lambda d: blocks(d).pop("BLOCK_N"),
    "other warps": lambda d: winner(d)["launches"][0].update(warps=7),
    "no launches": lambda d: winner(d).update(launches=[]),
    "no winner": lambda d: d["entries"][0].update(winner=None),
    "an older normc": lambda d: d["entries"][0]["versions"].update(normc="0.0.1"),
    "a text to run": lambda d: blocks(d).update({"__import__('os').abort()": 1}),
}


@pytest.mark.parametrize("edit", STALE.values(), ids=STALE)
def test_what_fits_nothing_on_offer_changes_nothing(
    folder: Path, edit: Callable[[Any], object]
) -> None:
    record()
    change(folder, edit)
    assert chosen() == usual()
    assert the_file(folder), "a record it still is"
    best = record(1)
    assert chosen()[0] == best


ODD: dict[str, Callable[[Any], object]] = {
    "no object": lambda d: d["entries"].insert(0, "text"),
    "no winner": lambda d: d["entries"][0].pop("winner"),
    "no versions": lambda d: d["entries"][0].pop("versions"),
    "a number for a text": lambda d: d["entries"][0].update(formula=1),
    "a text for a number": lambda d: blocks(d).update(BLOCK_N="1"),
    "true for a number": lambda d: blocks(d).update(BLOCK_N=True),
    "a list for a number": lambda d: winner(d).update(us=[1.0]),
    "not a number": lambda d: winner(d).update(us=float("nan")),
    "launches are none": lambda d: winner(d).update(launches={"blocks": 1}),
    "sizes are none": lambda d: d["entries"][0].update(sizes=[1, 2, 3, 4]),
    "others are none": lambda d: d["entries"][0].update(others=None),
}


@pytest.mark.parametrize("edit", ODD.values(), ids=ODD)
def test_an_odd_entry_is_left_out_and_the_others_stay(
    folder: Path, edit: Callable[[Any], object]
) -> None:
    record()
    change(folder, edit)
    assert (chosen() == usual()) == (edit is not ODD["no object"])
    change(folder, lambda d: d["entries"].reverse())
    best = record(name="rms_norm")
    assert chosen(name="rms_norm")[0] == best
    change(folder, lambda d: d["entries"].append(d["entries"][0] | {"notes": [[["mine"]]]}))
    record(dtype="float16")
    assert "notes" not in the_file(folder).read_text()
    assert chosen(name="rms_norm")[0] == best


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-30]),
    "bytes": lambda p: p.write_bytes(bytes(range(256))),
    "no object": lambda p: p.write_text("[]"),
    "a number": lambda p: p.write_text("1" * 10_000),
    "deep": lambda p: p.write_text("[" * 1_000_000),
    "huge": lambda p: p.write_bytes(p.read_bytes() + b" " * tuned_file.LARGEST),
    "foreign": lambda p: p.write_text('{"configs": {"BLOCK_N": 64}}'),
    "another format": edited(lambda d: d.update(format="normc-tuned-2")),
    "entries are none": edited(lambda d: d.update(entries={"a": 1})),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_set_aside(
    folder: Path, harm: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    record()
    path = the_file(folder)
    harm(path)
    with config.override(debug=1):
        assert chosen() == usual() == chosen()
    assert capsys.readouterr().err.count("is set aside") == 1
    assert not path.exists() and path.with_suffix(".broken").exists()
    best = record(1)
    assert chosen()[0] == best


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_written_anew(folder: Path, harm: Callable[[Path], object]) -> None:
    record()
    harm(the_file(folder))
    best = record(1)
    assert chosen()[0] == best
    assert len(list(folder.glob("*.broken"))) == 1


@pytest.mark.parametrize("call", ["replace", "open", "mkdir"])
def test_what_cannot_be_written_is_forgotten(
    folder: Path, call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    config.cache_dir().mkdir(mode=0o700)
    with monkeypatch.context() as patch, config.override(debug=1):
        patch.setattr(os, call, refuse)
        record()
    assert "cannot be put on record" in capsys.readouterr().err
    assert chosen() == usual()
    assert not folder.exists() or not list(folder.glob("*.tmp"))
    best = record()
    assert chosen()[0] == best


def test_a_cache_of_somebody_else_changes_nothing(folder: Path) -> None:
    record()
    folder.parent.chmod(0o777)
    assert chosen() == usual()
    record()
    folder.parent.chmod(0o700)
    assert isinstance(chosen()[0], Measured)


# --- many at once ---------------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["normc.backends.tuned", "normc.ops.explain", "pytest"])
WRITERS, EACH = 4, 6


def _write(root: str, who: int) -> None:
    job, kernel = job_of()
    schedules = candidates(job, kernel, GEOMETRY, MACHINE)
    with config.override(cache_dir=root, cache=True):
        for i in range(EACH):
            other = Geometry.of((1 + i, 64, 5, 10 + who), 32)
            remember(job, kernel, other, MACHINE, measured(schedules, 0))


def test_of_many_writers_nobody_loses_anything(folder: Path) -> None:
    record()
    stop, wrong = threading.Event(), list[object]()

    def read() -> None:
        with config.override(cache_dir=folder.parent, cache=True):
            while not stop.is_set():
                if not isinstance(chosen()[0], Measured):
                    wrong.append("gone")

    reader = threading.Thread(target=read)
    reader.start()
    writers = [SERVER.Process(target=_write, args=(str(folder.parent), i)) for i in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert [w.exitcode for w in writers] == [0] * WRITERS
    assert not wrong
    found = {
        tuple(e["sizes"].values()) for e in json.loads(the_file(folder).read_text())["entries"]
    }
    assert len(found) == WRITERS * EACH + 1
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".lock"]
