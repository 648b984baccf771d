from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import reproducibly

from sap_lightning.functional.outliers import above_median, margin

value_lists = st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=12)


@reproducibly
@given(value_lists)
def test_the_median_is_numpy_s(values: list[float]) -> None:
    expected = np.array(values) - np.median(values)
    np.testing.assert_allclose(above_median(torch.tensor(values)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 100.0], [0.1, 0.1, 0.1, 0.1]])
def test_few_or_equal_values_have_none_above(values: list[float]) -> None:
    above = above_median(torch.tensor(values))
    assert above.dtype == torch.float64
    assert above.tolist() == [0.0] * len(values)


def test_what_is_no_number_stands_out_most_and_does_not_move_the_others() -> None:
    above = above_median(torch.tensor([0.30, 0.31, 0.32, 0.9, float("nan"), float("inf"), float("-inf")]))
    assert above[4:].tolist() == [torch.inf] * 3
    assert above[:4].equal(above_median(torch.tensor([0.30, 0.31, 0.32, 0.9])))


def test_of_two_numbers_among_broken_ones_none_is_above() -> None:
    assert above_median(torch.tensor([0.1, 0.9, float("nan")])).tolist() == [0.0, 0.0, torch.inf]


def test_few_anchors_need_more() -> None:
    assert [margin(pairs) for pairs in (4, 16, 64)] == [0.3, 0.15, 0.15]
