"""C spelling: how C writes primitives, in the storage type and in double, and what it declares."""

from __future__ import annotations

import math
import re

from normc.backends import c_math
from normc.backends.emit import Spelling

_ONE = ("exp", "log", "sin", "cos", "tanh", "erf", "atan", "expm1", "log1p")
_FLOAT = {fn: fn + "f({})" for fn in _ONE} | {fn: fn + "_({})" for fn in c_math.FUNCTIONS} | {
    "sqrt": "__builtin_sqrtf({})",
    "abs": "__builtin_fabsf({})",
    "pow": "powf({}, {})",
    "max": "max_({}, {})",
    "min": "min_({}, {})",
    "sign": "sign_({})",
    "where": "({} ? {} : {})",
}
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

_PRELUDE = """\
typedef long i64;
typedef {real} real;
typedef double wide;
"""

_PUT = """\
#if defined(__AVX512F__) && !defined(__clang__)
typedef float line __attribute__((vector_size(64), aligned(4)));
#define STREAM(to, from) __builtin_ia32_movntps512((float *)(to), *(const line *)(from))
#elif defined(__AVX__) && !defined(__clang__)
typedef float line __attribute__((vector_size(32), aligned(4)));
#define STREAM(to, from) __builtin_ia32_movntps256((float *)(to), *(const line *)(from))
#elif defined(__clang__)
typedef float line __attribute__((vector_size(32), aligned(4)));
#define STREAM(to, from) __builtin_nontemporal_store(*(const line *)(from), (line *)(to))
#endif
static inline void put_(real *restrict to, const real *restrict from, i64 n, int stream) {
  i64 i = 0;
#ifdef STREAM  /* past the cache: lines that are written whole need not be read first */
  const i64 step = sizeof(line)/sizeof(real);
  if (stream && n >= 4*step) {
    for (; (unsigned long)(to + i) % sizeof(line); i++) to[i] = from[i];
    for (; i + step <= n; i += step) STREAM(to + i, from + i);
  }
#endif
#pragma omp simd
  for (i64 j = i; j < n; j++) to[j] = from[j];
}"""

_HELPERS = {
    "max_": "static inline real max_(real a, real b) { return a > b || a != a ? a : b; }",
    "min_": "static inline real min_(real a, real b) { return a < b || a != a ? a : b; }",
    "sign_": "static inline real sign_(real a) { return (real)((a > 0) - (a < 0)); }",
    "wmax_": "static inline wide wmax_(wide a, wide b) { return a > b || a != a ? a : b; }",
    "wmin_": "static inline wide wmin_(wide a, wide b) { return a < b || a != a ? a : b; }",
    "wsign_": "static inline wide wsign_(wide a) { return (wide)((a > 0) - (a < 0)); }",
    "least": "static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }",
    "put_": _PUT,
}  # NaN wins in max and min, as in torch


def _libm(text: str) -> str:
    """Declarations of the libm functions that a text calls."""
    calls = [(n, "a") for n in _ONE] + [("pow", "a, b")]
    lines: list[str] = []
    for name, arguments in calls:
        for function, kind in ((name, "double"), (name + "f", "float")):
            if re.search(rf"\b{function}\(", text):
                inside = ", ".join(f"{kind} {a}" for a in arguments.split(", "))
                lines.append(f"{kind} {function}({inside});")
    return "\n".join(lines)


def declarations(code: str, real: str) -> str:
    """Types, libm functions, own functions and helpers: no more than ``code`` uses."""
    helpers = [text for name, text in _HELPERS.items() if re.search(rf"\b{name}\(", code)]
    parts = [_PRELUDE.format(real=real) + _libm(code), c_math.definitions(code), *helpers]
    return "\n".join(part for part in parts if part)
