"""Beyond: published layers that no formula can be, each with the reason; a table for the docs."""

from __future__ import annotations

from dataclasses import dataclass

from normc.language.zoo import RMS_NORM, Published


@dataclass(frozen=True)
class Beyond(Published):
    """One published layer that the language cannot express, and why."""

    name: str
    paper: str  # its title
    arxiv: str
    year: int
    reason: str


BEYOND = (
    Beyond(
        "power_norm",
        "PowerNorm: Rethinking Batch Normalization in Transformers",
        "2003.07845",
        2020,
        "its backward is no derivative: it takes running averages of gradients for the batch's",
    ),
    Beyond(
        "moving_average_batch_norm",
        "Towards Stabilizing Batch Statistics in Backward of Batch Normalization",
        "2001.06838",
        2020,
        "its backward is no derivative: the statistics of gradients are moving averages too",
    ),
    Beyond(
        "online_norm",
        "Online Normalization for Training Neural Networks",
        "1905.05894",
        2019,
        "a sample's statistics depend on the samples before it; its backward is no derivative",
    ),
    Beyond(
        "ada_norm",
        "Understanding and Improving Layer Normalization",
        "1911.07013",
        2019,
        "one of its factors is a constant for the gradient, and a formula has no such mark",
    ),
    Beyond(
        "decorrelated_batch_norm",
        "Decorrelated Batch Normalization",
        "1804.08450",
        2018,
        "the root of a covariance matrix: products of channels with each other, and eigenvectors",
    ),
    Beyond(
        "iterative_norm",
        "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
        "1904.03441",
        2019,
        "the root of a covariance matrix by Newton's iteration: products of matrices",
    ),
    Beyond(
        "spectral_norm",
        "Spectral Normalization for Generative Adversarial Networks",
        "1802.05957",
        2018,
        "the largest singular value of a weight, from vectors that power iteration carries along",
    ),
    Beyond(
        "generalized_divisive_norm",
        "Density Modeling of Images using a Generalized Normalization Transformation",
        "1511.06281",
        2015,
        "each channel is divided by its own weighted sum over channels: a learned matrix",
    ),
    Beyond(
        "attentive_norm",
        "Attentive Normalization",
        "1908.01259",
        2019,
        "affine maps mixed by weights from a matrix product over the channels",
    ),
    Beyond(
        "mode_norm",
        "Mode Normalization",
        "1810.05466",
        2018,
        "samples are sorted into modes by weights from a matrix product over the channels",
    ),
    Beyond(
        "kernel_norm",
        "Kernel Normalized Convolutional Networks",
        "2205.10089",
        2022,
        "statistics over windows that slide over positions; `normc.nn.KernelNorm2d` has them",
    ),
    Beyond(
        "local_context_norm",
        "Local Context Normalization: Revisiting Local Normalization",
        "1912.05845",
        2019,
        "statistics over windows of positions and channels, as in local response normalization",
    ),
    Beyond(
        "partial_rms_norm",
        *RMS_NORM,
        "the statistic of the first few channels only: an axis is reduced as a whole",
    ),
    Beyond(
        "ghost_batch_norm",
        "Train longer, generalize better: closing the generalization gap in large batch training "
        "of neural networks",
        "1705.08741",
        2017,
        "statistics over parts of the batch: an axis is reduced as a whole",
    ),
    Beyond(
        "ibn_net",
        "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
        "1807.09441",
        2018,
        "instance norm for one half of the channels and batch norm for the other: two formulas",
    ),
)
"""Published layers that no formula can be, for the page on the zoo."""
