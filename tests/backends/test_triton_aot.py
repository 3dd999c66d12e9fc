"""Kernels compiled to machine code for GPUs that are not there."""

import re

import pytest

import normc
from normc.backends import triton
from normc.language.geometry import Geometry
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST

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
        if "k0" in name:
            assert re.search(r"ld.global.v[24].b32", kernel.text)
            assert re.search(r"st.global.v[24].b32", kernel.text)


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
