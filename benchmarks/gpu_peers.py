"""GPU peers: the layers of the GPU's table as other software computes them.

eager      as one writes the layer in torch, see `benchmarks.peers`
compile    `torch.compile` of that
liger      Liger's kernels, if liger_kernel can be imported
quack      quack's, likewise; its LayerNorm has no beta and is therefore another layer

Each is a function of x and of the formula's parameters by name. `peer` raises `MissingError` where
there is none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu_rows import COMPILE, EAGER, LIGER, QUACK, Row
from normc.analysis.providers import Call, compiled


class MissingError(Exception):
    """A library that is not installed, or that has no such layer."""


def peer(who: str, row: Row) -> Call:
    """The layer of a row as another provider computes it."""
    name = row.peer or row.name
    if who in (EAGER, COMPILE):
        call = PLAIN.get(name) or getattr(peers, name)
        return compiled(call) if who == COMPILE else call
    made = {LIGER: _liger, QUACK: _quack}[who](name)
    if made is None:
        raise MissingError(f"{who} has no such layer")
    return made


# --- torch: KernelBench's layers, and one on tokens ----------------------------------------------


def _instance_norm(x: Tensor) -> Tensor:
    return F.instance_norm(x, eps=1e-5)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-5)


def _group_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(x, 8, gamma, beta, 1e-5)


def _batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)


def _rms_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-5)


def _searched_tokens(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    std = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return torch.tanh(x) * torch.sigmoid(v * x) / std * gamma + beta


PLAIN: dict[str, Call] = {
    "plain_instance_norm": _instance_norm,
    "plain_layer_norm": _layer_norm,
    "plain_rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "searched_tokens": _searched_tokens,
}
"""What `benchmarks.peers` has not, by name."""


# --- libraries -----------------------------------------------------------------------------------


def _part(module: str, name: str) -> Any:
    """Something of a library, which may fail to import in more ways than by being absent."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        library = module.partition(".")[0]
        raise MissingError(f"{library} cannot be imported: {type(error).__name__}") from None


def _liger(name: str) -> Call | None:
    if name not in _LIGER:
        return None
    module, function, wrap = _LIGER[name]
    return wrap(_part(f"liger_kernel.ops.{module}", function).apply)


# Not in place: by default Liger writes the gradient of x over that of y, which is needed again.
_LIGER: dict[str, tuple[str, str, Callable[[Any], Call]]] = {
    "layer_norm": ("layer_norm", "LigerLayerNormFunction",
        lambda run: lambda x, gamma, beta: run(x, gamma, beta, 1e-5)),
    "rms_norm": ("rms_norm", "LigerRMSNormFunction",
        lambda run: lambda x, gamma: run(x, gamma, 1e-6, 0.0, "llama", False)),
    "add_rms_norm": ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction",
        lambda run: lambda x, residual, gamma: run(x, residual, gamma, 1e-6, 0.0, "llama", False)),
    "dyt": ("dyt", "LigerDyTFunction",
        lambda run: lambda x, alpha, gamma, beta: run(x, alpha.reshape(1), gamma, beta)),
    "group_norm_silu": ("group_norm", "LigerGroupNormFunction",
        lambda run: lambda x, gamma, beta:
            F.silu(run(x, gamma, beta, x.shape[1], peers.GROUPS, 1e-5))),
}  # fmt: skip
"""By layer: where Liger has it, and how it is called."""


def _quack(name: str) -> Call | None:
    if name not in ("rms_norm", "add_rms_norm"):
        return None
    run = _part("quack.rmsnorm", "rmsnorm")

    def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
        return run(x, gamma, eps=1e-6)

    def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(x, gamma, residual=residual, eps=1e-6, prenorm=True))

    return rms_norm if name == "rms_norm" else add_rms_norm
