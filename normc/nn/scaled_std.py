"""Scaled weight standardization: layers whose weight is standardized before it is used.

Each output channel of a weight (C_out, C_in/groups, kh, kw) is a sample: mean and biased variance
are taken over its fan-in N, and ``gain``, learned, is one number per output channel. That is a
formula, compiled like any other; its gradients are derived, so they reach weight and gain as those
of a `Layer` do, to any order. Arithmetic is in float32, in float64 for a float64 weight.

    deepmind    gain * (W - mean) / sqrt(max(N*var, 1e-4))          and gamma is in the activation
    timm        gain * gamma/sqrt(N) * (W - mean) / sqrt(var + 1e-6)

Brock, De, Smith, "Characterizing signal propagation to close the performance gap in unnormalized
ResNets", arXiv 2101.08692; the two forms are those of deepmind's nfnets/base.py and of timm's
std_conv.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from normc.errors import NormcError, ShapeError, nearest
from normc.formula import parse
from normc.nn.checks import real
from normc.ops.op import Op

GAMMAS = {  # the constants of deepmind's base.py, which timm repeats
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,  # of the tanh form
    "glu": 1.8484294414520264,
    "leaky_relu": 1.70590341091156,  # of slope 0.01
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}
"""gamma = 1/sqrt(Var g(z)), z ~ N(0, 1), as published code has it: estimates from samples, up to
0.09 % above the exact values, which quadrature gives. Use these to match published networks."""

FORMS = {  # a published form: the weight's formula without gamma, and its epsilon
    "deepmind": ("(x - layer_mean(x)) / sqrt(max(layer_var(x)*layer_sum(1), eps)) * gain", 1e-4),
    "timm": ("(x - layer_mean(x)) / layer_std(x) / sqrt(layer_sum(1)) * gain", 1e-6),
}
"""A layer statistic is over all but the sample: the whole fan-in of an output channel, which
``layer_sum(1)`` counts."""

_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Standardization:
    """What is done to a weight: a form, the activation's gamma, an epsilon; and the op for it."""

    form: str
    gamma: float
    eps: float
    op: Op

    @staticmethod
    def of(form: str, gamma: float | str, eps: float | None, backend: str) -> Standardization:
        """Check the arguments; `NormcError` for an unknown form, or for what is no gamma or eps."""
        if str(form) not in FORMS:
            near = nearest(str(form), FORMS)
            raise NormcError(f"there is no form {form!r}{near}: deepmind or timm")
        eps = FORMS[form][1] if eps is None else real("eps", eps)
        gamma = gamma_of(gamma)
        factor = "" if gamma == 1 else f"{gamma!r} * "
        op = Op(parse(f"input gain[n]; {factor}{FORMS[form][0]}"), backend)
        return Standardization(form, gamma, eps, op)

    def __call__(self, weight: Tensor, gain: Tensor) -> Tensor:
        """The standardized weight, from a weight (C_out, ...) and a gain (C_out,)."""
        # Rows of the whole fan-in are read several times faster than maps of kh*kw positions.
        # What is not contiguous, as in channels-last networks, keeps its strides instead.
        rows = weight.flatten(1) if weight.is_contiguous() else weight
        return self.op.run(rows, {"gain": gain}, 1, self.eps, 1)[0].reshape(weight.shape)


def gamma_of(gamma: float | str) -> float:
    """A gamma itself, or the published constant of an activation's name.

    >>> gamma_of("relu"), gamma_of(1.5)
    (1.7139588594436646, 1.5)
    """
    if isinstance(gamma, str):
        if gamma not in GAMMAS:
            raise NormcError(
                f"no gamma is published for `{gamma}`{nearest(gamma, GAMMAS)}: pass the number "
                f"1/sqrt(Var g(z)), which is normc.analysis.gain({gamma!r})"
            )
        return GAMMAS[gamma]
    return real("gamma", gamma, above=True)


