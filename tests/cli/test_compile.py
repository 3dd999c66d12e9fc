"""`normc compile`: kernels in a folder, and a manifest that is enough to launch them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normc.backends.triton import TARGETS, forced
from normc.cli import folder, manifest
from normc.cli.main import app

TINY = ("--shape", "2,8,5,3", "--groups", "4", "--no-color")


def run(*args):
    return CliRunner().invoke(app, ["compile", *map(str, args)])


def read(place):
    return json.loads((place / folder.MANIFEST).read_text("utf-8"))


def kernels(found):
    return [kernel for job in found["jobs"] for kernel in job["kernels"]]


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.aot
def test_a_folder_with_a_table(tmp_path):
    result = run("evonorm_s0", "-o", tmp_path / "out", *TINY)
    assert result.exit_code == 0, result.output
    assert "x * sigmoid(v*x) / group_std(x) * gamma + beta" in result.output
    for column in ("kernel", "schedule", "programs", "warps", "registers", "spills", "shared"):
        assert column in result.output
    assert "channels-first, groups 4, eps 1e-05; for sm_90" in result.output
    found = read(tmp_path / "out")
    assert found["format"] == manifest.FORMAT
    assert [job["part"] for job in found["jobs"]] == ["forward", "backward"]
    assert set(found["versions"]) == {"normc", "triton", "torch"}
    for kernel in kernels(found):
        assert kernel["name"].removeprefix("evonorm_s0_") in result.output
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.aot
def test_every_file_is_named_with_its_sum(tmp_path):
    run("evonorm_s0", "-o", tmp_path / "out", *TINY)
    found = read(tmp_path / "out")
    keys = ("source", "binary", "assembly")
    every = [kernel[key] for kernel in kernels(found) for key in keys]
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {f["file"] for f in every} == set(there) - {folder.MANIFEST}
    for f in every:
        content = there[f["file"]]
        assert (f["bytes"], f["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


SIZES = {"i32": 4, "i64": 8}
CASES = [
    # formula, target, dtype, and more
    ("evonorm_s0", "sm_90", "float32", ()),
    ("evonorm_b0", "sm_80", "bfloat16", ("--layout", "channels-last")),
    ("evonorm_s0", "gfx942", "float16", ()),
    ("ada_layer_norm", "sm_90", "float64", ("--channel-dim", "3")),
    ("layer_norm_tokens", "gfx942", "bfloat16", ("--channel-dim", "-1", "--shape", "2,70,64")),
]


@pytest.mark.aot
@pytest.mark.parametrize(("text", "target", "dtype", "more"), CASES, ids=str)
def test_the_arguments_are_those_of_the_machine_code(tmp_path, text, target, dtype, more):
    """Their number and sizes, in order, are read from the assembly."""
    where = tmp_path / "out"
    result = run(text, "-o", where, "--target", target, "--dtype", dtype, "--shape", "2,8,5,4",
                 "--groups", "auto", *more)  # fmt: skip
    assert result.exit_code == 0, result.output
    for job in read(where)["jobs"]:
        tensors = {t["name"]: t for t in job["tensors"]}
        for kernel in job["kernels"]:
            passed = [a for a in kernel["arguments"] if a["kind"] != "constant"]
            sizes = [SIZES.get(a["type"], 8) for a in passed]
            assembly = (where / kernel["assembly"]["file"]).read_text("utf-8")
            assert sizes == manifest.parameters(assembly)
            assert kernel["symbol"].encode() in (where / kernel["binary"]["file"]).read_bytes()
            assert all(a["tensor"] in tensors for a in passed if a["kind"] == "pointer")
        whole = [t for t in tensors.values() if t["name"] in ("x", "y", "d_x")]
        assert whole and all(t["dtype"] == dtype for t in whole)


LAUNCHED = [
    # formula, a schedule for every kernel that has it, and more
    ("evonorm_s0", "resident", ()),
    ("evonorm_b0", "streaming", ("--layout", "channels-last")),
    pytest.param("evonorm_s0", "split", ("--dtype", "float64"), marks=pytest.mark.thorough),
    pytest.param(
        *("add_rms_norm", "resident", ("--channel-dim", "-1", "--shape", "3,6,16")),
        marks=pytest.mark.thorough,
    ),
    ("input scale[n,s]; x*scale/group_rms(x)", "split", ("--channel-dim", "2", "--groups", "1")),
]


@pytest.mark.aot
@pytest.mark.parametrize(("text", "schedule", "more"), LAUNCHED, ids=str)
def test_kernels_are_launched_from_the_manifest_alone(tmp_path, text, schedule, more):
    """By a program that knows nothing else: tests/cli/launch.py, in Triton's interpreter."""
    where = tmp_path / "out"
    with forced(schedule):
        result = run(text, "-o", where, *TINY, *more)
    assert result.exit_code == 0, result.output
    assert schedule in {kernel["schedule"] for kernel in kernels(read(where))}
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("launch.py")), str(where)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all agree" in done.stdout


