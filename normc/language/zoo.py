"""The zoo, long because it is a table: published layers, each one line of text with its paper.

A row is data: nothing in the compiler knows these names. A new row needs an independent definition
in plain torch among the tests, or they fail. Epsilon stands where the paper or its code puts it.
What is published and no line of text can be is in `normc.language.beyond`, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from normc.language.geometry import Groups


class Published:
    """What has a paper: its title, its number at arXiv, its year."""

    paper: str
    arxiv: str
    year: int

    @property
    def reference(self) -> str:
        """The paper as it is cited: title, arXiv number and year."""
        return f"{self.paper}, arXiv {self.arxiv}, {self.year}"


@dataclass(frozen=True)
class Entry(Published):
    """One published layer."""

    name: str
    text: str
    paper: str  # its title
    arxiv: str
    year: int
    doc: str
    groups: Groups = "auto"
    eps: float = 1e-5


_EVONORM = ("Evolving Normalization-Activation Layers", "2004.02967", 2020)
_BATCH_NORM = (
    "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    "1502.03167",
    2015,
)
_LAYER_NORM = ("Layer Normalization", "1607.06450", 2016)
_GROUP_NORM = ("Group Normalization", "1803.08494", 2018)
RMS_NORM = ("Root Mean Square Layer Normalization", "1910.07467", 2019)
_FRN = (
    "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of "
    "Deep Neural Networks",
    "1911.09737",
    2019,
)
_DERF = ("Stronger Normalization-Free Transformers", "2512.10938", 2025)


def _pointwise(name: str, function: str, doc: str) -> Entry:
    """A candidate of the study that found Derf: a function of u, between two affine maps."""
    text = (
        f"param alpha = 0.5; param shift = 0; u = alpha*x + shift; f = {function}; gamma*f + beta"
    )
    return Entry(f"pointwise_{name}", text, *_DERF, doc)


# --- statistics and an affine map ----------------------------------------------------------------

_AFFINE = (
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
        "layer_norm_scaling",
        "param depth = 1; ((x - channel_mean(x)) / channel_std(x) * gamma + beta) / sqrt(depth)",
        "The Curse of Depth in Large Language Models",
        "2502.05795",
        2025,
        "depth is the index of the layer, from 1: a number to set and not to train",
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
        "batch_renorm",
        "input r[c]; input d[c]; ((x - batch_mean(x)) / batch_std(x) * r + d) * gamma + beta",
        "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        "1702.03275",
        2017,
        "r and d carry the batch's statistics over to the running ones and are constants for the "
        "gradient, so they are given: detached in training, 1 and 0 in evaluation",
    ),
    Entry(
        "batch_channel_norm",
        "param gain[c] = 1; param bias[c] = 0; "
        "b = (x - batch_mean(x)) / batch_std(x) * gamma + beta; "
        "(b - group_mean(b)) / group_std(b) * gain + bias",
        "Rethinking Normalization and Elimination Singularity in Neural Networks",
        "1911.09738",
        2019,
        "group normalization of batch normalization; gain and bias are per channel, the code's are "
        "per group",
    ),
    Entry(
        "divisive_norm",
        "v = x - channel_mean(x); v / sqrt(layer_mean(v*v) + eps) * gamma + beta",
        "Normalizing the Normalizers: Comparing and Extending Network Normalization Schemes",
        "1611.04520",
        2016,
        "centred over one field, divided by the energy of a wider one: windows in the paper, here "
        "a position and the layer; eps is its smoothing sigma**2",
        eps=1.0,
    ),
    Entry(
        "rms_norm",
        "x / channel_rms(x) * gamma",
        *RMS_NORM,
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
        "pono",
        "(x - channel_mean(x)) / channel_std(x)",
        "Positional Normalization",
        "1907.04312",
        2019,
        "per position, over channels, nothing learned; its mean and deviation go on to the decoder",
    ),
    Entry(
        "simple_rms_norm",
        "x / (channel_l2(x) / sqrt(channel_sum(1)) + eps)",
        "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
        "2307.14995",
        2023,
        "RMSNorm without a gain; eps is added to the root",
        eps=1e-8,
    ),
    Entry(
        "l2_norm",
        "param gamma[c] = 20; gamma * x / (channel_l2(x) + eps)",
        "ParseNet: Looking Wider to See Better",
        "1506.04579",
        2015,
        "unit length per position times a gain per channel, which starts at 20 as in SSD",
        eps=1e-10,
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
)

# --- statistics and an activation in one ---------------------------------------------------------

_ACTIVATED = (
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
        *_FRN,
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
    Entry(
        "gn_relu",
        "relu((x - group_mean(x)) / group_std(x) * gamma + beta)",
        *_GROUP_NORM,
        "the pair in a ResNet with group normalization",
    ),
    Entry(
        "bn_silu",
        "silu((x - batch_mean(x)) / batch_std(x) * gamma + beta)",
        "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
        "1905.11946",
        2019,
        "the pair of EfficientNet and of YOLO since its fifth version",
        eps=1e-3,
    ),
    Entry(
        "bn_add_relu",
        "input residual; relu((x - batch_mean(x)) / batch_std(x) * gamma + beta + residual)",
        "Deep Residual Learning for Image Recognition",
        "1512.03385",
        2015,
        "the end of a residual block: its last norm, the shortcut, and the activation",
    ),
    Entry(
        "ln_gelu",
        "gelu((x - channel_mean(x)) / channel_std(x) * gamma + beta)",
        "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations",
        "2006.11477",
        2020,
        "behind every convolution of the feature encoder",
    ),
    Entry(
        "rms_silu",
        "silu(x / max(channel_l2(x), eps) * sqrt(channel_sum(1)) * gamma)",
        "Wan: Open and Advanced Large-Scale Video Generative Models",
        "2503.20314",
        2025,
        "the block of Wan's video autoencoder: RMSNorm, which unlike GroupNorm is causal in time",
        eps=1e-12,
    ),
)

# --- without statistics --------------------------------------------------------------------------

_FREE = (
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
        *_DERF,
        "Dynamic erf",
    ),
    # Where sign(u) stands, the slope at u = 0 is 0, as automatic differentiation of the authors'
    # code has it; where theirs is not a number, after a root's infinite slope, `root` makes it 0.
    _pointwise("arctan", "0.6366197723675814*atan(u)", "the constant is 2/pi"),
    _pointwise("cubsign", "u**3 / (abs(u)**3 + 1)", "flat at 0"),
    _pointwise("exproot", "sign(u) * (1 - exp(-root(abs(u))))", "infinitely steep at 0"),
    _pointwise("expsign", "sign(u) * (1 - exp(-abs(u)))", "saturates exponentially"),
    _pointwise("isru", "u / sqrt(u*u + 1)", "the inverse square root unit"),
    _pointwise("linear_clip", "clamp(u, -1, 1)", "the hard tanh"),
    _pointwise("logquad_clip", "clamp(sign(u) * log1p(u*u), -1, 1)", "log(u**2 + 1), clipped"),
    _pointwise("logsign_clip", "clamp(sign(u) * log1p(abs(u)), -1, 1)", "log(abs(u) + 1), clipped"),
    _pointwise(
        "power23_clip", "clamp(sign(u) * root(abs(u))**(4/3), -1, 1)", "abs(u)**(2/3), clipped"
    ),
    _pointwise("relsign", "u / (sqrt(u*u + 1) + 1)", "isru with 1 added to its root"),
    _pointwise("saturlog", "sign(u) * log1p(abs(u)) / (log1p(abs(u)) + 1)", "saturates slowly"),
    _pointwise(
        "satursin",
        "sin(clamp(u, -1.5707963267948966, 1.5707963267948966))",
        "half a wave of a sine",
    ),
    _pointwise("smoothsign", "u / (1 + abs(u))", "the softsign"),
    Entry(
        "dyisru",
        "param b = 1; gamma * sqrt(channel_sum(1)) * x / sqrt(b + x*x) + beta",
        "On the Mathematical Relationship Between Layer Normalization and Dynamic Activation "
        "Functions",
        "2503.21708",
        2025,
        "RMSNorm whose sum over the other channels is one learned number; where b starts is ours",
    ),
    Entry(
        "tlu",
        "param tau[c] = 0; max(x, tau)",
        *_FRN,
        "the thresholded linear unit alone: relu whose zero is learned",
    ),
)

# --- with more than one input or result ----------------------------------------------------------

_SEVERAL = (
    Entry(
        "add_rms_norm",
        "input residual; h = x + residual; h / channel_rms(h) * gamma, h",
        *RMS_NORM,
        "a pre-norm transformer's residual sum and its RMSNorm; the second result is the sum",
        eps=1e-6,
    ),
    Entry(
        "add_layer_norm",
        "input residual; h = x + residual; "
        "(h - channel_mean(h)) / channel_std(h) * gamma + beta, h",
        "On Layer Normalization in the Transformer Architecture",
        "2002.04745",
        2020,
        "a transformer's residual sum and its LayerNorm: post-norm goes on with the first result, "
        "pre-norm with both",
    ),
    Entry(
        "peri_norm",
        "input residual; param gain[c] = 1; h = residual + x / channel_rms(x) * gain; "
        "h / channel_rms(h) * gamma, h",
        "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
        "2502.02732",
        2025,
        "between two sublayers: the output norm of one, the residual sum, the input norm of the "
        "next; the second result is the sum",
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
        "film",
        "input scale[n,c]; input shift[n,c]; scale * x + shift",
        "FiLM: Visual Reasoning with a General Conditioning Layer",
        "1709.07871",
        2017,
        "channels modulated per sample, without statistics",
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

# --- of weights: output channels are the samples, input channels the channels --------------------

_WEIGHTS = (
    Entry(
        "weight_norm",
        "input g[n]; g * x / layer_l2(x)",
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural "
        "Networks",
        "1602.07868",
        2016,
        "of a weight (output, input, ...): direction times a length g, one per output channel",
    ),
    Entry(
        "centred_weight_norm",
        "input g[n]; v = x - layer_mean(x); g * v / layer_l2(v)",
        "Normalization Techniques in Training DNNs: Methodology, Analysis and Application",
        "2009.12836",
        2020,
        "of a weight (output, input, ...): weight norm of the centred weight, Huang et al., ICCV "
        "2017; the paper named here is a survey",
    ),
    Entry(
        "weight_standardization",
        "(x - layer_mean(x)) / (root(layer_var(x)) + eps)",
        "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        "1903.10520",
        2019,
        "of a weight (output, input, ...); the variance is biased, as in the authors' code for "
        "TensorFlow and unlike that for PyTorch",
    ),
    Entry(
        "scaled_weight_standardization",
        "input gain[n]; (x - layer_mean(x)) / sqrt(max(layer_var(x) * layer_sum(1), eps)) * gain",
        "Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets",
        "2101.08692",
        2021,
        "of a weight (output, input, ...): variance 1/fan-in, times a gain per output channel",
        eps=1e-4,
    ),
    Entry(
        "demodulation",
        "input style[n,c]; w = style * x; w / sqrt(layer_sum(w*w) + eps)",
        "Analyzing and Improving the Image Quality of StyleGAN",
        "1912.04958",
        2019,
        "of a weight (output, input, ...): input channels are scaled by an image's style, output "
        "channels get unit length; for many images, (images * outputs, input, ...)",
        eps=1e-8,
    ),
)

# --- all of them ---------------------------------------------------------------------------------

GROUPS: dict[str, tuple[Entry, ...]] = {
    "Statistics and an affine map": _AFFINE,
    "Statistics and an activation in one": _ACTIVATED,
    "Without statistics": _FREE,
    "More than one input or result": _SEVERAL,
    "Of weights": _WEIGHTS,
}
"""The layers of the zoo by their kind, as the page on it has them."""

ZOO: dict[str, Entry] = {row.name: row for rows in GROUPS.values() for row in rows}
