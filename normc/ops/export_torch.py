"""Programs and formulas as plain torch operations, one statement per line, for an exported file.

    function ::= "def", {temporary | statistic}, {result}, "return"

Every value is a view over (N, G, K, S), of size 1 along the axes it does not vary over. What is
used twice has a name of its own, ``t0``, ``t1`` and so on. A number stays a Python number beside a
tensor, and becomes a tensor where an operation of torch takes nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from normc.backends.emit import Spelling, expand, write
from normc.language.axes import FULL, ORDER, Axis, members
from normc.language.definition import Definition
from normc.language.expr import Call, Const, Expr, Reduce, Var, call, children, postorder, rewrite
from normc.language.expr import var as variable
from normc.language.primitives import COMPARISONS
from normc.language.reductions import EPS, REDUCTIONS, counted
from normc.ops.export_names import arguments, letters, local, sizes, unpacked
from normc.program.program import Program, is_scalar

_TORCH = (
    *("abs", "sign", "exp", "log", "sqrt", "sin", "cos", "tanh", "erf", "atan", "expm1", "log1p"),
    *("square", "rsqrt", "reciprocal", "sigmoid", "relu", "sinh", "cosh", "tan"),
)
_FUNCTIONAL = ("silu", "mish", "gelu", "elu", "selu", "relu6", "hardtanh", "leaky_relu")
_FUNCTIONS = {
    **{fn: f"torch.{fn}({{}})" for fn in _TORCH},
    **{fn: f"torch.nn.functional.{fn}({{}})" for fn in _FUNCTIONAL},
    "gelu_tanh": 'torch.nn.functional.gelu({}, approximate="tanh")',
    "logsigmoid": "torch.nn.functional.logsigmoid({})",
    "softplus": "torch.nn.functional.softplus({}, threshold=40)",
    "max": "torch.maximum({}, {})",
    "min": "torch.minimum({}, {})",
    "pow": "torch.pow({}, {})",
    "where": "torch.where({}, {}, {})",
}

_REDUCTIONS = {
    "sum": "torch.sum({}, {}, keepdim=True)",
    "mean": "torch.mean({}, {}, keepdim=True)",
    "var": "torch.var({}, {}, correction=0, keepdim=True)",
    "max": "torch.amax({}, {}, keepdim=True)",
    "min": "torch.amin({}, {}, keepdim=True)",
    "std": "torch.sqrt(torch.var({}, {}, correction=0, keepdim=True) + call.eps)",
    "l2": "torch.linalg.vector_norm({}, dim={}, keepdim=True)",
}
"""A surface row that is not here is written by its definition."""


def _number(value: float) -> str:
    if not math.isfinite(value):
        return f'float("{value!r}")'
    whole = value.is_integer() and abs(value) < 1e15 and repr(value) != "-0.0"
    return str(int(value)) if whole else repr(value)


SPELLING = Spelling(_FUNCTIONS, _number)

_ARITHMETIC = ("add", "sub", "mul", "div", "neg")


def program_function(name: str, doc: str, program: Program, results: Sequence[str]) -> str:
    """A Program as a function from its inputs to the outputs and statistics named ``results``."""
    inputs = [local(i.name) for i in program.inputs]
    lines = _Lines(program.exprs)
    for stat, root in zip(program.stats, lines.roots, strict=False):
        arg = lines.tensor(root)
        lines.add(f"{local(stat.name)} = {lines.reduction(stat.op, stat.over, arg)}")
    for out, root in zip(program.outputs, lines.roots[len(program.stats) :], strict=True):
        text = lines.tensor(root)
        place = "call.store(" if out.axes == FULL else f'call.over("{letters(out.axes)}", '
        lines.add(f"{local(out.name)} = {place}{text})")
    some = [inputs[i : i + 6] for i in range(0, len(inputs), 6)]
    widened = [f"{unpacked(names)} = call.wide({', '.join(names)})" for names in some]
    returned = f"return {unpacked([local(name) for name in results])}"
    return _function(name, doc, inputs, [*widened, *lines.lines, returned])


def formula_function(name: str, doc: str, definition: Definition) -> str:
    """A formula as it is written, statistics within expressions, as a function of its tensors."""
    given = [local(n) for n in ("x", *(row.name for row in _rows(definition)))]
    lines = _Lines(definition.results)
    results = [lines.tensor(root) for root in lines.roots]
    return _function(name, doc, given, [*lines.lines, f"return {unpacked(results)}"])


def _rows(definition: Definition) -> Iterable[Var]:
    return [row.var for row in (*definition.inputs, *definition.params)]


def _function(name: str, doc: str, given: Sequence[str], body: Sequence[str]) -> str:
    head = arguments(f"def {name}(", ["call", *given], "):")
    return "\n".join(
        [*head, f'    """{doc}"""', *(f"    {line}" for line in [*sizes(body, "NGKS"), *body])]
    )


class _Lines:
    """The statements of one function over expressions that share what they can."""

    def __init__(self, exprs: Sequence[Expr]) -> None:
        self.lines: list[str] = []
        self._names: dict[int, str] = {}  # of nodes: variables, and what has been computed
        self._numbers: set[int] = set()  # nodes that are Python numbers
        self._alive: list[Expr] = []  # ids stay unique while their nodes live
        self._temporaries = 0
        lowered = rewrite(exprs, _lower)
        self.roots = rewrite(expand(lowered, SPELLING), self._settle)
        order = postorder(self.roots)
        self._users = Counter([id(c) for node in order for c in children(node)])
        self._users.update(map(id, self.roots))

    def add(self, line: str) -> None:
        """Add a statement."""
        self.lines.append(line)

    def tensor(self, root: Expr) -> str:
        """The text of a tensor, once what it shares with others has been computed."""
        for node in postorder([root]):
            if id(node) not in self._names and self._wants_name(node):
                name = f"t{self._temporaries}"
                self._temporaries += 1
                self.add(f"{name} = {self._text(node)}")
                self._names[id(node)] = name
        return self._as_tensor(root)

    def reduction(self, op: str, over: Axis, arg: str) -> str:
        """A statistic of a text."""
        dims = tuple(d for d, axis in enumerate(ORDER) if axis & over)
        return _REDUCTIONS[op].format(arg, dims[0] if len(dims) == 1 else dims)

    def _wants_name(self, node: Expr) -> bool:
        if isinstance(node, Reduce):
            return True
        return isinstance(node, Call) and self._users[id(node)] > 1 and not self._is_number(node)

    def _text(self, node: Expr) -> str:
        if not isinstance(node, Reduce):
            return write(node, SPELLING, self._names)
        arg = self._as_tensor(node.arg)
        if node.over & ~node.arg.axes:  # a statistic sees its argument as if it had x's shape
            seen = node.over | node.arg.axes
            shape = ", ".join(str(a.name) if a & seen else "1" for a in ORDER)
            arg = f"torch.broadcast_to({arg}, ({shape}))"
        return self.reduction(node.op, node.over, arg)

    # --- numbers ---------------------------------------------------------------------------------
    def _is_number(self, node: Expr) -> bool:
        return id(node) in self._numbers

    def _as_tensor(self, node: Expr) -> str:
        text = write(node, SPELLING, self._names)
        return f"call.number({text})" if self._is_number(node) else text

    def _settle(self, node: Expr) -> Expr:
        """Name variables, and let operations have tensors where they need them."""
        number = isinstance(node, Const)
        if isinstance(node, Var):
            number = is_scalar(node.name)
            self._names[id(node)] = _scalar(node) if number else local(node.name)
        elif isinstance(node, Call):
            if node.fn == "where" and isinstance(node.args[0], Const):
                return node.args[1 if node.args[0].value else 2]
            wrapped = self._needs_tensors(node)
            args = [self._wrap(a) if i in wrapped else a for i, a in enumerate(node.args)]
            node = call(node.fn, *args)
            number = node.fn in _ARITHMETIC and all(map(self._is_number, children(node)))
        if number:
            self._numbers.add(id(node))
        self._alive.append(node)
        return node

    def _needs_tensors(self, node: Call) -> set[int]:
        """Which arguments are numbers and may not stay so."""
        numbers = {i for i, a in enumerate(node.args) if self._is_number(a)}
        every = len(numbers) == len(node.args)
        if node.fn == "div":  # Python divides no number by zero
            divisor = node.args[1]
            nonzero = isinstance(divisor, Const) and divisor.value != 0
            counts = isinstance(divisor, Var) and divisor is not EPS
            return set() if nonzero or counts else numbers & {1}
        if node.fn in _ARITHMETIC:
            return set()
        if node.fn in COMPARISONS.values() or node.fn == "pow":
            return {0} if every else set()
        if node.fn == "where":
            return {1, 2} if {1, 2} <= numbers else set()
        return numbers

    def _wrap(self, number: Expr) -> Expr:
        text = f"call.number({write(number, SPELLING, self._names)})"
        wrapped = variable(f"number {text}")
        self._names[id(wrapped)] = text
        self._alive.append(wrapped)
        return wrapped


def _scalar(node: Var) -> str:
    """eps, or the product of sizes that a count is."""
    if node is EPS:
        return "call.eps"
    factors = [str(a.name) for a in members(counted(node))]
    return factors[0] if len(factors) == 1 else f"({'*'.join(factors)})"


def _lower(node: Expr) -> Expr:
    """A surface statistic that torch has no operation for, by its definition."""
    if not isinstance(node, Reduce) or node.op in _REDUCTIONS:
        return node
    rule = REDUCTIONS[node.op].lower
    assert rule is not None, f"{node.op} is a core reduction without a spelling"
    return rewrite([rule(node.arg, node.over)], _lower)[0]
