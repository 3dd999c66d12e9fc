"""C spelling: how C writes primitives, in the storage type and in double, and what it declares."""

from __future__ import annotations

import math

from normc.backends import c_math
from normc.backends.emit import Spelling

_ONE = ("exp", "log", "sin", "cos", "tanh", "erf", "atan", "expm1", "log1p")
_FLOAT = (
    {fn: fn + "f({})" for fn in _ONE}
    | {fn: fn + "_({})" for fn in c_math.FUNCTIONS}
    | {
        "sqrt": "__builtin_sqrtf({})",
        "abs": "__builtin_fabsf({})",
        "pow": "powf({}, {})",
        "max": "max_({}, {})",
        "min": "min_({}, {})",
        "sign": "sign_({})",
        "where": "({} ? {} : {})",
    }
)
_DOUBLE = {fn: fn + "({})" for fn in _ONE} | {
    "sqrt": "__builtin_sqrt({})",
    "abs": "__builtin_fabs({})",
    "pow": "pow({}, {})",
    "max": "wmax_({}, {})",
    "min": "wmin_({}, {})",
    "sign": "wsign_({})",
    "where": "({} ? {} : {})",
}


def _number(value: float, suffix: str) -> str:
    if not math.isfinite(value):
        raise AssertionError("constants are finite")
    text = repr(float(value))
    return text + suffix if any(c in text for c in ".e") else text + ".0" + suffix


WIDE = Spelling(_DOUBLE, lambda v: _number(v, ""))
NARROW = Spelling(_FLOAT, lambda v: _number(v, "f"))

TYPES = {"float32": "float", "float64": "double", "bfloat16": "float", "float16": "float"}
"""Storage types, and what is computed in for each."""

HALF = ("bfloat16", "float16")
"""Storage types narrower than what is computed in."""

_PRELUDE = """\
typedef long i64;
typedef {real} real;
typedef double wide;
"""

_LINE = """\
#if defined(__AVX512F__) && !defined(__clang__)
typedef float line __attribute__((vector_size(64), aligned(1), may_alias));
#define STREAM(to, from) __builtin_ia32_movntps512((float *)(to), *(const line *)(from))
#elif defined(__AVX__) && !defined(__clang__)
typedef float line __attribute__((vector_size(32), aligned(1), may_alias));
#define STREAM(to, from) __builtin_ia32_movntps256((float *)(to), *(const line *)(from))
#elif defined(__clang__)
typedef float line __attribute__((vector_size(32), aligned(1), may_alias));
#define STREAM(to, from) __builtin_nontemporal_store(*(const line *)(from), (line *)(to))
#endif"""

_PUT = """\
static __attribute__((noinline))
void put_({store} *restrict to, const real *restrict {wide}, i64 n, int stream) {{
  i64 i = 0;{narrow}
#ifdef STREAM  /* past the cache: lines that are written whole need not be read first */
  const i64 step = sizeof(line)/sizeof({store});
  if (stream && n >= 4*step) {{
    for (; (unsigned long)(to + i) % sizeof(line); i++) to[i] = from[i];
    for (; i + step <= n; i += step) STREAM(to + i, from + i);
  }}
#endif
#pragma omp simd
  for (i64 j = i; j < n; j++) to[j] = from[j];
}}"""

_NARROW = """
  store from[1024];
#pragma omp simd
  for (i64 j = 0; j < n; j++) from[j] = narrow_(wide_from[j]);"""

_HALVES = {
    "bfloat16": """\
static inline float widen_(store h) { return float_((int)h << 16); }
static inline store narrow_(float f) {  /* to nearest, ties to even */
  const unsigned u = bits_(f);
  return f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}""",
    "float16": """\
static inline float widen_(store h) {
  const float f = float_((h & 0x7fff) << 13)*5.19229686e+33f;  /* 2**112 */
  const int i = bits_(f) | (h & 0x8000) << 16;
  return float_((h & 0x7c00) == 0x7c00 ? i | 0x7f800000 : i);
}
static inline store narrow_(float f) {  /* to nearest, ties to even */
  const unsigned u = bits_(f), a = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  const unsigned tiny = bits_(float_(a) + 0.5f) - 0x3f000000;
  const unsigned some = (a + 0xc8000fff + (a >> 13 & 1)) >> 13;
  const unsigned far = a > 0x7f800000 ? 0x7e00 : 0x7c00;
  return sign | (a >= 0x47800000 ? far : a < 0x38800000 ? tiny : some);
}""",
}
"""Conversions of a half between what it is stored in, 16 bits, and float."""

_THREAD = """\
#ifdef _OPENMP
int omp_get_thread_num(void);
static inline i64 thread_(void) { return omp_get_thread_num(); }
#else
static inline i64 thread_(void) { return 0; }
#endif"""

_AHEAD = """\
static inline void ahead_(const void *p, i64 bytes) {
  for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i);
}"""

_HELPERS = {
    "max_": "static inline real max_(real a, real b) { return a > b || a != a ? a : b; }",
    "min_": "static inline real min_(real a, real b) { return a < b || a != a ? a : b; }",
    "sign_": "static inline real sign_(real a) { return (real)((a > 0) - (a < 0)); }",
    "wmax_": "static inline wide wmax_(wide a, wide b) { return a > b || a != a ? a : b; }",
    "wmin_": "static inline wide wmin_(wide a, wide b) { return a < b || a != a ? a : b; }",
    "wsign_": "static inline wide wsign_(wide a) { return (wide)((a > 0) - (a < 0)); }",
    "least": "static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }",
    "thread_": _THREAD,
    "ahead_": _AHEAD,
}  # NaN wins in max and min, as in torch


def _libm(known: set[str]) -> str:
    """Declarations of the libm functions among ``known``."""
    calls = [(n, "a") for n in _ONE] + [("pow", "a, b")]
    lines: list[str] = []
    for name, arguments in calls:
        for function, kind in ((name, "double"), (name + "f", "float")):
            if function in known:
                inside = ", ".join(f"{kind} {a}" for a in arguments.split(", "))
                lines.append(f"{kind} {function}({inside});")
    return "\n".join(lines)


def declarations(code: str, dtype: str) -> str:
    """Types, libm functions, own functions and helpers: no more than ``code`` uses."""
    half = dtype in HALF
    known = c_math.called(code)
    helpers = [text for name, text in _HELPERS.items() if name in known]
    if "put_" in known:
        words = ("store", "wide_from", _NARROW) if half else ("real", "from", "")
        helpers += [_LINE, _PUT.format(store=words[0], wide=words[1], narrow=words[2])]
    conversions = [_HALVES[dtype]] if half else []
    own = "\n".join([code, *conversions])
    types = _PRELUDE.format(real=TYPES[dtype]) + "typedef unsigned short store;\n" * half
    parts = [types + _libm(known), c_math.definitions(own), *conversions, *helpers]
    return "\n".join(part for part in parts if part)
