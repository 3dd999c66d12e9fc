"""Functions which a Triton kernel brings along: what `triton.language` lacks, or spells differently
under its interpreter, for CUDA and for HIP.

They are printed into a source only where it uses them. Accurate to a few units in the last place;
NaN, infinities and signed zeros as in torch. Kernels are compiled without contraction, so `tl.fma`
stands where a fused step is wanted. Coefficients: Cephes Mathematical Library, Stephen L. Moshier
(tanhf.c, atanf.c and, in float64, tanh.c, atan.c, expm1.c).
"""

from __future__ import annotations

_LARGER = '''
@triton.jit
def larger(a, b):
    """The larger of two; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
'''

_SMALLER = '''
@triton.jit
def smaller(a, b):
    """The smaller of two; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
'''

_SIGN = '''
@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype)
'''

_LOG1P = '''
@triton.jit
def log1p(x):
    """log(1 + x): what rounding 1 + x has lost comes back as a factor (W. Kahan)."""
    u = 1.0 + x
    lost = (u == 1.0) | (u == float("inf"))
    return tl.where(lost, x, tl.log(u) * (x / (u - 1.0)))
'''

_EXPM1 = '''
@triton.jit
def expm1(x):
    """exp(x) - 1: a rational function near 0, where the difference would cancel (Cephes)."""
    z = x * x
    p = x * ((1.2617719307481059e-4 * z + 3.0299440770744196e-2) * z + 1.0)
    q = (3.0019850513866446e-6 * z + 2.5244834034968410e-3) * z + 2.2726554820815503e-1
    q = q * z + 2.0
    return tl.where(tl.abs(x) < 0.5, 2.0 * (p / (q - p)), tl.exp(x) - 1.0)
'''

_TANH = '''
@triton.jit
def tanh(x):
    """tanh: a polynomial near 0, where the other form would cancel (Cephes)."""
    a = tl.abs(x)
    z = x * x
    p = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, z, -5.37397155531e-2)
    p = tl.fma(p, z, 1.33314422036e-1)
    p = tl.fma(p, z, -3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, tl.fma(p * z, x, x), tl.where(x < 0.0, -far, far))
'''

_TANH_64 = '''
@triton.jit
def tanh(x):
    """tanh: a rational function near 0, where the other form would cancel (Cephes)."""
    a = tl.abs(x)
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = (z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3
    q = q * z + 4.84406305325125486048e3
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, x + x * z * (p / q), tl.where(x < 0.0, -far, far))
'''

_SIGMOID_16 = '''
@triton.jit
def sigmoid(x):
    """1/(1 + exp(-x)) for half precision: a square of an inverse root takes no division."""
    r = tl.rsqrt(1.0 + tl.exp(-x))
    return r * r
'''

_TANH_16 = '''
@triton.jit
def tanh(x):
    """tanh for half precision: without a division, and two terms of its series near 0."""
    r = tl.rsqrt(tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.05, x - 0.3333333333 * (x * x * x), 1.0 - 2.0 * (r * r))
'''

_ATAN = '''
@triton.jit
def atan(x):
    """atan: brought to [0, tan(pi/8)] by subtracting pi/2 or pi/4, then a polynomial (Cephes)."""
    a = tl.abs(x)
    steep, middle = a > 2.414213562373095, a > 0.4142135623730950
    quarters = tl.where(steep, 2.0, tl.where(middle, 1.0, 0.0)).to(x.dtype)
    r = tl.where(steep, -1.0 / a, tl.where(middle, (a - 1.0) / (a + 1.0), a))
    z = r * r
    p = tl.fma(z, 8.05374449538e-2, -1.38776856032e-1)
    p = tl.fma(tl.fma(p, z, 1.99777106478e-1), z, -3.33329491539e-1)
    y = 0.7853981633974483 * quarters + tl.fma(p * z, r, r)
    return tl.where(x < 0.0, -y, tl.where(x == 0.0, x, y))
'''

_ATAN_64 = '''
@triton.jit
def atan(x):
    """atan: brought to [0, 0.66] by subtracting pi/2 or pi/4, then a rational function (Cephes)."""
    a = tl.abs(x)
    steep, middle = a > 2.41421356237309504880, a > 0.66
    quarters = tl.where(steep, 2.0, tl.where(middle, 1.0, 0.0)).to(x.dtype)
    r = tl.where(steep, -1.0 / a, tl.where(middle, (a - 1.0) / (a + 1.0), a))
    z = r * r
    p = (-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z
    p = ((p - 7.500855792314704667340e1) * z - 1.228866684490136173410e2) * z
    p = p - 6.485021904942025371773e1
    q = (z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2
    q = (q * z + 4.328810604912902668951e2) * z + 4.853903996359136964868e2
    q = q * z + 1.945506571482613964425e2
    y = 0.7853981633974483 * quarters + (r + r * z * (p / q))
    return tl.where(x < 0.0, -y, tl.where(x == 0.0, x, y))
'''

_POWER = '''
@triton.jit
def power(x, y, REAL: tl.constexpr):
    """IEEE 754's pow; its logarithm is taken in float64, which a float32 exponential needs."""
    x = tl.full([], 1.0, tl.float64) * x  # either may be a bare number
    y = tl.full([], 1.0, tl.float64) * y
    x, y = tl.broadcast(x, y)
    a = tl.abs(x)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(0.5 * y) != 0.5 * y)
    value = tl.where((a == 1.0) & (y <= float("inf")), 1.0, tl.exp(y * tl.log(a)))
    value = tl.where(odd & (tl.where(x == 0.0, 1.0 / x, x) < 0.0), -1.0 * value, value)
    value = tl.where((x < 0.0) & (a < float("inf")) & (whole == 0), float("nan"), value)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, value).to(REAL)
'''

_BOTH = {
    "larger": _LARGER,
    "smaller": _SMALLER,
    "sign": _SIGN,
    "log1p": _LOG1P,
    "expm1": _EXPM1,
    "power": _POWER,
}
_16 = {"tanh": _TANH_16, "sigmoid": _SIGMOID_16, "atan": _ATAN}
_BY_TYPE = {
    "float16": _16,
    "bfloat16": _16,
    "float32": {"tanh": _TANH, "atan": _ATAN},
    "float64": {"tanh": _TANH_64, "atan": _ATAN_64},
}
HALVES = ("float16", "bfloat16")


def functions(dtype: str) -> dict[str, str]:
    """The text of every function, for kernels on tensors stored in ``dtype``."""
    return _BOTH | _BY_TYPE[dtype]
