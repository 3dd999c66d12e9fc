"""Modules built from compiled formulas: kernel normalization, scaled weight standardization."""

from normc.nn.kernel_norm import KernelNorm1d, KernelNorm2d, KernelNorm2d1x1
from normc.nn.kn_conv import KNConv2d, KNConv2d1x1
from normc.nn.kn_resnet import KNResNet, Plan, Stage
from normc.nn.nf_resnet import NFResNet
from normc.nn.scaled_std import ScaledStdConv2d, ScaledStdLinear

__all__ = [
    "KNConv2d",
    "KNConv2d1x1",
    "KNResNet",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm2d1x1",
    "NFResNet",
    "Plan",
    "ScaledStdConv2d",
    "ScaledStdLinear",
    "Stage",
]
