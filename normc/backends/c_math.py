"""Vector mathematics for the C backend: float32 functions that a compiler turns into SIMD by
itself.

Each is branch-free, so that `#pragma omp simd` vectorises it, and uses explicit fused
multiply-adds, so that it gives the same bits in a vector, in a loop's remainder and in every kernel
it appears in. The polynomials are our own least-maximum fits on the reduced ranges; the errors in
the comments are measured against float64 by tests/backends/test_c_math.py. NaN and infinities are
as in libm. Float64 goes to libm, whose scalar functions have the same property.
"""

from __future__ import annotations

import re

_BITS = """\
static inline float float_(int i) { union { int i; float f; } u = {i}; return u.f; }
static inline int bits_(float f) { union { float f; int i; } u; u.f = f; return u.i; }"""

_CLAMP = """\
static inline float clamp_(float x, int low, int high) {  /* bits of a bound < 0 and one > 0 */
  const int top = bits_(x) < high ? bits_(x) : high;  /* a minimum of integers stays one */
  const unsigned u = top;
  return float_(u < (unsigned)low ? u : (unsigned)low);
}"""

_CURVE = """\
static inline float curve_(float r) {  /* (exp(r) - 1)/r for |r| <= log(2)/2 */
  float p = fma_(0.00139505942f, r, 0.0083689543f);
  p = fma_(p, r, 0.0416662042f);
  p = fma_(p, r, 0.166665183f);
  p = fma_(p, r, 0.50000001f);
  return fma_(p, r, 1.0f);
}"""

_EXP = """\
static inline float exp_(float x) {  /* 1 ulp */
  const float c = clamp_(x, 0xc2d00000, 0x42b20000);  /* -104, 89 */
  const float n = fma_(c, 1.44269504f, 12582912.0f) - 12582912.0f;  /* nearest integer */
  const float r = fma_(n, -1.42860677e-6f, fma_(n, -0.693145752f, c));
  const float p = fma_(curve_(r), r, 1.0f);
  const int i = (int)n, half = i >> 1;  /* two factors reach denormals and overflow */
  const float y = p*float_((half + 127) << 23)*float_((i - half + 127) << 23);
  return x != x ? x : y;
}"""

_EXPM1 = """\
static inline float expm1_(float x) {  /* 2 ulp */
  const float c = clamp_(x, 0xc2000000, 0x42b20000);  /* -32, 89 */
  const float t = fma_(c, 1.44269504f, 12582911.0f), n = t - 12582911.0f;
  const float r = fma_(n, -1.42860677e-6f, fma_(n, -0.693145752f, c));
  const float half = float_(0x3f800000 + (bits_(t) << 23));  /* 2**(n - 1), for exp may overflow */
  const float y = 2.0f*fma_(half, curve_(r)*r, half - 0.5f);
  return __builtin_fabsf(x) > 2e-8f ? y : x;
}"""

_LOG = """\
static inline float log_(float x) {  /* 1 ulp */
  const int tiny = x < 1.17549435e-38f;  /* denormals are scaled up first */
  const float y = tiny ? x*8388608.0f : x;
  const int i = bits_(y) - 0x3f3504f3;  /* exponent, with the mantissa in [sqrt(1/2), sqrt(2)) */
  const float e = (float)(i >> 23) - (tiny ? 23.0f : 0.0f);
  const float f = float_((i & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float p = fma_(0.0674648969f, f, -0.116756153f);
  p = fma_(p, f, 0.118882118f);
  p = fma_(p, f, -0.124055979f);
  p = fma_(p, f, 0.142195464f);
  p = fma_(p, f, -0.166679952f);
  p = fma_(p, f, 0.20002119f);
  p = fma_(p, f, -0.250000096f);
  p = fma_(p, f, 0.333333126f);
  const float f2 = f*f, tail = fma_(e, -2.12194440e-4f, f2*f*p);
  const float value = fma_(e, 0.693359375f, f + fma_(-0.5f, f2, tail));
  const float inf = __builtin_inff();
  return x > 0.0f && x < inf ? value : x == 0.0f ? -inf : x == inf ? inf : __builtin_nanf("");
}"""

