"""First-order Taylor saliency S = |θ·∂L/∂θ| over anchors (Molchanov et al. 2019, arXiv:1906.10771)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sap_lightning.functional.spaces import Parameters, Space

Reduction = Literal["mean_then_abs", "abs_then_mean", "square"]


def alignment_loss(image_features: Tensor, caption_features: Tensor) -> Tensor:
    """1 − cos(image_i, caption_i) of every anchor pair, shape (n,), from features of shape (n, d)."""
    return 1 - cosine_similarity(image_features, caption_features, dim=-1)


class SaliencySum:
    """Running sum over anchors of one layer's saliency in a space.

    With g_i the gradient of anchor i's own loss: ``mean_then_abs`` is |θ·mean g_i|, ``abs_then_mean`` is
    mean |θ·g_i|, and ``square`` is mean (θ·g_i)², θ² times the diagonal Fisher information.
    """

    def __init__(self, space: Space, reduction: Reduction) -> None:
        self.space = space
        self.reduction = reduction
        self.sums: Parameters = tuple(torch.zeros_like(p) for p in space.parameters)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds n anchors: layer inputs x (n, T, d_in) and gradients g (n, T, d_out) of each one's loss."""
        if self.reduction == "mean_then_abs":
            # The sum over anchors of gᵢᵀxᵢ is one product over all their tokens.
            x, g = x.flatten(0, 1)[None], g.flatten(0, 1)[None]
        for x_i, g_i in zip(x, g, strict=True):
            gradients = self.space.gradients(x_i, g_i)
            for total, theta, gradient in zip(self.sums, self.space.parameters, gradients, strict=True):
                total += self._term(gradient.mul_(theta))

    def _term(self, taylor: Tensor) -> Tensor:
        if self.reduction == "abs_then_mean":
            return taylor.abs_()
        return taylor.square_() if self.reduction == "square" else taylor

    def scores(self, anchors: float) -> Parameters:
        """Saliency of every parameter after this many anchors, each of its parameter's shape."""
        means = (total / anchors for total in self.sums)
        return tuple(mean.abs() if self.reduction == "mean_then_abs" else mean for mean in means)
