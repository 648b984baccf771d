from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import reproducibly

from sap_lightning.functional.outliers import OUTLIER, robust_z_scores

distinct = st.floats(-1e6, 1e6, width=32)
tied = st.integers(0, 2).map(float)
value_lists = st.lists(distinct, min_size=3, max_size=12) | st.lists(tied, min_size=3, max_size=12)


def reference(values: list[float]) -> np.ndarray:
    deviations = np.array(values) - np.median(values)
    mad, mean = np.median(np.abs(deviations)), np.mean(np.abs(deviations))
    scale = mad / 0.6745 if mad else 1.253314 * mean
    return deviations / scale if scale else deviations


@reproducibly
@given(value_lists)
def test_scores_are_those_of_numpy(values: list[float]) -> None:
    np.testing.assert_allclose(robust_z_scores(torch.tensor(values)).numpy(), reference(values), rtol=1e-12)


def test_a_written_out_example_with_an_even_number() -> None:
    # median 2.5, deviations 1.5, 0.5, 0.5, 7.5 and MAD (0.5 + 1.5) / 2
    expected = torch.tensor([-1.5, -0.5, 0.5, 7.5], dtype=torch.float64) * 0.6745
    torch.testing.assert_close(robust_z_scores(torch.tensor([1.0, 2.0, 3.0, 10.0])), expected)


def test_a_value_far_from_many_equal_ones_is_an_outlier() -> None:
    scores = robust_z_scores(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0]))
    torch.testing.assert_close(scores, torch.tensor([0, 0, 0, 0, 5 / 1.253314], dtype=torch.float64))
    assert (scores.abs() > OUTLIER).tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 100.0], [0.1, 0.1, 0.1, 0.1]])
def test_few_or_equal_values_have_no_outlier(values: list[float]) -> None:
    scores = robust_z_scores(torch.tensor(values))
    assert scores.dtype == torch.float64
    assert scores.tolist() == [0.0] * len(values)


def test_what_is_no_number_stands_out_most_and_does_not_hide_the_others() -> None:
    scores = robust_z_scores(torch.tensor([0.30, 0.31, 0.32, 0.9, float("nan"), float("inf")]))
    assert scores[4:].isinf().all()
    assert scores[:4].equal(robust_z_scores(torch.tensor([0.30, 0.31, 0.32, 0.9])))
