"""GRASP's scores, factors and counts against autograd and dense algebra in float64."""

from __future__ import annotations

import pytest
import torch
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.subspaces import Triplets
from sap_lightning.functional.triplets import (
    angular_distances,
    highest,
    is_smaller,
    kept_by_energy,
    kept_by_parameters,
    kept_by_share,
    token_cosines,
    triplet_scores,
)

SHAPES = [(8, 5), (5, 8), (6, 6)]
SCORES = ["paper", "code", "gradient"]


def loss_of(weight: Tensor) -> Tensor:
    """Any loss that is not linear in a weight."""
    return torch.tanh(randn64(1, 9, weight.shape[1]) @ weight.T).square().sum(1).log().sum()


def leaves(weight: Tensor) -> list[Tensor]:
    U, sigma, V = torch.linalg.svd(weight, full_matrices=False)
    return [part.detach().clone().requires_grad_() for part in (U, sigma, V)]


def gradient(weight: Tensor) -> Tensor:
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(loss_of(weight), weight)[0]


def by_autograd(weight: Tensor, score: str) -> Tensor:
    U, sigma, V = leaves(weight)
    of = torch.autograd.grad(loss_of(U * sigma @ V), (U, sigma, V))
    if score == "gradient":
        return of[1].abs()
    terms = [(part * g).abs().detach() for part, g in zip((U, sigma, V), of, strict=True)]
    return terms[1] if score == "code" else terms[1] + terms[0].sum(0) + terms[2].sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_from_the_weight_s_gradient_are_those_of_autograd_on_the_parts(shape, score):
    weight = randn64(0, *shape)
    triplets = Triplets.of(weight)
    scores = triplet_scores(triplets, triplets.gradients(gradient(weight)), score)
    assert_close(scores, by_autograd(weight, score), atol=0, rtol=1e-9)


def test_the_signed_terms_of_the_three_sums_are_equal():
    weight = randn64(0, 8, 5)
    triplets = Triplets.of(weight)
    of_u, of_sigma, of_v = (a * b for a, b in zip(triplets, triplets.gradients(gradient(weight)), strict=True))
    assert_close(of_u.sum(0), of_sigma)
    assert_close(of_v.sum(1), of_sigma)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_lost_is_the_sum_of_the_dropped_squares(shape):
    weight = randn64(0, *shape)
    triplets, kept = Triplets.of(weight), torch.tensor([0, 2, 3])
    factors = triplets.factors(kept)
    dropped = [k for k in range(min(shape)) if k not in kept]
    assert_close((weight - factors.delta()).square().sum(), triplets.sigma[dropped].square().sum())
    assert_close(factors.A.norm(dim=1), factors.B.norm(dim=0))
    assert_close(triplets.factors(torch.arange(min(shape))).delta(), weight)


def test_no_triplet_leaves_nothing():
    factors = Triplets.of(randn64(0, 8, 5)).factors(torch.arange(0))
    assert factors.rank == 0 and torch.equal(factors.delta(), torch.zeros(8, 5, dtype=torch.float64))


def test_of_equal_scores_the_first_are_kept_in_their_order():
    assert highest(torch.tensor([2.0, 5.0, 2.0, 2.0, 1.0]), 3).tolist() == [0, 1, 2]
    assert highest(torch.ones(4), 0).tolist() == []


@pytest.mark.parametrize(("shape", "retain", "kept"), [((30, 40), 0.1, 3), ((30, 40), 0.11, 4), ((7, 9), 0, 0)])
def test_a_share_of_the_triplets_is_rounded_up(shape, retain, kept):
    assert kept_by_share(shape, retain) == kept


@pytest.mark.parametrize("compression", [0.0, 0.2, 0.73, 1.0])
def test_a_share_of_the_parameters_is_the_most_that_fits(compression):
    kept, room = kept_by_parameters((30, 50), compression), 30 * 50 * (1 - compression)
    assert kept * 80 <= room + 1e-6 and (kept + 1) * 80 > room


@pytest.mark.parametrize("energy", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_no_smaller_set_has_that_share_of_the_scores(energy):
    scores = [abs(float(score)) for score in randn64(3, 12)]
    total = sum(scores)
    enough = [  # of all 4,096 sets
        chosen.bit_count()
        for chosen in range(2**12)
        if sum(score for k, score in enumerate(scores) if chosen >> k & 1) >= energy * total - 1e-12
    ]
    assert kept_by_energy(torch.tensor(scores, dtype=torch.float64), energy) == min(enough)


def test_what_scores_nothing_is_no_part_of_all():
    assert kept_by_energy(torch.tensor([0.0, 2.0, 0.0, 2.0]), 1.0) == 2
    assert kept_by_energy(torch.zeros(3), 1.0) == 0


def test_factors_that_are_no_smaller_are_known():
    assert is_smaller((30, 60), 19) and not is_smaller((30, 60), 20)


def test_cosines_are_of_each_token():
    x, y = randn64(0, 2, 3, 4), randn64(1, 2, 3, 4)
    expected = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.view(-1, 4), y.view(-1, 4), strict=True)]
    assert_close(token_cosines(x, y), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2, 4])
def test_angular_distances_are_of_what_enters_and_leaves_a_run(length):
    states = randn64(2, 5, 3, 6)
    expected = [
        sum(
            float(torch.acos(a @ b / (a.norm() * b.norm()))) for a, b in zip(states[i], states[i + length], strict=True)
        )
        for i in range(5 - length)
    ]
    assert_close(
        angular_distances(states.float(), length), torch.tensor(expected).double() / 3 / torch.pi, atol=1e-6, rtol=1e-6
    )


def test_what_is_not_turned_has_no_distance():
    states = randn64(0, 1, 4, 6).expand(3, 4, 6)
    assert_close(angular_distances(states * 3, 1), torch.zeros(2).double(), atol=1e-7, rtol=0)
