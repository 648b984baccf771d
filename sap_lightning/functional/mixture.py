"""Losses of Pilot's connectors: features of a task apart from those of a client, and a router that uses all experts.

Xiong et al., AAAI 2025, arXiv:2501.13985; the authors' code was not published when we looked. Balance and z losses are
those of Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, eq. 4) and ST-MoE (Zoph et al. 2022, arXiv:2202.08906,
eq. 5).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Difference = Literal["normalized", "raw"]
LEAST_LENGTH = 0.01
"""Below this share of a task's mean length a feature's direction counts less and less."""


def difference_loss(task: Tensor, own: Tensor, form: Difference = "normalized") -> Tensor:
    """‖X_tᵀ·X_s‖²_F, mean over images: 0 where a task's features and a client's own are at right angles.

    As printed (raw) it grows with the number and length of features. Our normalized form has rows of length 1 at most,
    x / √(‖x‖² + ε²) with ε a hundredth of the mean length of the task's, without a gradient, and is divided by N²: it
    lies in [0, 1].

    Args:
        task: X_t, shape (n, N, C).
        own: X_s, of the same shape.
        form: of the two.
    """
    if form == "raw":
        return (task.mT @ own).square().sum((-2, -1)).mean()
    least = LEAST_LENGTH * task.detach().norm(dim=-1).mean()
    task, own = (x / (x.square().sum(-1, keepdim=True) + least**2).sqrt() for x in (task, own))
    # ‖XᵀY‖² = Σ (XXᵀ)∘(YYᵀ), and an image has fewer features than they have dimensions.
    return ((task @ task.mT) * (own @ own.mT)).sum((-2, -1)).mean() / task.shape[-2] ** 2


def balance_loss(shares: Tensor) -> Tensor:
    """T·Σ f_i·P̄_i of a router: 1 where it uses all experts alike, T where it uses one.

    Args:
        shares: P of each token, shape (…, T); f is the share of tokens of which it is the largest, without a gradient.
    """
    experts = shares.shape[-1]
    tokens = shares.reshape(-1, experts)
    chosen = one_hot(tokens.argmax(-1), experts).to(tokens.dtype).mean(0)
    return experts * (chosen * tokens.mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean of log²Σexp of a router's logits, shape (…, T): 0 where they are so small that softmax is exact."""
    return torch.logsumexp(logits, -1).square().mean()
