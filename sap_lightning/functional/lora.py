"""One adapted linear layer in factor form, and exact linear algebra on it without the dense product."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoRALayer(NamedTuple):
    """ΔW = scale · B·A of one linear layer (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Attributes:
        A: down projection, shape (r, d_in).
        B: up projection, shape (d_out, r).
        scale: s, usually alpha / r.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """The dense update ΔW, shape (d_out, d_in)."""
        return self.scale * (self.B @ self.A)
