"""Updates brought back down to the rank of one adapter, against their definitions on dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer, stack
from sap_lightning.functional.rounds import added, brought_down, corrected_mean, mean_factors, mean_residual

WEIGHTS = [0.5, 0.3, 0.2]
D_OUT, D_IN, RANK = 9, 12, 2


def layers(scale: float = 1.5) -> list[LoRALayer]:
    return [LoRALayer(randn64(k, RANK, D_IN), randn64(10 + k, D_OUT, RANK), scale) for k in range(3)]


def dense_mean(of: list[LoRALayer], weights: list[float] = WEIGHTS) -> Tensor:
    return sum((w * layer.scale * layer.B @ layer.A for w, layer in zip(weights, of, strict=True)), torch.tensor(0.0))


def test_factors_are_averaged_apart():
    of = layers()
    mean = mean_factors(of, WEIGHTS)
    A = WEIGHTS[0] * of[0].A + WEIGHTS[1] * of[1].A + WEIGHTS[2] * of[2].A
    B = WEIGHTS[0] * of[0].B + WEIGHTS[1] * of[1].B + WEIGHTS[2] * of[2].B
    assert_close(mean.delta(), 1.5 * B @ A)
    assert (mean.delta() - dense_mean(of)).norm() > 1, "which is not the mean of the updates"


def test_the_factors_of_one_client_stay_as_they_are_bit_for_bit():
    (one,) = layers()[:1]
    mean = mean_factors([one], [1.0])
    assert torch.equal(mean.A, one.A) and torch.equal(mean.B, one.B) and mean.scale == one.scale


@pytest.mark.parametrize("other", [LoRALayer(randn64(0, 3, D_IN), randn64(1, D_OUT, 3), 1.5), layers(0.5)[0]])
def test_factors_of_other_rank_or_scale_have_no_mean(other):
    with pytest.raises(ValueError, match="of one rank and scale"):
        mean_factors([layers()[0], other], [0.5, 0.5])


@pytest.mark.parametrize("rank", [1, 2, 5, 20])
@pytest.mark.parametrize("form", ["factors", "dense"])
def test_what_is_brought_down_is_the_best_of_its_rank(rank, form):
    of = [*layers(), LoRALayer(randn64(5, 4, D_IN), randn64(6, D_OUT, 4), 0.7)]  # clients of two ranks
    weights = [0.4, 0.3, 0.2, 0.1]
    delta = dense_mean(of, weights)
    down = brought_down(stack(of, weights) if form == "factors" else delta, rank)
    error = torch.linalg.svdvals(delta)[rank:].square().sum().sqrt()
    assert_close((down.delta() - delta).norm(), error, atol=1e-10, rtol=1e-8)
    assert_close(down.A @ down.A.T, torch.eye(down.rank, dtype=torch.float64))


def test_a_client_of_lower_rank_takes_the_first_of_what_was_brought_down():
    delta = dense_mean(layers())
    down = brought_down(delta, 4)
    first = LoRALayer(down.A[:2], down.B[:, :2])
    assert_close(first.delta(), brought_down(delta, 2).delta())


def test_directions_in_which_nothing_is_changed_can_still_be_trained():
    down = brought_down(LoRALayer(torch.eye(3, 5), torch.zeros(4, 3)), 3)
    assert not down.B.any() and (down.A.norm(dim=1) > 0.99).all()


def test_mean_and_residual_make_the_exact_mean():
    of = layers()
    residual = mean_residual(of, WEIGHTS)
    assert_close(mean_factors(of, WEIGHTS).delta() + residual.delta(), dense_mean(of))
    assert residual.rank == 3 * RANK, "of rank K·r, though it is a sum of K + 1 updates"


def test_a_client_alone_has_no_residual():
    assert mean_residual(layers()[:1], [1.0]).delta().abs().max() < 1e-12


def misfit(B: Tensor, of: list[LoRALayer], strength: float) -> Tensor:
    """LoRA-FAIR's objective as the paper writes it, dense."""
    mean = mean_factors(of, WEIGHTS)
    cosine = torch.cosine_similarity(dense_mean(of).flatten(), (B @ mean.A).flatten(), dim=0)
    return 1 - cosine + strength * (B - mean.B).square().sum()


@pytest.mark.parametrize("strength", [0.01, 1e-4, 1.0])
@pytest.mark.parametrize("scale", [1.5, 1e-3])
def test_the_corrected_b_is_where_the_objective_is_least(strength, scale):
    of = layers(scale)
    B = corrected_mean(of, WEIGHTS, strength).B.requires_grad_()
    value = misfit(B, of, strength)
    (gradient,) = torch.autograd.grad(value, B)
    assert gradient.norm() < 1e-7
    assert value < misfit(mean_factors(of, WEIGHTS).B, of, strength)


def test_the_corrected_b_is_where_the_authors_descent_leads():
    of = layers()
    B = mean_factors(of, WEIGHTS).B.clone().requires_grad_()
    descent = torch.optim.SGD([B], lr=5.0)
    for _ in range(300):
        descent.zero_grad()
        misfit(B, of, 0.01).backward()
        descent.step()
    assert_close(corrected_mean(of, WEIGHTS, 0.01).B, B.detach(), atol=1e-5, rtol=1e-5)


def test_a_corrected_mean_keeps_a_and_the_scale():
    of = layers()
    corrected, mean = corrected_mean(of, WEIGHTS), mean_factors(of, WEIGHTS)
    assert torch.equal(corrected.A, mean.A) and corrected.scale == mean.scale


@pytest.mark.parametrize("scale", [1.5, 0.0])
def test_there_is_nothing_to_correct_where_nothing_was_trained(scale):
    of = [layer._replace(B=torch.zeros_like(layer.B), scale=scale) for layer in layers()]
    assert torch.equal(corrected_mean(of, WEIGHTS).B, of[0].B)


def test_what_is_added_up_keeps_within_the_size_of_the_weight():
    total, expected = layers()[0], layers()[0].delta()
    for k in range(20):
        more = LoRALayer(randn64(20 + k, RANK, D_IN), randn64(40 + k, D_OUT, RANK), 0.3)
        total, expected = added(total, more), expected + more.delta()
        assert total.rank == min(RANK * (k + 2), D_OUT)
        assert_close(total.delta(), expected)
