"""The zoo, a table of any length: published layers, each one line of text with its paper.

A row is data: nothing in the compiler knows these names. A new row needs an independent definition
in plain torch among the tests, or they fail. Epsilon stands where the paper or its code puts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from normc.language.geometry import Groups


@dataclass(frozen=True)
class Entry:
    """One published layer."""

    name: str
    text: str
    paper: str  # its title
    arxiv: str
    year: int
    doc: str
    groups: Groups = "auto"
    eps: float = 1e-5

    @property
    def reference(self) -> str:
        """The paper as it is cited: title, arXiv number and year."""
        return f"{self.paper}, arXiv {self.arxiv}, {self.year}"


_EVONORM = ("Evolving Normalization-Activation Layers", "2004.02967", 2020)
_BATCH_NORM = (
    "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    "1502.03167",
    2015,
)
_LAYER_NORM = ("Layer Normalization", "1607.06450", 2016)
_GROUP_NORM = ("Group Normalization", "1803.08494", 2018)
_RMS_NORM = ("Root Mean Square Layer Normalization", "1910.07467", 2019)


_ROWS = (
    # --- statistics and an affine map -----------------------------------------------------------
    Entry(
        "batch_norm",
        "(x - batch_mean(x)) / batch_std(x) * gamma + beta",
        *_BATCH_NORM,
        "per channel, over samples and positions",
    ),
    Entry(
        "layer_norm",
        "(x - layer_mean(x)) / layer_std(x) * gamma + beta",
        *_LAYER_NORM,
        "per sample, over channels and positions; the affine map is per channel",
    ),
    Entry(
        "layer_norm_tokens",
        "(x - channel_mean(x)) / channel_std(x) * gamma + beta",
        *_LAYER_NORM,
        "per position, over channels: a transformer's LayerNorm",
    ),
    Entry(
        "group_norm",
        "(x - group_mean(x)) / group_std(x) * gamma + beta",
        *_GROUP_NORM,
        "per sample and group of channels",
    ),
    Entry(
        "instance_norm",
        "(x - instance_mean(x)) / instance_std(x) * gamma + beta",
        "Instance Normalization: The Missing Ingredient for Fast Stylization",
        "1607.08022",
        2016,
        "per sample and channel, over positions",
    ),
    Entry(
        "batch_instance_norm",
        "param rho[c] = 1; b = (x - batch_mean(x)) / batch_std(x); "
        "i = (x - instance_mean(x)) / instance_std(x); (rho*b + (1 - rho)*i) * gamma + beta",
        "Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks",
        "1805.07925",
        2018,
        "a learned blend of batch and instance normalization; rho is meant to stay in [0, 1]",
    ),
    Entry(
        "switchable_norm",
        "param mi; param ml; param mb; param vi; param vl; param vb; "
        "m = (exp(mi)*instance_mean(x) + exp(ml)*layer_mean(x) + exp(mb)*batch_mean(x))"
        " / (exp(mi) + exp(ml) + exp(mb)); "
        "v = (exp(vi)*instance_var(x) + exp(vl)*layer_var(x) + exp(vb)*batch_var(x))"
        " / (exp(vi) + exp(vl) + exp(vb)); "
        "(x - m) / sqrt(v + eps) * gamma + beta",
        "Differentiable Learning-to-Normalize via Switchable Normalization",
        "1806.10779",
        2018,
        "a softmax blend of instance, layer and batch statistics, all variances biased",
    ),
    Entry(
        "l1_batch_norm",
        "h = x - batch_mean(x); h / (1.2533141373155001*batch_mean(abs(h)) + eps) * gamma + beta",
        "Norm matters: efficient and accurate normalization schemes in deep networks",
        "1803.01814",
        2018,
        "the mean absolute deviation in place of the root; the constant is sqrt(pi/2)",
    ),
    Entry(
        "rms_norm",
        "x / channel_rms(x) * gamma",
        *_RMS_NORM,
        "per position, over channels, without a mean",
        eps=1e-6,
    ),
    Entry(
        "rms_norm_centred_gain",
        "param gamma[c] = 0; x / channel_rms(x) * (1 + gamma)",
        "Gemma: Open Models Based on Gemini Research and Technology",
        "2403.08295",
        2024,
        "RMSNorm whose gain is 1 + gamma, so that weight decay pulls it to 1",
        eps=1e-6,
    ),
    Entry(
        "pixel_norm",
        "x / channel_rms(x)",
        "Progressive Growing of GANs for Improved Quality, Stability, and Variation",
        "1710.10196",
        2017,
        "per position, over channels, nothing learned",
        eps=1e-8,
    ),
    Entry(
        "scale_norm",
        "param g = 1; g * x / max(channel_l2(x), eps)",
        "Transformers without Tears: Improving the Normalization of Self-Attention",
        "1910.05895",
        2019,
        "unit length times one learned scalar, which the paper starts at sqrt(C)",
    ),
    Entry(
        "qk_norm",
        "x / max(l2[k](x), eps)",
        "Query-Key Normalization for Transformers",
        "2010.04245",
        2020,
        "unit length per position and head of a query or key; the groups are the heads",
        eps=1e-12,
    ),
    Entry(
        "grn",
        "param gamma[c] = 0; param beta[c] = 0; h = instance_l2(x); "
        "gamma * (x * (h / (channel_mean(h) + eps))) + beta + x",
        "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
        "2301.00808",
        2023,
        "channels compete by the length of their maps; starts as the identity",
        eps=1e-6,
    ),
    # --- statistics and an activation in one ----------------------------------------------------
    Entry(
        "evonorm_b0",
        "x / max(batch_std(x), v*x + instance_std(x)) * gamma + beta",
        *_EVONORM,
        "needs batch statistics",
    ),
    Entry(
        "evonorm_b1",
        "x / max(batch_std(x), (x + 1) * instance_rms(x)) * gamma + beta",
        *_EVONORM,
        "needs batch statistics",
    ),
    Entry(
        "evonorm_b2",
        "x / max(batch_std(x), instance_rms(x) - x) * gamma + beta",
        *_EVONORM,
        "needs batch statistics",
    ),
    Entry(
        "evonorm_s0",
        "x * sigmoid(v*x) / group_std(x) * gamma + beta",
        *_EVONORM,
        "per sample; the best of the series",
    ),
    Entry(
        "evonorm_s1",
        "x * sigmoid(x) / group_std(x) * gamma + beta",
        *_EVONORM,
        "per sample; S0 with v fixed at 1",
    ),
    Entry(
        "evonorm_s2",
        "x * sigmoid(x) / group_rms(x) * gamma + beta",
        *_EVONORM,
        "per sample; S1 without centring",
    ),
    Entry(
        "frn_tlu",
        "param tau[c] = 0; max(x / instance_rms(x) * gamma + beta, tau)",
        "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of "
        "Deep Neural Networks",
        "1911.09737",
        2019,
        "per sample and channel, then a learned threshold",
    ),
    Entry(
        "bn_relu",
        "relu((x - batch_mean(x)) / batch_std(x) * gamma + beta)",
        *_BATCH_NORM,
        "the pair that EvoNorm set out to replace",
    ),
    Entry(
        "gn_silu",
        "silu((x - group_mean(x)) / group_std(x) * gamma + beta)",
        "Denoising Diffusion Probabilistic Models",
        "2006.11239",
        2020,
        "the block of diffusion U-Nets",
    ),
    # --- without statistics ---------------------------------------------------------------------
    Entry(
        "dyt",
        "param alpha = 0.5; gamma * tanh(alpha*x) + beta",
        "Transformers without Normalization",
        "2503.10622",
        2025,
        "Dynamic Tanh",
    ),
    Entry(
        "derf",
        "param alpha = 0.5; param shift = 0; gamma * erf(alpha*x + shift) + beta",
        "Stronger Normalization-Free Transformers",
        "2512.10938",
        2025,
        "Dynamic erf",
    ),
    # --- with more than one input or result -----------------------------------------------------
    Entry(
        "add_rms_norm",
        "input residual; h = x + residual; h / channel_rms(h) * gamma, h",
        *_RMS_NORM,
        "a pre-norm transformer's residual sum and its RMSNorm; the second result is the sum",
        eps=1e-6,
    ),
    Entry(
        "gated_rms_norm",
        "input z; h = x * silu(z); h / channel_rms(h) * gamma",
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
        "State Space Duality",
        "2405.21060",
        2024,
        "the output norm of Mamba-2",
    ),
    Entry(
        "ada_layer_norm",
        "input scale[n,c]; input shift[n,c]; "
        "(x - channel_mean(x)) / channel_std(x) * (1 + scale) + shift",
        "Scalable Diffusion Models with Transformers",
        "2212.09748",
        2022,
        "adaLN: LayerNorm over channels, modulated per sample",
        eps=1e-6,
    ),
    Entry(
        "adain",
        "input style_mean[n,c]; input style_std[n,c]; "
        "style_std * (x - instance_mean(x)) / instance_std(x) + style_mean",
        "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
        "1703.06868",
        2017,
        "instance statistics replaced by those of a style",
    ),
    Entry(
        "spade",
        "input scale; input shift; (x - batch_mean(x)) / batch_std(x) * (1 + scale) + shift",
        "Semantic Image Synthesis with Spatially-Adaptive Normalization",
        "1903.07291",
        2019,
        "batch normalization modulated at every element",
    ),
)

ZOO: dict[str, Entry] = {row.name: row for row in _ROWS}
