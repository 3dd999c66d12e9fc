"""Kernels compiled to machine code for GPUs that are not there."""

import re
from math import prod

import pytest

import normc
from normc.backends import triton
from normc.backends.gpus import MACHINES
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST
from tests.backends.ptx import accesses
from tests.layers import LEADERS

pytestmark = pytest.mark.aot

README = "x*sigmoid(v*x)/group_std(x)"
EVERY_FUNCTION = (
    "tanh(x) + atan(x) + expm1(x) + log1p(abs(x)) + abs(x)**v + sign(x)*sin(x)*cos(x) + erf(x)"
    " + max(x, v) + instance_max(x) + instance_min(x) + log(2) + where(x > 0.3, x, sqrt(eps))"
)


def compiled(text, target, dtype="float32", order=CHANNELS_FIRST, geometry=None):
    f = normc.zoo[text] if text in normc.zoo else normc.parse(text)
    found = {}
    for job in all_jobs(f, Target("triton", dtype, order)):
        found |= triton.compile_ahead(job, target, geometry)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", ["evonorm_s0", "evonorm_b0", README])
def test_hopper_spills_nothing_and_reads_in_vectors(text, dtype):
    made = compiled(text, "sm_90", dtype)
    assert len(made) >= 2
    for name, kernel in made.items():
        assert kernel.binary[:4] == b"\x7fELF"
        assert kernel.spills == 0, name
        assert 16 <= kernel.registers <= 255
        assert not re.search(r"(atom|red)\S*\.f(16|32|64)", kernel.text), "results would vary"
        assert ".f64" not in kernel.text, "a number slipped in as float64"
        assert "fma." not in kernel.text, "products and sums are contracted"
        if "x" in kernel.launch.tensors:
            found = accesses(kernel.text, kernel.launch.tensors.index("x"))
            assert found and {access.bytes for access in found} == {16}


SHAPE = Geometry.of((32, 256, 28, 28), 32)
TWENTY = (
    *("batch_norm", "layer_norm", "layer_norm_tokens", "group_norm", "instance_norm", "rms_norm"),
    *("evonorm_b0", "evonorm_s0", "frn_tlu", "bn_relu", "gn_silu", "dyt", "grn", "add_rms_norm"),
    *("ada_layer_norm", "batch_instance_norm", README),
    "tanh(x)*sigmoid(v*x)/group_std(x)*gamma + beta",
    "x*group_max(x) + gamma*channel_min(v*x)",
    "input residual; h = gelu(x) + residual; (h - layer_mean(h))/batch_group_std(h), h",
)


def on_targets():
    """Twenty formulas for every GPU; in `make test` for two each, the next for the others."""
    for i, text in enumerate(TWENTY):
        for j, target in enumerate(triton.TARGETS):
            marks = (pytest.mark.thorough,) if (i + j) % 2 else ()
            yield pytest.param(text, target, marks=marks)


@pytest.mark.parametrize(("text", "target"), list(on_targets()))
def test_twenty_formulas_become_machine_code(text, target):
    made = compiled(text, target, geometry=SHAPE)
    assert len(made) >= 2
    for kernel in made.values():
        assert kernel.binary[:4] == b"\x7fELF" and kernel.registers > 0


LOCAL = {"pointwise_satursin"}  # the sine of large angles keeps a table in local memory


def in_turns():
    """Every layer, dtype and order in memory; in `make test` two of the four for each layer whose
    plan no other has, and the other two for the next; one for each of the rest."""
    for i, name in enumerate(normc.zoo):
        for j, dtype in enumerate(["float32", "bfloat16"]):
            for k, order in enumerate([CHANNELS_FIRST, CHANNELS_LAST]):
                now = (i + j + k) % 2 == 0 and (name in LEADERS or j == 0)
                marks = () if now else (pytest.mark.thorough,)
                tag = f"{name}-{dtype}-{('first', 'last')[k]}"
                yield pytest.param(name, dtype, order, marks=marks, id=tag)


@pytest.mark.parametrize(("name", "dtype", "order"), list(in_turns()))
def test_no_layer_of_the_zoo_spills_on_hopper(name, dtype, order):
    made = compiled(name, "sm_90", dtype, order, SHAPE)
    assert all(kernel.binary[:4] == b"\x7fELF" for kernel in made.values())
    spilled = {kernel_name: k.spills for kernel_name, k in made.items() if k.spills}
    assert spilled == {} or name in LOCAL


def reads(text, dtype, schedule, argument="x", geometry=SHAPE):
    """For each kernel under a schedule: its reads of x, their bytes, those of the (first) tile."""
    with triton.forced(schedule):
        made = compiled(text, "sm_90", dtype, geometry=geometry)
    width = 4 if dtype == "float32" else 2
    for kernel in made.values():
        if kernel.launch.schedule == schedule and argument in kernel.launch.tensors:
            found = accesses(kernel.text, kernel.launch.tensors.index(argument))
            blocks = kernel.launch.constants.items()
            tile = width * prod(n for name, n in blocks if re.match(r"BLOCK_[A-Z]0?$", name))
            yield found, 32 * kernel.launch.warps * sum(access.bytes for access in found), tile


