"""Definitions and a tiny model that several tests compare with."""

from collections.abc import Callable

from torch import Tensor
from transformers import CLIPVisionConfig

from sap_lightning.functional.saliency import Reduction

REDUCTIONS: dict[Reduction, Callable[[Tensor], Tensor]] = {
    "mean_then_abs": lambda taylor: taylor.mean(0).abs(),
    "abs_then_mean": lambda taylor: taylor.abs().mean(0),
    "square": lambda taylor: taylor.square().mean(0),
}
"""Saliency from the Taylor terms θ·g_i of all anchors, first dimension."""

TINY_VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    projection_dim=16,
)
