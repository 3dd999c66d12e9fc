"""What the blocks of an NF-ResNet have in common: their convolutions, and their activation.

The activation is a formula, and so is what a block makes of it: the activation times one number,
its gamma over the expected deviation, in one pass over memory. arXiv 2101.08692.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from normc.errors import NormcError, nearest
from normc.formula import Formula, parse
from normc.language.axes import NONE
from normc.language.definition import Definition, Param, X
from normc.language.expr import Reduce, postorder
from normc.language.show import show
from normc.nn.checks import real
from normc.nn.scaled_std import GAMMAS, ScaledStdConv2d, gamma_of
from normc.ops.op import compile

SPELLINGS = {  # of published names that are not functions of the language
    "identity": "x", "celu": "elu(x)", "gelu": "gelu_tanh(x)", "log_sigmoid": "logsigmoid(x)",
    "soft_sign": "x/(1 + abs(x))",
}  # fmt: skip
ACROSS = ("glu", "log_softmax")  # published names that are not functions of one element


@dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common.

    ``activation`` is a name of `GAMMAS`, or of another function of the language, or an expression
    of x; where no gamma is published for it, with its ``gamma``, which makes the variance 1 for a
    standard normal x (`normc.analysis.gain` finds it). As in the published code, the expected
    deviation divides what comes out of the activation; what goes in is scaled by it only where the
    activation is homogeneous, as relu is. ``alpha`` is the share of a branch in its block's result,
    ``bottleneck`` that of a block's channels that its 3x3 convolution has, ``excite`` that of
    squeeze-excite (0 for none; published 0.25). ``form`` is that of `ScaledStdConv2d`, with gamma
    always in the activation. Raises `NormcError` for numbers that do not fit.
    """

    activation: str = "relu"
    gamma: float | None = None
    alpha: float = 0.2
    bottleneck: float = 0.25
    excite: float = 0.0
    form: str = "deepmind"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.activation, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NormcError(f"activation is a name or an expression, not {self.activation!r}")
        for name in ("alpha", "bottleneck", "excite"):
            number = real(name, getattr(self, name), above=name == "bottleneck")
            object.__setattr__(self, name, number)

    @classmethod
    def of(cls, options: Mapping[str, Any], others: Iterable[str]) -> Style:
        """The style of a network's keywords, beside ``others`` that it has; else `NormcError`."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = nearest(name, (*others, *known))
                raise NormcError(f"an NF-ResNet has no option `{name}`{near}")
        return cls(**options)

    def conv(self, before: int, after: int, kernel: int = 1, stride: int = 1) -> ScaledStdConv2d:
        """A standardized convolution that keeps sizes but for its stride."""
        how: Any = {"form": self.form, "backend": self.backend}
        return ScaledStdConv2d(before, after, kernel, stride, kernel // 2, **how)

    def act(self, std: float = 1.0) -> ScaledActivation:
        """The activation, times gamma, over an expected standard deviation."""
        name = self.activation
        if name in ACROSS:
            raise NormcError(
                f"`{name}` is no function of one element, which an activation between convolutions "
                f"has to be: {', '.join(n for n in GAMMAS if n not in ACROSS)} are"
            )
        gamma = gamma_of(name if self.gamma is None else self.gamma)
        plain = name.isidentifier() and name != "x"
        text = SPELLINGS.get(name, f"{name}(x)" if plain else name)
        return ScaledActivation(text, gamma / real("std", std, above=True), self.backend)


class ScaledActivation(nn.Module):
    """An activation times a constant, as one formula.

    The constant is no number in the text but a scalar given at the call: all blocks of a network,
    each with its own expected deviation, share a kernel. Raises `FormulaError` for what is no
    formula, `NormcError` for one that is not point-wise, of x alone, with one result.
    """

    def __init__(self, text: str, scale: float, backend: str = "auto") -> None:
        super().__init__()
        self.op = compile(_scaled(text), backend)
        self.text, self.scale = text, float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """The activated x of any shape of rank 2 to 5."""
        # made here, so that neither .to(torch.bfloat16) rounds nor .to_empty() loses it
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = torch.full((), self.scale, dtype=dtype, device=x.device)
        return self.op.run(x, {"scale": scale}, "auto", 1e-5, 1)[0]

    def extra_repr(self) -> str:
        """The formula and its factor."""
        return f"{self.scale:.6g} * {self.text}"


@lru_cache(maxsize=256)
def _scaled(text: str) -> Formula:
    """scale*text, of the expression and not of the text: a bracket in it could close ours."""
    f = parse(text)
    results = f.definition.results
    nodes = postorder(results)
    if f.params or f.inputs or X not in nodes or len(results) != 1:
        raise NormcError(f"an activation is one expression of x alone, not `{text}`")
    if any(isinstance(node, Reduce) for node in nodes):
        raise NormcError(f"an activation is a function of one element: `{text}` has statistics")
    scale = Param("scale", NONE)
    return parse(show(Definition((scale.var * results[0],), (scale,))))
