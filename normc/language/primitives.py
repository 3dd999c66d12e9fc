"""Primitives, long because it is one table: a row for each element-wise function.

A new row is at once parsed, differentiated, spelled by every backend, tested, documented, searched.

A row with ``body=None`` is a *core* function, which every backend spells. Any other row has a body
in core functions (or in rows above it), into which a backend that does not spell it expands it. The
partial derivatives come from sympy (`normc.program.algebra`) unless the row gives its own, stabler
closed form. ``reference`` is the independent oracle in plain torch, ``probe`` the range it is
tested over, ``kinks`` the points where torch's convention for the derivative has to be met:
relu'(0) = 0, abs'(0) = 0, ties of max and min share the gradient equally.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from normc.language.expr import Expr, call, const, var

Body = Callable[..., Expr]
Reference = Callable[..., Any]

COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
"""Comparison operators, allowed as the condition of ``where``, and the primitives they mean."""

OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "**": "pow"}
"""Binary operators and the primitives they mean."""


@dataclass(frozen=True)
class Primitive:
    """One element-wise function."""

    name: str
    args: tuple[str, ...]
    reference: Reference  # (torch, *tensors) -> tensor
    body: Body | None = None  # its definition in core functions; None: a core function itself
    derivative: tuple[Body, ...] | None = None  # one per argument; None: sympy differentiates
    probe: tuple[float, float] = (-4.0, 4.0)  # a range of ordinary arguments, for tests
    kinks: tuple[float, ...] = ()  # arguments at which the convention for the derivative matters
    doc: str = ""
    callable: bool = True  # written as a function in a formula (operators are not)
    dear: bool = False  # of core functions: costs many operations, so is worth keeping

    def expand(self, *args: Expr) -> Expr:
        """The body over the given arguments."""
        assert self.body is not None, f"{self.name} is a core function"
        return self.body(*args)

    def parameters(self) -> tuple[Expr, ...]:
        """Placeholder variables for the arguments, to look at a body or derivative."""
        return tuple(var(name) for name in self.args)


def _fn(name: str) -> Callable[..., Expr]:
    return lambda *args: call(name, *args)


_abs, _sign, _exp, _log, _sqrt = map(_fn, ("abs", "sign", "exp", "log", "sqrt"))
_tanh, _erf, _sin, _cos, _max, _min = map(_fn, ("tanh", "erf", "sin", "cos", "max", "min"))
_where, _lt, _le, _gt, _ge, _eq = map(_fn, ("where", "lt", "le", "gt", "ge", "eq"))
_sigmoid, _softplus, _log1p, _expm1, _pow, _rsqrt = map(
    _fn, ("sigmoid", "softplus", "log1p", "expm1", "pow", "rsqrt")
)

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
_GELU_C = math.sqrt(2 / math.pi)
_POSITIVE = (0.05, 4.0)


def _core(name: str, args: str, reference: Reference, **more: Any) -> Primitive:
    return Primitive(name, tuple(args.split()), reference, **more)


def _zero(*_: Expr) -> Expr:
    return const(0)


def _compare(name: str, operator: str, reference: Reference) -> Primitive:
    doc = f"1 where x {operator} y, else 0; only as the condition of where"
    zero = (_zero, _zero)
    return Primitive(
        name, ("x", "y"), reference, derivative=zero, kinks=(0.0,), doc=doc, callable=False
    )


def _gelu_tanh(x: Expr) -> Expr:
    return 0.5 * x * (1 + _tanh(_GELU_C * (x + 0.044715 * x * x * x)))


def _gelu_tanh_slope(x: Expr) -> Expr:
    t = _tanh(_GELU_C * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_GELU_C * (1 + 3 * 0.044715 * x * x))


def _pow_slope_base(x: Expr, y: Expr) -> Expr:
    return _where(_eq(y, 0), 0, y * _pow(x, y - 1))


def _pow_slope_exponent(x: Expr, y: Expr) -> Expr:
    slope = _pow(x, y) * _log(x)
    return _where(_eq(x, 0), _where(_ge(y, 0), 0, slope), slope)


_ROWS = (
    # --- core: every backend spells these -------------------------------------------------------
    _core("add", "x y", lambda t, x, y: x + y, doc="x + y", callable=False),
    _core("sub", "x y", lambda t, x, y: x - y, doc="x - y", callable=False),
    _core("mul", "x y", lambda t, x, y: x * y, doc="x * y", callable=False),
    _core(
        "div",
        "x y",
        lambda t, x, y: x / y,
        # not -x/y**2, whose square overflows; x/y is the call itself
        derivative=(lambda x, y: 1 / y, lambda x, y: -(x / y / y)),
        probe=_POSITIVE,
        doc="x / y",
        callable=False,
    ),
    _core("neg", "x", lambda t, x: -x, doc="-x", callable=False),
    _core(
        "pow",
        "x y",
        lambda t, x, y: t.pow(x, y),
        derivative=(
            _pow_slope_base,
            _pow_slope_exponent,
        ),
        probe=_POSITIVE,
        doc="x ** y",
        callable=False,
    ),
    _core("abs", "x", lambda t, x: t.abs(x), derivative=(_sign,), kinks=(0.0,),
          doc="absolute value"),
    _core("sign", "x", lambda t, x: t.sign(x), derivative=(_zero,), kinks=(0.0,), doc="-1, 0 or 1"),
    _core(
        "max",
        "x y",
        lambda t, x, y: t.maximum(x, y),
        derivative=(
            lambda x, y: _where(_lt(x, y), 0, _where(_eq(x, y), 0.5, 1)),
            lambda x, y: _where(_gt(x, y), 0, _where(_eq(x, y), 0.5, 1)),
        ),
        kinks=(0.0,),
        doc="the larger of two; NaN if either is",
    ),
    _core(
        "min",
        "x y",
        lambda t, x, y: t.minimum(x, y),
        derivative=(
            lambda x, y: _where(_gt(x, y), 0, _where(_eq(x, y), 0.5, 1)),
            lambda x, y: _where(_lt(x, y), 0, _where(_eq(x, y), 0.5, 1)),
        ),
        kinks=(0.0,),
        doc="the smaller of two; NaN if either is",
    ),
    _core("exp", "x", lambda t, x: t.exp(x), doc="exponential", dear=True),
    _core("log", "x", lambda t, x: t.log(x), probe=_POSITIVE, doc="natural logarithm", dear=True),
    _core(
        "sqrt",
        "x",
        lambda t, x: t.sqrt(x),
        derivative=(lambda x: 0.5 / _sqrt(x),),
        probe=_POSITIVE,
        doc="square root",
    ),
    _core("sin", "x", lambda t, x: t.sin(x), doc="sine", dear=True),
    _core("cos", "x", lambda t, x: t.cos(x), doc="cosine", dear=True),
    _core("tanh", "x", lambda t, x: t.tanh(x), doc="hyperbolic tangent", dear=True),
    _core("erf", "x", lambda t, x: t.erf(x), doc="error function", dear=True),
    _core("atan", "x", lambda t, x: t.atan(x), doc="arc tangent", dear=True),
    _core("expm1", "x", lambda t, x: t.expm1(x), doc="exp(x) - 1, accurate near 0", dear=True),
    _core("log1p", "x", lambda t, x: t.log1p(x), probe=(-0.9, 4.0), dear=True,
          doc="log(1 + x), accurate"),  # fmt: skip
    _core(
        "where",
        "c x y",
        lambda t, c, x, y: t.where(c != 0, x, y),
        derivative=(
            _zero,
            lambda c, x, y: _where(c, 1, 0),
            lambda c, x, y: _where(c, 0, 1),
        ),
        doc="x where the comparison holds, else y",
    ),
    _compare("lt", "<", lambda t, x, y: (x < y).to(x.dtype)),
    _compare("le", "<=", lambda t, x, y: (x <= y).to(x.dtype)),
    _compare("gt", ">", lambda t, x, y: (x > y).to(x.dtype)),
    _compare("ge", ">=", lambda t, x, y: (x >= y).to(x.dtype)),
    _compare("eq", "==", lambda t, x, y: (x == y).to(x.dtype)),
    _compare("ne", "!=", lambda t, x, y: (x != y).to(x.dtype)),
    # --- everything else expands into the core --------------------------------------------------
    Primitive(
        "root",
        ("x",),
        lambda t, x: t.where(x == 0, x * 0, t.sqrt(t.where(x == 0, t.ones_like(x), x))),
        lambda x: _sqrt(x),
        (lambda x: _where(_eq(x, 0), 0, 0.5 / _sqrt(x)),),
        probe=_POSITIVE,
        doc="square root with derivative 0 at 0, for norms",
    ),
    Primitive("square", ("x",), lambda t, x: t.square(x), lambda x: x * x, doc="x squared"),
    Primitive(
        "rsqrt",
        ("x",),
        lambda t, x: t.rsqrt(x),
        lambda x: 1 / _sqrt(x),
        (lambda x: -0.5 * (_rsqrt(x) * _rsqrt(x) * _rsqrt(x)),),
        probe=_POSITIVE,
        doc="1 / sqrt(x)",
    ),
    Primitive(
        "reciprocal",
        ("x",),
        lambda t, x: t.reciprocal(x),
        lambda x: 1 / x,
        (lambda x: -(1 / x * (1 / x)),),
        probe=_POSITIVE,
        doc="1 / x",
    ),
    Primitive(
        "sigmoid",
        ("x",),
        lambda t, x: t.sigmoid(x),
        lambda x: 1 / (1 + _exp(-x)),
        (lambda x: _sigmoid(x) * (1 - _sigmoid(x)),),
        doc="1 / (1 + exp(-x))",
    ),
    Primitive(
        "relu",
        ("x",),
        lambda t, x: t.relu(x),
        lambda x: _max(x, 0),
        (lambda x: _where(_le(x, 0), 0, 1),),
        kinks=(0.0,),
        doc="max(x, 0)",
    ),
    Primitive(
        "leaky_relu",
        ("x",),
        lambda t, x: t.nn.functional.leaky_relu(x, 0.01),
        lambda x: _where(_gt(x, 0), x, 0.01 * x),
        (lambda x: _where(_gt(x, 0), 1, 0.01),),
        kinks=(0.0,),
        doc="x if x > 0 else 0.01 x",
    ),
    Primitive(
        "relu6",
        ("x",),
        lambda t, x: t.nn.functional.relu6(x),
        lambda x: _min(_max(x, 0), 6),
        (lambda x: _where(_le(x, 0), 0, _where(_ge(x, 6), 0, 1)),),
        probe=(-8.0, 8.0),
        kinks=(0.0, 6.0),
        doc="x clipped to [0, 6]",
    ),
    Primitive(
        "hardtanh",
        ("x",),
        lambda t, x: t.nn.functional.hardtanh(x),
        lambda x: _min(_max(x, -1), 1),
        (lambda x: _where(_le(x, -1), 0, _where(_ge(x, 1), 0, 1)),),
        kinks=(-1.0, 1.0),
        doc="x clipped to [-1, 1]",
    ),
    Primitive(
        "clamp",
        ("x", "lo", "hi"),
        lambda t, x, lo, hi: t.clamp(x, lo, hi),
        lambda x, lo, hi: _min(_max(x, lo), hi),
        (
            lambda x, lo, hi: _where(_ge(x, lo), _where(_le(x, hi), 1, 0), 0),
            lambda x, lo, hi: _where(_lt(lo, hi), _where(_lt(x, lo), 1, 0), 0),
            lambda x, lo, hi: _where(_gt(x, hi), 1, _where(_gt(lo, hi), 1, 0)),
        ),
        doc="x clipped to [lo, hi]",
    ),
    Primitive(
        "hardsigmoid",
        ("x",),
        lambda t, x: t.nn.functional.relu6(x + 3) / 6,
        lambda x: _min(_max(x + 3, 0), 6) / 6,
        (lambda x: _where(_gt(x, -3), _where(_lt(x, 3), 1 / 6, 0), 0),),
        kinks=(-3.0, 3.0),
        doc="clip(x + 3, 0, 6) / 6",
    ),
    Primitive(
        "hardswish",
        ("x",),
        lambda t, x: x * t.nn.functional.relu6(x + 3) / 6,
        lambda x: x * _min(_max(x + 3, 0), 6) / 6,
        (lambda x: _where(_le(x, -3), 0, _where(_lt(x, 3), x / 3 + 0.5, 1)),),
        kinks=(-3.0, 3.0),
        doc="x clip(x + 3, 0, 6) / 6",
    ),
    Primitive(
        "silu",
        ("x",),
        lambda t, x: t.nn.functional.silu(x),
        lambda x: x * _sigmoid(x),
        (lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),),
        doc="x sigmoid(x), also called swish",
    ),
    Primitive(
        "softplus",
        ("x",),
        lambda t, x: t.nn.functional.softplus(x, threshold=40),
        lambda x: _max(x, 0) + _log1p(_exp(-_abs(x))),
        (lambda x: _sigmoid(x),),
        doc="log(1 + exp(x)), without overflow",
    ),
    Primitive(
        "logsigmoid",
        ("x",),
        lambda t, x: t.nn.functional.logsigmoid(x),
        lambda x: _min(x, 0) - _log1p(_exp(-_abs(x))),
        (lambda x: _sigmoid(-x),),
        doc="log(sigmoid(x)), without overflow",
    ),
    Primitive(
        "mish",
        ("x",),
        lambda t, x: t.nn.functional.mish(x),
        lambda x: x * _tanh(_softplus(x)),
        (
            lambda x: (
                _tanh(_softplus(x))
                + x * _sigmoid(x) * (1 - _tanh(_softplus(x)) * _tanh(_softplus(x)))
            ),
        ),
        doc="x tanh(softplus(x))",
    ),
    Primitive(
        "gelu",
        ("x",),
        lambda t, x: t.nn.functional.gelu(x),
        lambda x: 0.5 * x * (1 + _erf(math.sqrt(0.5) * x)),
        (
            lambda x: (
                0.5 * (1 + _erf(math.sqrt(0.5) * x))
                + x * (math.sqrt(0.5 / math.pi) * _exp(-0.5 * x * x))
            ),
        ),
        doc="x Phi(x), with the error function",
    ),
    Primitive(
        "gelu_tanh",
        ("x",),
        lambda t, x: t.nn.functional.gelu(x, approximate="tanh"),
        _gelu_tanh,
        (_gelu_tanh_slope,),
        doc="gelu's tanh approximation",
    ),
    Primitive(
        "elu",
        ("x",),
        lambda t, x: t.nn.functional.elu(x),
        lambda x: _where(_gt(x, 0), x, _expm1(_min(x, 0))),
        (lambda x: _where(_gt(x, 0), 1, _exp(_min(x, 0))),),
        kinks=(0.0,),
        doc="x if x > 0 else exp(x) - 1",
    ),
    Primitive(
        "selu",
        ("x",),
        lambda t, x: t.nn.functional.selu(x),
        lambda x: _SELU_SCALE * _where(_gt(x, 0), x, _SELU_ALPHA * _expm1(_min(x, 0))),
        (lambda x: _SELU_SCALE * _where(_gt(x, 0), 1, _SELU_ALPHA * _exp(_min(x, 0))),),
        kinks=(0.0,),
        doc="self-normalizing elu",
    ),
    Primitive("sinh", ("x",), lambda t, x: t.sinh(x), lambda x: 0.5 * (_expm1(x) - _expm1(-x)),
              (lambda x: 0.5 * (_exp(x) + _exp(-x)),), doc="hyperbolic sine"),
    Primitive("cosh", ("x",), lambda t, x: t.cosh(x), lambda x: 0.5 * (_exp(x) + _exp(-x)),
              (lambda x: 0.5 * (_expm1(x) - _expm1(-x)),), doc="hyperbolic cosine"),
    Primitive("tan", ("x",), lambda t, x: t.tan(x), lambda x: _sin(x) / _cos(x),
              (lambda x: 1 + _sin(x) * _sin(x) / (_cos(x) * _cos(x)),), probe=(-1.4, 1.4),
              doc="tangent"),
    Primitive(
        "signed_sqrt",
        ("x",),
        lambda t, x: t.sign(x) * t.sqrt(t.abs(x)),
        lambda x: _sign(x) * _sqrt(_abs(x)),
        doc="sign(x) sqrt(abs(x)), EvoNorm's square root",
    ),
    Primitive(
        "signed_log",
        ("x",),
        lambda t, x: t.sign(x) * t.log(t.abs(x)),
        lambda x: _sign(x) * _log(_abs(x)),
        doc="sign(x) log(abs(x)), EvoNorm's logarithm",
    ),
)  # fmt: skip

PRIMITIVES: dict[str, Primitive] = {row.name: row for row in _ROWS}
