"""What the anchors' gradients say of parameters: first-order Taylor saliency S = |θ·∂L/∂θ| and its relatives.

Molchanov et al. 2019, arXiv:1906.10771.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from sap_lightning.functional.spaces import Parameters, Space

Reduction = Literal["mean_then_abs", "abs_then_mean", "square"]
AnchorLoss = Literal["cosine", "contrastive", "contrastive_symmetric", "entropy"]


def alignment_loss(image_features: Tensor, caption_features: Tensor) -> Tensor:
    """1 − cos(image_i, caption_i) of every anchor pair, shape (n,), from features of shape (n, d).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.saliency import alignment_loss
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
        >>> captions = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # parallel, at right angles, cos 3/5
        >>> [round(x, 3) for x in alignment_loss(images, captions).tolist()]
        [0.0, 1.0, 0.4]
    """
    return 1 - cosine_similarity(image_features, caption_features, dim=-1)


def caption_margin(image_features: Tensor, captions: Tensor, indices: Tensor) -> Tensor:
    """How much closer every anchor's image is to its own caption than, on average, to the others, shape (n,).

    cos(image_i, its caption) less the mean of its cosines with the other captions; 0 on average by chance.

    Args:
        image_features: normalised, shape (n, d).
        captions: normalised features of all m ≥ 2 captions, shape (m, d).
        indices: for each image the index of its caption, shape (n,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.saliency import caption_margin
        >>> images, captions = torch.eye(3)[[0, 2]], torch.eye(3)
        >>> caption_margin(images, captions, torch.tensor([0, 1])).tolist()  # the second image is of another caption
        [1.0, -0.5]
    """
    similarities = image_features @ captions.T
    own = similarities.gather(1, indices[:, None]).squeeze(1)
    return own - (similarities.sum(1) - own) / (len(captions) - 1)


def contrastive_loss(image_features: Tensor, captions: Tensor, indices: Tensor, logit_scale: float) -> Tensor:
    """InfoNCE from image to text of every anchor (van den Oord et al. 2018, arXiv:1807.03748), shape (n,).

    −log softmax_j(scale · ⟨image_i, caption_j⟩) at j the image's own caption. Every other caption is a negative, also
    those of other batches, so each image has a loss of its own.

    Args:
        image_features: normalised, shape (n, d).
        captions: normalised features of all m captions, shape (m, d).
        indices: for each image the index of its caption, shape (n,).
        logit_scale: the base's inverse temperature.

    Example:
        >>> import math
        >>> import torch
        >>> from sap_lightning.functional.saliency import contrastive_loss
        >>> captions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the second looks like the other's caption
        >>> losses = contrastive_loss(images, captions, torch.tensor([0, 0]), logit_scale=math.log(3))
        >>> [round(p, 3) for p in (-losses).exp().tolist()]  # softmax of their own caption: 3/(3 + 1) and 1/(1 + 3)
        [0.75, 0.25]
    """
    return cross_entropy(logit_scale * image_features @ captions.T, indices, reduction="none")


def symmetric_contrastive_loss(image_features: Tensor, captions: Tensor, logit_scale: float) -> Tensor:
    """CLIP's own loss of a batch (Radford et al. 2021, arXiv:2103.00020), a scalar.

    The mean over the batch of InfoNCE from image to text and from text to image. An image's negatives are the batch's
    other captions, a caption's its other images, so the loss is the batch's and no anchor has one of its own.

    Args:
        image_features: normalised, shape (n, d).
        captions: normalised features of their captions, shape (n, d).
        logit_scale: the base's inverse temperature.

    Example:
        >>> import math
        >>> import torch
        >>> from sap_lightning.functional.saliency import symmetric_contrastive_loss
        >>> captions = torch.eye(2)
        >>> images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # the second looks like the other's caption
        >>> loss = symmetric_contrastive_loss(images, captions, logit_scale=math.log(3))
        >>> round(float((-4 * loss).exp()), 4)  # images 3/4 and 1/4, captions 1/2 and 1/2
        0.0469
    """
    logits, own = logit_scale * image_features @ captions.T, torch.arange(len(captions), device=captions.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def entropy_loss(image_features: Tensor, captions: Tensor, logit_scale: float) -> Tensor:
    """Entropy of every anchor image's distribution over all captions, shape (n,), which needs no image's own caption.

    −Σ_j p_j·log p_j with p = softmax_j(scale · ⟨image_i, caption_j⟩); from 0 where one is certain to log m.

    Args:
        image_features: normalised, shape (n, d).
        captions: normalised features of all m captions, shape (m, d).
        logit_scale: the base's inverse temperature.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.saliency import entropy_loss
        >>> captions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> images = torch.tensor([[1.0, 0.0], [0.6, 0.6]])  # like the first caption, and like both alike
        >>> [round(x, 3) for x in entropy_loss(images, captions, logit_scale=20.0).tolist()]  # 0 and log 2
        [0.0, 0.693]
    """
    log_p = log_softmax(logit_scale * image_features @ captions.T, dim=1)
    return -(log_p.exp() * log_p).sum(1)


class GradientSum:
    """Running sum over anchors of the gradients of one layer's parameters in a space.

    With g_i the gradient of anchor i's own loss: ``mean_then_abs`` gathers mean g_i, ``abs_then_mean`` mean |g_i|, and
    ``square`` mean g_i², the diagonal Fisher information.

    Args:
        space: the layer's.
        reduction: which of the three.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.saliency import GradientSum
        >>> from sap_lightning.functional.spaces import DeltaSpace
        >>> space = DeltaSpace(LoRALayer(A=torch.ones(1, 2), B=torch.ones(1, 1)))
        >>> x = torch.tensor([[[4.0, 2.0]], [[2.0, 2.0]]])  # two anchors of one token
        >>> g = torch.tensor([[[1.0]], [[-1.0]]])  # so their gradients are [[4, 2]] and [[-2, -2]]
        >>> for reduction in ("mean_then_abs", "abs_then_mean", "square"):
        ...     total = GradientSum(space, reduction)
        ...     total.add(x, g)
        ...     print(reduction, total.mean(anchors=2)[0].tolist())
        mean_then_abs [[1.0, 0.0]]
        abs_then_mean [[3.0, 2.0]]
        square [[10.0, 4.0]]
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
            for total, gradient in zip(self.sums, self.space.gradients(x_i, g_i), strict=True):
                total += term(gradient, self.reduction)

    def mean(self, anchors: float) -> Parameters:
        """The mean over this many anchors for every parameter, each of its parameter's shape."""
        return tuple(total / anchors for total in self.sums)


def term(gradient: Tensor, reduction: Reduction) -> Tensor:
    """What one anchor's gradient adds to the mean, g_i, |g_i| or g_i², in its own memory.

    Args:
        gradient: g_i of any shape, which is overwritten.
        reduction: what the mean is of.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.saliency import term
        >>> for reduction in ("mean_then_abs", "abs_then_mean", "square"):
        ...     print(term(torch.tensor([-3.0, 2.0]), reduction).tolist())
        [-3.0, 2.0]
        [3.0, 2.0]
        [9.0, 4.0]
    """
    if reduction == "abs_then_mean":
        return gradient.abs_()
    return gradient.square_() if reduction == "square" else gradient


def saliency(parameters: Parameters, gradients: Parameters, reduction: Reduction) -> Parameters:
    """|θ·mean g_i|, mean |θ·g_i| or mean (θ·g_i)² from gradients reduced in the same way.

    Args:
        parameters: θ, tensors of any shape.
        gradients: mean g_i, mean |g_i| or mean g_i², each of its parameter's shape.
        reduction: how the gradients were reduced.

    Returns:
        The scores, each of its parameter's shape.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.saliency import saliency
        >>> theta, gradient = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 2.0])
        >>> saliency((theta,), (gradient,), "mean_then_abs")[0].tolist()
        [2.0, 6.0]
        >>> saliency((theta,), (gradient,), "square")[0].tolist()  # 4·1 and 9·2
        [4.0, 18.0]
    """
    if reduction == "square":
        return tuple(theta.square() * g for theta, g in zip(parameters, gradients, strict=True))
    return tuple((theta * g).abs() for theta, g in zip(parameters, gradients, strict=True))


def loss_reduction(parameters: Parameters, gradients: Parameters) -> Parameters:
    """−θ·mean g_i: by how much a parameter lowers the loss; below 0 it raises it (sign-aware saliency).

    Args:
        parameters: θ, tensors of any shape.
        gradients: mean g_i, each of its parameter's shape.

    Returns:
        The scores, each of its parameter's shape.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.saliency import loss_reduction
        >>> theta, gradient = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 2.0])
        >>> loss_reduction((theta,), (gradient,))[0].tolist()
        [-2.0, 6.0]
    """
    return tuple(-theta * g for theta, g in zip(parameters, gradients, strict=True))