ONCE = (
    "batch_norm",
    "instance_norm",
    "group_norm",
    "evonorm_s0",
    "frn_tlu",
    "bn_relu",
    "dyt",
    README,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", ONCE)
def test_on_chip_x_is_read_once_in_vectors_of_16_bytes(text, dtype):
    """Counted in the code of a kernel without loops: what a program reads is its tile."""
    found = list(reads(text, dtype, "resident"))
    assert found
    for accessed, total, tile in found:
        assert {access.bytes for access in accessed} == {16}
        assert total == tile


def test_the_count_notices_a_second_read():
    for _, total, tile in reads("evonorm_s0", "float32", "streaming"):
        assert total == 2 * tile  # statistics, then results: x again


@pytest.mark.parametrize("schedule, geometry", [("cluster", (16, 64, 512, 512)),
                                                ("split", (1, 32, 1024, 1024)),
                                                ("streaming", (512, 64, 160, 160))])  # fmt: skip
def test_every_schedule_reads_vectors(schedule, geometry):
    for dtype in ("float32", "bfloat16"):
        found = list(reads("evonorm_s0", dtype, schedule, geometry=Geometry.of(geometry, 32)))
        assert found
        for accessed, _, _ in found:
            assert {access.bytes for access in accessed} == {16}


def test_half_precision_divides_nothing_per_element():
    ((kernel,), (wide,)) = (
        [k for n, k in compiled("x*sigmoid(x)", "sm_90", dtype).items() if "forward" in n]
        for dtype in ("bfloat16", "float32")
    )
    division = re.compile(r"div\S*\.f32")
    assert "rsqrt.approx" in kernel.text and not division.search(kernel.text)
    assert division.search(wide.text), "float32 keeps its accuracy"


def test_sizes_whose_rows_are_not_multiples_of_16_are_read_in_shorter_vectors():
    """14 x 14 positions: rows of 784 bytes, which are multiples of 16."""
    geometry = Geometry.of((32, 256, 14, 14), 32)
    for accessed, _, _ in reads("instance_norm", "float32", "resident", geometry=geometry):
        assert {access.bytes for access in accessed} == {16}


def test_programs_of_a_cluster_meet_and_are_launched_whole():
    with triton.forced("cluster"):
        made = compiled("batch_norm", "sm_90", geometry=Geometry.of((64, 256, 56, 56), 32))
    kernel = made["batch_norm_forward_k0_cluster"]
    launch, machine = kernel.launch, MACHINES["sm_90"]
    assert launch.parts > 1 and launch.meets == 1 and launch.programs % launch.parts == 0
    assert launch.programs <= machine.residents(kernel.registers, launch.warps, kernel.shared)
    assert launch.options(hip=False)["launch_cooperative_grid"]
    assert "acq_rel.gpu" in kernel.text.replace("gpu.acq_rel", "acq_rel.gpu")
    assert not re.search(r"(atom|red)\S*\.f(16|32|64)", kernel.text)


def test_a_cluster_that_does_not_fit_is_split_instead():
    geometry = Geometry.of((64, 4, 1024, 1024), 1)  # 67 million elements a channel
    with triton.forced("cluster"):
        made = compiled("batch_norm", "sm_90", geometry=geometry)
    assert {k.launch.schedule for n, k in made.items() if "_k0" in n} == {"split", "finish"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", ["evonorm_s0", "evonorm_b0", README])
def test_amd(text, dtype):
    for name, kernel in compiled(text, "gfx942", dtype).items():
        assert kernel.binary[:4] == b"\x7fELF"
        assert ".amdhsa_kernel" in kernel.text
        assert kernel.spills == 0, name
        assert "atomic" not in kernel.text


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("text", ["evonorm_s0", "layer_norm_tokens"])
def test_other_gpus(text, target):
    for kernel in compiled(text, target, order=CHANNELS_LAST).values():
        assert kernel.binary[:4] == b"\x7fELF"
        assert f".target {target}" in kernel.text


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_function(target, dtype):
    assert compiled(EVERY_FUNCTION, target, dtype, geometry=Geometry.of((4, 8, 8, 8), 1))


def test_sums_are_carried_in_registers():
    geometry = Geometry.of((8, 512, 1024), 1, -1)
    made = compiled("layer_norm_tokens", "sm_90", "bfloat16", CHANNELS_LAST, geometry)
    assert {kernel.launch.schedule for kernel in made.values()} == {"resident", "sum"}
    assert all(kernel.spills == 0 for kernel in made.values())


def test_numbers_beyond_32_bits():
    geometry = Geometry.of((256, 64, 512, 512), 32)
    made = compiled("evonorm_s1", "sm_90", "bfloat16", geometry=geometry)
    assert all(k.launch.constants["INDEX"] == "int64" for n, k in made.items() if "_k0" in n)


def test_an_unknown_target_is_refused():
    job = all_jobs(normc.zoo["dyt"], Target("triton", "float32"))[0]
    with pytest.raises(normc.BackendError, match="sm_80, sm_90, sm_100, gfx942"):
        triton.compile_ahead(job, "sm_12")
