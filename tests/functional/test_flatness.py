"""Scores of weights and neurons against loops in float64."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from sap_lightning.functional.flatness import sharpness_aware_saliency


def test_saliency_is_less_where_the_direction_is_large() -> None:
    weight, direction = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sharpness, floor, slope in (("code", 1, 0.3), ("paper", 1e-6, 1)):
        score = sharpness_aware_saliency(weight, direction, sharpness, 0.3)
        for w, g, s in zip(weight.flatten(), direction.flatten(), score.flatten(), strict=True):
            assert_close(s, abs(w * g) / (floor + slope * g * g))
