"""How much a part's output changes, by hand for linear models."""

from __future__ import annotations

import pytest
import torch
from references import randn64
from torch.testing import assert_close

from sap_lightning.functional.sensitivity import most_sensitive, relative_change, steepest

X, W = randn64(0, 3, 2, 4), randn64(1, 5, 4)


def test_the_change_has_its_length_and_no_other_of_it_raises_a_linear_loss_more():
    gradients = randn64(2, 3, 2, 4)
    change = steepest(gradients, radius=0.7)
    assert_close(change.flatten(1).norm(dim=1), torch.full((3,), 0.7, dtype=torch.float64))
    raised = (gradients * change).flatten(1).sum(1)
    for seed in range(3, 20):
        other = randn64(seed, 3, 2, 4)
        other *= 0.7 / other.flatten(1).norm(dim=1).view(3, 1, 1)
        assert (raised > (gradients * other).flatten(1).sum(1)).all()


def test_no_change_of_the_input_is_none_of_the_output():
    change = steepest(torch.ones(3, 2, 4, dtype=torch.float64), radius=0.0)
    assert not relative_change(X @ W.T, (X + change) @ W.T).any()


def test_of_a_linear_model_it_is_the_length_of_the_change_over_that_of_the_output():
    change = steepest(randn64(2, 3, 2, 4), radius=0.1)
    found = relative_change(X @ W.T, (X + change) @ W.T)
    expected = [float((one @ W.T).norm() / (x @ W.T).norm()) for x, one in zip(X, change, strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_a_share_of_the_parts_is_chosen_and_one_at_least():
    sensitivity = {3: 0.4, 0: 0.3, 2: 0.2, 1: 0.1}
    for share, parts in ((1.0, [0, 1, 2, 3]), (0.75, [0, 2, 3]), (0.5, [0, 3]), (0.01, [3])):
        assert most_sensitive(sensitivity, share) == parts
