"""GradPruner's importance and its merge of blocks, against dense loops."""

from __future__ import annotations

import pytest
import torch
from references import randn, randn64
from torch.testing import assert_close

from sap_lightning.functional.igia import igia_matrix, importance, merged_weight
from sap_lightning.functional.lora import LoRALayer

STEPS = [LoRALayer(randn64(seed, 2, 7), randn64(10 + seed, 5, 2)) for seed in range(4)]
DENSE = [step.B @ step.A for step in STEPS]


def test_the_igia_matrix_is_the_mean_of_dense_squares():
    expected = torch.stack(DENSE).square().mean(0)
    assert_close(igia_matrix(STEPS).double(), expected, atol=1e-6, rtol=1e-6)


def test_importance_is_that_of_a_loop_over_dense_steps():
    assert importance(STEPS, "paper") == pytest.approx(float(torch.stack(DENSE).square().mean(0).sum()))
    assert importance(STEPS, "code") == pytest.approx(sum(float(one.norm()) for one in DENSE))


def test_a_weight_changes_only_where_the_other_matters_and_both_have_one_sign():
    kept, pruned, igia = randn(0, 6, 5), randn(1, 6, 5), randn(2, 6, 5).square()
    merged = merged_weight(kept, pruned, igia, density=0.2)
    candidates = igia.flatten().argsort(descending=True)[:6]
    expected = kept.flatten().clone()
    for index in candidates:
        if kept.flatten()[index] * pruned.flatten()[index] > 0:
            expected[index] += pruned.flatten()[index]
    assert torch.equal(merged.flatten(), expected) and not torch.equal(merged, kept)


def test_no_density_and_opposed_signs_change_no_bit():
    kept, igia = randn(0, 6, 5), randn(2, 6, 5).square()
    assert torch.equal(merged_weight(kept, randn(1, 6, 5), igia, density=0), kept)
    assert torch.equal(merged_weight(kept, -kept, igia, density=1), kept)


def test_zeros_have_no_sign_in_common():
    kept = torch.zeros(2, 2)
    assert torch.equal(merged_weight(kept, torch.ones(2, 2), torch.ones(2, 2), density=1), kept)