class _Standardized(nn.Module):
    """What the layers share; it stands in front of torch's class."""

    weight: Tensor
    bias: Tensor | None
    gain: nn.Parameter
    standardization: Standardization

    def reset_parameters(self) -> None:
        """Put weight, bias and gain back to where they start."""
        super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        if "gain" in self._parameters:  # it is not yet there when torch's __init__ calls this
            _start(self)

    def standardized_weight(self) -> Tensor:
        """The weight that the layer uses, of the shape and dtype of ``weight``."""
        return self.standardization(self.weight, self.gain)

    def extra_repr(self) -> str:
        """Torch's, and the form."""
        s = self.standardization
        chosen = "" if s.op.backend == "auto" else f", backend={s.op.backend!r}"
        return f"{super().extra_repr()}, form={s.form!r}, gamma={s.gamma}, eps={s.eps}{chosen}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take timm's gain (C_out, 1, 1, 1), too; ``state_dict`` is a copy that torch has made."""
        gain = state_dict.get(f"{prefix}gain")
        if isinstance(gain, Tensor) and gain.shape[1:] == (1, 1, 1):
            state_dict[f"{prefix}gain"] = gain.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ScaledStdConv2d(_Standardized, nn.Conv2d):
    """nn.Conv2d with a standardized weight: variance goes through it unchanged at the start.

    Arguments are nn.Conv2d's; then ``form``, and the ``gamma`` of the activation in front, a number
    or a name in `GAMMAS`. deepmind's networks leave gamma at 1 and multiply the activation by it;
    that this form takes another gamma is ours. ``eps`` None is the form's own. What is learned is
    ``weight``, ``bias`` and ``gain`` of shape (C_out,), which starts at 1; what timm saved, with
    gains of shape (C_out, 1, 1, 1), loads as it is. In deepmind's form the weight starts as
    N(0, 1/N) and the bias at 0 (their layers always have one); in timm's both as in nn.Conv2d.

    The weight is standardized in every call, in evaluation too: nothing is kept that could go
    stale, at the price of a few passes over the weight. To pay it once, give a plain nn.Conv2d the
    `standardized_weight`.
    Raises `ShapeError` for a fan-in of one, of which nothing would be left, or of none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "deepmind",
        gamma: float | str = 1.0,
        eps: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.standardization = Standardization.of(form, gamma, eps, backend)
        self.gain = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        _start(self)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> ScaledStdConv2d:
        """A layer with a convolution's sizes, copies of its weight and bias, and a gain of 1.

        ``options`` are form, gamma, eps and backend. The result is another function, as the weight
        is standardized. Raises `NormcError` for a module that does more than nn.Conv2d does, as
        one that is standardized already, and for a weight that is not there yet or is computed.
        """
        _check_plain(conv)
        same: dict[str, Any] = {name: getattr(conv, name) for name in (*_SIZES, "padding_mode")}
        place = {"device": "meta", "dtype": conv.weight.dtype}
        made = cls(**same, bias=conv.bias is not None, **place, **options)
        _take(made, conv)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W), or (C_in, H, W), with the standardized weight."""
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class ScaledStdLinear(_Standardized, nn.Linear):
    """nn.Linear with a standardized weight, the fan-in being ``in_features``.

    See `ScaledStdConv2d`; a linear layer of this kind is in neither published code.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "deepmind",
        gamma: float | str = 1.0,
        eps: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.standardization = Standardization.of(form, gamma, eps, backend)
        self.gain = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        _start(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) with the standardized weight."""
        return F.linear(input, self.standardized_weight(), self.bias)


def _start(layer: _Standardized) -> None:
    """Where parameters start; weight and bias have torch's values, which timm keeps."""
    fan_in = layer.weight.shape[1:].numel()
    if fan_in == 0:
        raise ShapeError("a layer without inputs, of fan-in 0, has no weight to standardize")
    if fan_in == 1:
        raise ShapeError(
            "an output channel with a fan-in of 1 is its own mean, so its standardized weight is 0 "
            "always: use a plain layer here"
        )
    nn.init.ones_(layer.gain)
    if layer.standardization.form == "deepmind":
        nn.init.normal_(layer.weight, std=fan_in**-0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _check_plain(conv: nn.Conv2d) -> None:
    """Whether a convolution does what nn.Conv2d does, with a weight of its own; `NormcError`."""
    kind = type(conv)
    own = "forward", "_conv_forward"
    if any(getattr(kind, name, None) is not getattr(nn.Conv2d, name) for name in own):
        raise NormcError(f"from_conv takes a plain nn.Conv2d, not a {kind.__name__}")
    if is_lazy(conv.weight):
        raise NormcError("from_conv: the weight has no shape yet, so call the convolution once")
    if not isinstance(conv.weight, nn.Parameter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NormcError(
            "from_conv: the weight is no parameter but computed, as by weight_norm or pruning: "
            "remove that first, which leaves what it has computed"
        )


def _take(made: ScaledStdConv2d, conv: nn.Conv2d) -> None:
    """Give a layer without storage a convolution's values, device, flags and mode."""
    for name, value in (("weight", conv.weight), ("bias", conv.bias)):
        if value is not None:  # pyright: ignore[reportUnnecessaryComparison]
            setattr(made, name, nn.Parameter(value.detach().clone(), value.requires_grad))
    made.gain = nn.Parameter(conv.weight.new_ones(conv.out_channels))
    made.train(conv.training)
