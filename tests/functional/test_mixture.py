"""Losses of Pilot's connectors, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from sap_lightning.functional.mixture import balance_loss, difference_loss, router_z_loss

DRAW = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def test_the_raw_difference_is_the_frobenius_norm_of_the_product():
    task, own = drawn(3, 4, 5), drawn(3, 4, 5)
    by_loop = 0.0
    for image in range(3):
        for i in range(5):
            for j in range(5):
                by_loop += sum(float(task[image, n, i] * own[image, n, j]) for n in range(4)) ** 2
    assert float(difference_loss(task, own, "raw")) == pytest.approx(by_loop / 3)


def test_the_normalized_difference_is_that_of_rows_of_length_one():
    task, own = drawn(3, 4, 5), drawn(3, 4, 5)
    least = 0.01 * task.norm(dim=-1).mean()
    one, other = (x / (x.norm(dim=-1, keepdim=True) ** 2 + least**2).sqrt() for x in (task, own))
    expected = sum(float((one[n].T @ other[n]).norm() ** 2) for n in range(3)) / 3 / 4**2
    assert float(difference_loss(task, own)) == pytest.approx(expected)


def test_the_normalized_difference_lies_in_0_to_1_and_knows_no_length():
    same = torch.ones(2, 4, 5, dtype=torch.float64)
    assert float(difference_loss(same, same)) == pytest.approx(1, abs=1e-3)
    task, own = drawn(2, 4, 5), drawn(2, 4, 5)
    assert float(difference_loss(10 * task, 10 * own)) == pytest.approx(float(difference_loss(task, own)))
    apart = torch.zeros(2, 4, 5, dtype=torch.float64)
    apart[..., 0] = 1
    beside = torch.zeros_like(apart)
    beside[:, 0, 1] = 1
    assert float(difference_loss(apart[:, 1:], beside[:, 1:])) == 0


def test_the_difference_has_a_gradient_where_a_client_s_own_part_is_still_zero():
    own = torch.zeros(1, 4, 5, dtype=torch.float64, requires_grad=True)
    loss = difference_loss(drawn(1, 4, 5), own)
    loss.backward()
    assert float(loss.detach()) == 0
    assert own.grad is not None and own.grad.isfinite().all()


def test_balance_is_1_where_all_experts_are_used_alike_and_t_where_one_is():
    alike = torch.eye(4, dtype=torch.float64).repeat(3, 1) * 1e-6 + 0.25
    assert float(balance_loss(alike / alike.sum(-1, keepdim=True))) == pytest.approx(1)
    one = torch.tensor([[1.0, 0, 0]]).expand(7, -1)
    assert float(balance_loss(one)) == 3


def test_balance_counts_tokens_by_their_largest_share():
    shares = drawn(2, 5, 3).softmax(-1)
    chosen = [0, 0, 0]
    for token in shares.reshape(-1, 3):
        chosen[int(token.argmax())] += 1
    expected = 3 * sum(count / 10 * float(shares[..., k].mean()) for k, count in enumerate(chosen))
    assert float(balance_loss(shares)) == pytest.approx(expected)


def test_the_router_s_z_loss_at_zero_is_log_squared_of_the_experts():
    assert float(router_z_loss(torch.zeros(4, 6, 3))) == pytest.approx(math.log(3) ** 2)