_LOG1P = """\
static inline float log1p_(float x) {  /* 2 ulp */
  const float u = 1.0f + x, lost = x - (u - 1.0f), value = log_(u);
  return u > 0.0f && u < __builtin_inff() ? value + lost/u : value;
}"""

_SIGMOID = """\
static inline float sigmoid_(float x) {  /* 3 ulp; 0 instead of a denormal */
  const float c = clamp_(x, 0xc2b20000, 0x42ae0000);  /* -89, 87 */
  const float t = fma_(c, -1.44269504f, 12582911.0f), n = t - 12582911.0f;
  const float r = fma_(n, -1.42860677e-6f, fma_(n, -0.693145752f, -c));
  const float half = float_(bits_(fma_(curve_(r), r, 1.0f)) + (bits_(t) << 23));  /* exp(-x)/2 */
  const float y = 1.0f/fma_(half, 2.0f, 1.0f);
  return x != x ? x : y;
}"""

_TANH = """\
static inline float tanh_(float x) {  /* 3 ulp */
  const float c = clamp_(x, 0xc1200000, 0x41200000)*2.0f;  /* -10, 10 */
  const float t = fma_(c, 1.44269504f, 12582912.0f), n = t - 12582912.0f;
  const float r = fma_(n, -1.42860677e-6f, fma_(n, -0.693145752f, c));
  const float power = float_(0x3f800000 + (bits_(t) << 23));
  const float e = fma_(power, curve_(r)*r, power - 1.0f);  /* exp(2*x) - 1 */
  const float y = e/(e + 2.0f);
  return __builtin_fabsf(x) > 1e-4f ? y : x;
}"""

_ERF = """\
static inline float erf_(float x) {  /* 3 ulp */
  const float a = __builtin_fabsf(x), z = x*x, c = a > 4.0f ? 4.0f : a;
  float p = fma_(8.53883162e-05f, z, -0.000818192546f);
  p = fma_(p, z, 0.00520443586f);
  p = fma_(p, z, -0.0268607527f);
  p = fma_(p, z, 0.112837197f);
  p = fma_(p, z, -0.376126353f);
  p = fma_(p, z, 1.12837917f);
  float g = fma_(-0.000197185749f, c, 0.00305564416f);  /* -log(erfc(c)) */
  g = fma_(g, c, -0.0222772223f);
  g = fma_(g, c, 0.10403762f);
  g = fma_(g, c, 0.637059479f);
  g = fma_(g, c, 1.12774971f);
  g = fma_(g, c, 0.000177460713f);
  return a < 0.9f ? p*x : __builtin_copysignf(1.0f - exp_(-g), x);
}"""

_FMA = "static inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }"

_TEXTS = {
    "fma_": _FMA,
    "float_": _BITS,
    "clamp_": _CLAMP,
    "curve_": _CURVE,
    "exp_": _EXP,
    "expm1_": _EXPM1,
    "sigmoid_": _SIGMOID,
    "log_": _LOG,
    "log1p_": _LOG1P,
    "tanh_": _TANH,
    "erf_": _ERF,
}
"""Every function with its text, each after those it calls."""

FUNCTIONS = ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "erf")
"""Primitives that are spelled here in float32, as ``exp_(x)``."""


def called(code: str) -> set[str]:
    """The names of the functions that a text calls."""
    return set(re.findall(r"(\w+)\(", code))


def definitions(code: str) -> str:
    """The texts of the functions that ``code`` calls, directly or not, in order."""
    known, wanted = called(code), list[str]()
    for name in reversed(_TEXTS):
        if name in known:
            wanted.insert(0, _TEXTS[name])
            known |= called(_TEXTS[name])
    return "\n".join(wanted)
