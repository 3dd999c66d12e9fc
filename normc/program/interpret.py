"""Interpret: expressions evaluated with numpy, in any precision, and compared on hostile numbers.

`evaluate` is the meaning of the core functions without a compiler: it judges rewrites (`guard`) and
the rows of the tables (tests). Functions outside the core are evaluated by their bodies, statistics
by the folds of their rows. Conventions are torch's: max and min pass NaN on, sign(NaN) is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normc.errors import NormcError
from normc.language.axes import ORDER
from normc.language.expr import Call, Const, Expr, Reduce, Var, postorder, var, variables
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import COUNT, REDUCTIONS, E

Array = NDArray[Any]
Env = Mapping[str, ArrayLike]

_erf = np.frompyfunc(math.erf, 1, 1)


def _truth(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda x, y: compare(x, y).astype(x.dtype)


CORE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    # numpy turns the powers 0.5 and 2 of a scalar exponent into other functions; C does not
    "pow": lambda x, y: np.power(*map(np.array, np.broadcast_arrays(x, y))),
    "abs": np.abs,
    "sign": lambda x: ((x > 0).astype(x.dtype) - (x < 0)).astype(x.dtype),
    "max": np.maximum,
    "min": np.minimum,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": lambda x: np.asarray(_erf(x.astype(float)), dtype=float).astype(x.dtype),
    "atan": np.arctan,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "where": lambda c, x, y: np.where(c != 0, x, y),
    "lt": _truth(np.less),
    "le": _truth(np.less_equal),
    "gt": _truth(np.greater),
    "ge": _truth(np.greater_equal),
    "eq": _truth(np.equal),
    "ne": _truth(np.not_equal),
}
"""Every core function in numpy."""


# --- evaluation -------------------------------------------------------------------------------


def evaluate(expr: Expr, env: Env, dtype: type = np.float64, sizes: Sequence[int] = ()) -> Array:
    """The value of ``expr`` where its variables have the values of ``env``, by name.

    Values broadcast like numpy's. An expression with statistics needs ``sizes``, those of (N, G, K,
    S), and values of that rank.

    >>> from normc.language.expr import var
    >>> evaluate(var("x") * 2, {"x": [1, 2]})
    array([2., 4.])
    """
    return evaluate_all([expr], env, dtype, sizes)[0]


def evaluate_all(
    roots: Iterable[Expr], env: Env, dtype: type = np.float64, sizes: Sequence[int] = ()
) -> list[Array]:
    """The value of every root; what they share is computed once."""
    targets = list(roots)
    done: dict[int, Array] = {}
    with np.errstate(all="ignore"):
        known = {name: np.asarray(value).astype(dtype) for name, value in env.items()}
        for node in postorder(targets):
            done[id(node)] = _value(node, done, known, dtype, sizes)
    return [done[id(root)] for root in targets]


def _value(
    node: Expr, done: dict[int, Array], env: dict[str, Array], dtype: type, sizes: Sequence[int]
) -> Array:
    match node:
        case Const(value):
            return np.asarray(value, dtype)
        case Var(name):
            if name not in env:
                raise NormcError(f"`{name}` has no value here")
            return env[name]
        case Call(fn, args) if fn in CORE:
            return np.asarray(CORE[fn](*(done[id(a)] for a in args)))
        case Call(fn, args):
            row = PRIMITIVES[fn]
            values = zip(row.args, (done[id(a)] for a in args), strict=True)
            return evaluate(row.expand(*row.parameters()), dict(values), dtype)
        case Reduce(op, over, arg):
            row = REDUCTIONS[op]
            if row.lower is None:
                return _reduce(node, done[id(arg)], dtype, sizes)
            lowered = row.lower(var(E.name, arg.axes), over)
            return evaluate(lowered, {**env, E.name: done[id(arg)]}, dtype, sizes)


def _reduce(node: Reduce, value: Array, dtype: type, sizes: Sequence[int]) -> Array:
    """A core statistic by its row's folds, over ``value`` as if it had x's sizes."""
    row = REDUCTIONS[node.op]
    if len(sizes) != len(ORDER) or row.state is None or row.finish is None:
        raise NormcError(f"`{node.op}` is a statistic: it needs the sizes of (N, G, K, S)")
    dims = tuple(d for d, axis in enumerate(ORDER) if axis & node.over)
    shape = np.broadcast_shapes(value.shape, [n if d in dims else 1 for d, n in enumerate(sizes)])
    number = math.prod(sizes[d] for d in dims)
    block = {E.name: np.broadcast_to(value, shape), COUNT.name: np.asarray(number, dtype)}
    for step in row.state.folds:
        each = np.broadcast_to(evaluate(step.each, block, dtype), shape)
        fold = {"sum": np.sum, "max": np.max, "min": np.min}[step.op]
        block[step.name] = np.asarray(fold(each, axis=dims, keepdims=True))
    state: dict[str, Expr] = {step.name: var(step.name) for step in row.state.folds}
    return evaluate(row.finish(state, COUNT), block, dtype)


# --- comparison -------------------------------------------------------------------------------

_SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-40, -1e-20, 100.0, -100.0, 1e4, -1e30, 3e38)
_NOT_FINITE = (math.nan, math.inf, -math.inf)
_ULPS = 4


def probes(names: Iterable[str], wide: bool = True) -> dict[str, Array]:
    """Values at which rewrites break: ordinary and nearly equal ones, 0, NaN and Inf among others.

    ``wide`` ones also cover the whole range of float32, where products overflow and vanish.
    """
    ordered = sorted(set(names))
    return dict(zip(ordered, _points(len(ordered), wide), strict=True))


@cache
def _points(k: int, wide: bool) -> Array:
    if k == 0:
        return np.empty((0, 1))
    random = np.random.default_rng(k)
    near = random.normal(size=(1, 48)) * 10.0 ** random.integers(-2, 5, size=(1, 48))
    blocks = [random.normal(size=(k, 96)) * 3, near * (1 + 1e-3 * random.normal(size=(k, 48)))]
    special = (*_NOT_FINITE, *(_SPECIAL if wide else _SPECIAL[:6]))
    if k <= 2:
        blocks.append(np.array(list(product(special, repeat=k))).T.reshape(k, -1))
    blocks.append(random.choice(special, size=(k, 128)))
    blocks.append(_cancelling(random.normal(size=(k, 48)), random))
    single = random.normal(size=(k, 96))  # one special value among ordinary ones
    single[random.integers(k, size=96), np.arange(96)] = random.choice(special, size=96)
    blocks.append(single)
    if wide:
        signs = random.choice([-1.0, 1.0], size=(k, 128))
        blocks.append(signs * 10.0 ** random.uniform(-44, 38.5, size=(k, 128)))
    points = np.concatenate(blocks, axis=1)
    points.flags.writeable = False
    return points


def _cancelling(values: Array, random: np.random.Generator) -> Array:
    """One value in every column nearly minus the sum of the others."""
    k, count = values.shape
    if k > 1:
        place = random.integers(k, size=count), np.arange(count)
        values[place] -= values.sum(axis=0) * (1 + 1e-3 * random.normal(size=count))
    return values


def guard(before: Expr, after: Expr, points: Env | None = None, signed_zeros: bool = False) -> bool:
    """Whether ``after`` may replace ``before``: in float32 and float64 alike, at every probe point,
    both are the same NaN or infinity or differ by at most 4 ulp.

    Neither may hold statistics. With ``signed_zeros`` the signs of zeros have to agree too, so that
    the replacement is safe below a division.
    """
    if points is None:
        points = probes(v.name for v in variables([before, after]))
    for dtype in (np.float32, np.float64):
        old, new = evaluate_all([before, after], points, dtype)
        if not _agree(old, new, signed_zeros):
            return False
    return True


def _agree(old: Array, new: Array, signed_zeros: bool) -> bool:
    with np.errstate(all="ignore"):
        close = abs(old - new) <= _ULPS * np.spacing(np.maximum(abs(old), abs(new)))
        same = (old == new) | (np.isnan(old) & np.isnan(new)) | (np.isfinite(old) & close)
    if signed_zeros:
        same &= (old != 0) | (np.signbit(old) == np.signbit(new))
    return bool(same.all())
