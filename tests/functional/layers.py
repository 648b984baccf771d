"""Random updates in factor form, and those that are of less than their rank, for what is done to singular triplets."""

from __future__ import annotations

import pytest
import torch

from sap_lightning.functional.lora import LoRALayer

SHAPES = pytest.mark.parametrize(
    ("rank", "d_in", "d_out"), [(4, 7, 9), (4, 9, 7), (1, 7, 9), (9, 6, 8), (9, 8, 6), (20, 6, 8)]
)


def random_layer(rank: int = 4, d_in: int = 7, d_out: int = 9, scale: float = 0.5, seed: int = 0) -> LoRALayer:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return LoRALayer(A, B, scale)


def rank_one_update() -> LoRALayer:
    """Four ranks that are all multiples of the first."""
    A, B, scale = random_layer()
    multiples = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    return LoRALayer(multiples[:, None] * A[0], B[:, :1] * multiples, scale)


def zero_update() -> LoRALayer:
    """What a client that never trained sends: B is zero."""
    A, B, scale = random_layer()
    return LoRALayer(A, torch.zeros_like(B), scale)


def repeated_ranks() -> LoRALayer:
    A, B, scale = random_layer()
    return LoRALayer(torch.cat([A, A]), torch.cat([B, B], dim=1), scale)


DEGENERATE = pytest.mark.parametrize("make", [zero_update, rank_one_update, repeated_ranks])
