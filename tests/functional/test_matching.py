"""Assignments against every possible one; cosines and CKA by definition."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from references import randn
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.matching import assigned, cka, cosines, in_coordinates_of, in_fields, in_order


def best(similarity: Tensor, choices) -> float:
    """The greatest sum over rows for the ways to choose a column for each."""
    return max(sum(float(similarity[i, j]) for i, j in enumerate(choice)) for choice in choices)


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_no_assignment_is_better(shape: tuple[int, int], seed: int) -> None:
    similarity = randn(seed, *shape)
    wide = similarity if shape[0] <= shape[1] else similarity.T
    columns = range(wide.shape[1])
    for found, choices in (
        (assigned(similarity), permutations(columns, len(wide))),
        (in_order(similarity), combinations(columns, len(wide))),
    ):
        pairs = [(i, j) for i, j in enumerate(found.tolist()) if j >= 0]
        assert len(pairs) == len(wide) == len({j for _, j in pairs})
        assert sum(float(similarity[pair]) for pair in pairs) == pytest.approx(best(wide, choices))


def test_what_is_in_order_stays_so() -> None:
    for seed in range(5):
        found = in_order(randn(seed, 4, 7)).tolist()
        assert found == sorted(found)


def test_cosines_are_pearson_correlations() -> None:
    x, y = randn(0, 20, 3), randn(1, 20, 4)
    expected = np.corrcoef(x.double().numpy().T, y.double().numpy().T)[:3, 3:]
    assert_close(cosines(x, y).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert_close(cosines(torch.full((20, 1), 0.1), y), torch.zeros(1, 4), atol=1e-6, rtol=0)


def test_cka_is_that_of_kornblith_and_others() -> None:
    some, others = [randn(0, 20, 3), randn(1, 20, 5)], [randn(2, 20, 4), randn(3, 20, 2)]

    def hsic(x: np.ndarray, y: np.ndarray) -> float:
        centring = np.eye(20) - 1 / 20
        return np.trace(x @ x.T @ centring @ y @ y.T @ centring)

    for i, one in enumerate(some):
        for j, other in enumerate(others):
            x, y = one.double().numpy(), other.double().numpy()
            expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
            assert float(cka(some, others)[i, j]) == pytest.approx(expected, abs=1e-5)
    turned = some[0] @ torch.linalg.qr(randn(4, 3, 3)).Q * 7 + 1
    assert float(cka([some[0]], [turned])) == pytest.approx(1, abs=1e-5)


def test_a_weight_in_other_coordinates_is_chosen_element_by_element() -> None:
    first, other = randn(0, 3, 4), randn(1, 5, 6)
    rows, columns = torch.tensor([4, -1, 0]), torch.tensor([-1, 5, 2, 0])
    found = in_coordinates_of(first, other, rows, columns)
    for i, row in enumerate(rows.tolist()):
        for k, column in enumerate(columns.tolist()):
            assert found[i, k] == (other[row, column] if row >= 0 and column >= 0 else first[i, k])
    bias = in_coordinates_of(first[:, 0], other[:, 0], rows)
    assert bias.tolist() == [float(other[4, 0]), float(first[1, 0]), float(other[0, 0])]


def test_fields_are_means_of_the_patches_in_them() -> None:
    responses = randn(0, 65, 3)
    fields = in_fields(responses)
    assert fields.shape == (17, 3) and torch.equal(fields[0], responses[0])
    patches = responses[1:].view(8, 8, 3)
    for row in range(4):
        for column in range(4):
            own = patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert_close(fields[1 + 4 * row + column], own.mean((0, 1)))
    for n in (1, 10, 64):  # no image of 4 patches a side
        assert_close(in_fields(randn(0, n, 3)), randn(0, n, 3).mean(0, keepdim=True))
