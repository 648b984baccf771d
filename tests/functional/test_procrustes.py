"""Dense alignment against scipy's orthogonal Procrustes, least squares by numpy, and the same in factor form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import randn
from scipy.linalg import orthogonal_procrustes
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.functional.procrustes import Side, aligned


def by_definition(delta: Tensor, reference: Tensor) -> Tensor:
    """ΔW·P·Λ with P by scipy and each column's scale by numpy's least squares."""
    tau, ref = delta.double().numpy(), reference.double().numpy()
    rotation, _ = orthogonal_procrustes(tau, ref)
    rotated = tau @ rotation
    scales = [np.linalg.lstsq(rotated[:, [i]], ref[:, i], rcond=None)[0][0] for i in range(ref.shape[1])]
    return torch.from_numpy(rotated * np.array(scales)).float()


@pytest.mark.parametrize("shape", [(12, 7), (7, 7)])
def test_inputs_are_rotated_and_scaled_as_by_definition(shape: tuple[int, int]) -> None:
    delta, reference = randn(0, *shape), randn(1, *shape)
    assert_close(aligned(delta, reference), by_definition(delta, reference), atol=1e-5, rtol=1e-5)
    assert_close(aligned(delta.T, reference.T, "output"), by_definition(delta, reference).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_wide_and_low_rank_updates_are_aligned_as_their_factors_are(side: Side) -> None:
    one, other = (LoRALayer(randn(seed, 3, 11), randn(seed + 10, 6, 3)) for seed in (0, 1))
    expected = dense(aligned(one, other, side))
    assert_close(aligned(one.delta(), other.delta(), side), expected, atol=1e-4, rtol=1e-4)


def test_what_was_only_turned_is_recovered() -> None:
    reference = randn(0, 12, 7)
    rotation = torch.linalg.qr(randn(3, 7, 7)).Q
    assert_close(aligned(reference @ rotation.T, reference), reference, atol=1e-5, rtol=1e-5)
    assert_close(aligned(reference, reference), reference, atol=1e-5, rtol=1e-5)


def test_zero_stays_zero() -> None:
    assert torch.equal(aligned(torch.zeros(4, 3), randn(0, 4, 3)), torch.zeros(4, 3))
    assert torch.equal(aligned(randn(0, 4, 3), torch.zeros(4, 3)), torch.zeros(4, 3))
