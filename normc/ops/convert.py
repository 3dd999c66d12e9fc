"""Convert: layers with batch statistics take them over all processes, as nn.SyncBatchNorm does."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from normc.ops.layer import Layer
from normc.pipeline import batch_levels

Model = TypeVar("Model", bound=nn.Module)


def convert_sync_norms(model: Model, process_group: Any = None) -> Model:
    """Let every `Layer` of a model whose formula takes statistics over the batch take them over the
    batches of all processes of ``process_group`` (None for all there are); returns the model.

    The counterpart of ``nn.SyncBatchNorm.convert_sync_batchnorm``, which converts torch's own
    norms; layers are changed in place, so optimizers keep their parameters. In evaluation, and
    without torch.distributed, nothing is different.
    """
    for layer in model.modules():
        if isinstance(layer, Layer) and batch_levels(layer.formula.definition):
            layer.sync, layer.process_group = True, process_group
    return model
