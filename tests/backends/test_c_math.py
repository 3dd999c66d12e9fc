"""The C backend's own float32 functions: accuracy against float64, and the same bits everywhere."""

import ctypes
import subprocess

import numpy as np
import pytest
import scipy.special

from normc.backends import c_compiler, c_math

pytestmark = pytest.mark.cpu

ORACLES = {
    "exp": (np.exp, (-104, 89), 1.1),
    "expm1": (np.expm1, (-20, 89), 2.0),
    "log": (np.log, (1e-45, 3e38), 1.0),
    "log1p": (np.log1p, (-0.999999, 3e38), 2.0),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), (-87, 89), 3.0),
    "tanh": (np.tanh, (-12, 12), 3.0),
    "erf": (scipy.special.erf, (-5, 5), 3.0),
}
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.6, 0.9, 1e-45, -1e-45, 1e-20, 88.7, 88.8, -87.4, -103.9]
SPECIAL = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, -2.0, 200.0, -200.0]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loops = [
        f"void v_{n}(const float *x, float *y, long n) {{\n#pragma omp simd\n"
        f"for (long i = 0; i < n; i++) y[i] = {n}_(x[i]); }}"
        for n in c_math.FUNCTIONS
    ]
    code = "\n".join(loops)
    folder = tmp_path_factory.mktemp("math")
    (folder / "m.c").write_text(c_math.definitions(code) + "\n" + code)
    files = ["-o", str(folder / "m.so"), str(folder / "m.c"), "-lm"]
    subprocess.run([c_compiler.compiler(), *c_compiler.flags(), *files], check=True)
    return ctypes.CDLL(str(folder / "m.so"))


def run(library, name, x):
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty_like(x)
    getattr(library, f"v_{name}")(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data),
                                  ctypes.c_long(x.size))  # fmt: skip
    return y


def samples(low, high):
    rng = np.random.default_rng(0)
    line = np.linspace(low, high, 200_001)
    near = rng.normal(size=100_000) * np.array([1e-6, 1e-2, 0.3, 1.5]).repeat(25_000)
    points = np.concatenate([line, near, np.exp(rng.uniform(-100, 88, 100_000)), EDGES])
    points = points[(points >= low) & (points <= high)]
    return points.astype(np.float32)


def ulps(found, exact):
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(found.astype(np.float64) - exact) / unit


@pytest.mark.parametrize("name", ORACLES)
def test_accuracy(library, name):
    oracle, (low, high), limit = ORACLES[name]
    x = samples(low, high)
    found, exact = run(library, name, x), oracle(x.astype(np.float64))
    finite = np.abs(exact) < 3.4028235e38
    worst = ulps(found[finite], exact[finite])
    assert worst.max() <= limit, (x[finite][worst.argmax()], worst.max())


@pytest.mark.parametrize("name", ORACLES)
def test_special_values(library, name):
    x = np.array(SPECIAL * 5, np.float32)
    with np.errstate(all="ignore"):
        want = ORACLES[name][0](x.astype(np.float64)).astype(np.float32)
    found = run(library, name, x)
    assert np.array_equal(np.isnan(found), np.isnan(want)), dict(zip(x, found, strict=True))
    assert np.array_equal(np.isinf(found), np.isinf(want)), dict(zip(x, found, strict=True))


@pytest.mark.parametrize("name", ORACLES)
def test_the_same_bits_in_a_vector_and_alone(library, name):
    x = samples(*ORACLES[name][1])[:4097]
    alone = np.concatenate([run(library, name, x[i : i + 1]) for i in range(0, 4097, 7)])
    assert np.array_equal(run(library, name, x)[::7].view(np.int32), alone.view(np.int32))


def test_only_what_is_called_is_defined():
    assert c_math.definitions("y = x;") == ""
    text = c_math.definitions("y = tanh_(x);")
    assert "curve_(float" in text and "erf_(float" not in text
    assert text.index("fma_") < text.index("curve_") < text.index("tanh_")