@pytest.mark.aot
def test_programs_that_wait_for_each_other_are_launched_together(tmp_path):
    """And the counter of those that have come starts at zero."""
    with forced("cluster"):
        result = run("instance_norm", "-o", tmp_path / "out", "--shape", "2,4,256,256")
    assert result.exit_code == 0, result.output
    for job in read(tmp_path / "out")["jobs"]:
        waiting = [kernel for kernel in job["kernels"] if kernel["cooperative"]]
        assert waiting and all(kernel["schedule"] == "cluster" for kernel in waiting)
        counters = {t["name"] for t in job["tensors"] if t["zeros"]}
        for kernel in waiting:
            passed = {a["tensor"] for a in kernel["arguments"] if a["kind"] == "pointer"}
            assert len(counters & passed) == 1


@pytest.mark.aot
def test_epsilon_is_the_zoos_unless_it_is_given(tmp_path):
    for words, eps in (((), 1e-6), (("--eps", "0.25"), 0.25)):
        result = run("rms_norm", "-o", tmp_path / "out", "--shape", "2,8,5,3", *words)
        assert result.exit_code == 0, result.output
        found = read(tmp_path / "out")
        (folded,) = {
            a["value"] for k in kernels(found) for a in k["arguments"] if a["name"] == "EPS"
        }
        assert folded == found["eps"] == eps


@pytest.mark.aot
def test_a_formula_without_a_gradient_has_a_forward_alone(tmp_path):
    result = run("sqrt(2)", "-o", tmp_path / "out", *TINY)
    assert result.exit_code == 0, result.output
    assert [job["part"] for job in read(tmp_path / "out")["jobs"]] == ["forward"]


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    # words after the formula, and what the message says
    (["--target", "sm_12"], "no target is called `sm_12`: sm_80, sm_90, sm_100, gfx942"),
    (["--shape", "2,8,x"], "--shape is '2,8,x'"),
    (["--shape", "2,0,5"], "expected sizes from 1"),
    (["--shape", "8"], "2 to 5 dimensions"),
    (["--shape", "2,8," + "9" * 5000], "expected sizes from 1"),
    (["--shape", "2,8", "--groups", "3"], "use groups=2"),
    (["--groups", "many"], "--groups is 'many': expected a number from 1, or auto"),
    (["--groups", "0"], "groups must be a positive whole number"),
    (["--channel-dim", "4"], "channel_dim=4"),
    (["--eps", "nan"], "expected a finite number"),
    (["-o", "no/such/folder"], "there is no folder"),
    (["-o", __file__], "is a file"),
    (["-o", "."], "name another"),
    (["-o", "/", "--force"], "name another"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda v: " ".join(v)[:40])
def test_a_mistake_is_a_clean_message(tmp_path, words, message):
    result = run("evonorm_s0", "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_help_names_every_target():
    text = run("--help").output
    assert all(target in text for target in TARGETS)


# --- the folder ----------------------------------------------------------------------------------

KIND = "some-kernels-1"


def files(*names):
    """A manifest that names files, and these."""
    record = {"format": KIND, "jobs": [{"source": {"file": name}} for name in names]}
    made = dict.fromkeys(names, b"content")
    return made | {folder.MANIFEST: json.dumps(record).encode()}


def names(place):
    return sorted(path.name for path in place.iterdir())


def test_an_earlier_folder_of_ours_is_replaced(tmp_path):
    out = tmp_path / "out"
    for name in ("a", "b"):
        folder.install(out, files(name), KIND)
        assert names(out) == [name, folder.MANIFEST]
    assert names(tmp_path) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    folder.install(tmp_path / "out", files("a"), KIND)
    assert names(tmp_path / "out") == ["a", folder.MANIFEST]


OTHERS = [
    # what is in the folder that is not ours to take away
    {"thesis.txt": b"years of work"},
    files("a") | {"thesis.txt": b"years of work"},
    {folder.MANIFEST: b"{}"},
    {folder.MANIFEST: b"[" * 100_000},
    {folder.MANIFEST: b'{"format": "another-1", "file": "thesis.txt"}', "thesis.txt": b""},
]


@pytest.mark.parametrize("content", OTHERS, ids=lambda c: " ".join(c)[:30])
def test_the_files_of_others_stay_unless_forced(tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_bytes(text)
    with pytest.raises(ValueError, match="--force"):
        folder.install(out, files("a"), KIND)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content
    folder.install(out, files("a"), KIND, force=True)
    assert names(out) == ["a", folder.MANIFEST]


def test_what_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder.install(out, files("a"), KIND)
    rename = os.rename

    def broken(source, target):
        if Path(source).name == "new":
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(ValueError, match="the disk is gone"):
        folder.install(out, files("b"), KIND)
    assert names(out) == ["a", folder.MANIFEST]
    assert names(tmp_path) == ["out"]


def test_a_link_leads_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    folder.install(tmp_path / "link", files("a"), KIND)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a", folder.MANIFEST]
