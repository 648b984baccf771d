"""Softmax within groups of labels, against each group by itself."""

from __future__ import annotations

import torch
from references import randn64
from torch.testing import assert_close

from sap_lightning.functional.groups import softmax_within


def test_each_group_is_the_softmax_of_its_own_labels():
    logits, groups = 40 * randn64(0, 5, 6), [[4, 1], [0, 2, 5], [3]]
    found = softmax_within(logits, groups)
    for numbers in groups:
        powers = logits[:, numbers].exp()
        assert_close(found[:, numbers], powers / powers.sum(1, keepdim=True))
    assert torch.equal(found[:, 3], torch.ones(5, dtype=torch.float64))


def test_one_group_is_softmax_bit_for_bit():
    logits = randn64(1, 5, 6).float()
    assert torch.equal(softmax_within(logits, [list(range(6))]), logits.softmax(-1))


def test_a_group_that_all_others_drown_is_told_apart_too():
    logits = torch.tensor([[0.0, 1.0, 500.0, 501.0]])
    found = softmax_within(logits, [[0, 1], [2, 3]])
    assert torch.equal(found[:, :2], found[:, 2:]) and 0 < float(found[0, 0]) < 0.5
