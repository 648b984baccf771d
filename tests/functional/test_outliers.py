from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import reproducibly

from sap_lightning.functional.outliers import far_below


@reproducibly
@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=12))
def test_the_median_is_numpy_s(values: list[float]) -> None:
    median = np.median(values)
    assert far_below(torch.tensor(values)).tolist() == [median > 1e-5 and value < 2 / 3 * median for value in values]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 0.01], [0.1, 0.1, 0.1], [1e-7, 1e-8, 1e-7], [-0.1, -0.2, -9.0]])
def test_of_few_or_equal_values_or_none_above_zero_none_stands_out(values: list[float]) -> None:
    assert far_below(torch.tensor(values)).tolist() == [False] * len(values)


def test_what_is_no_number_stands_out_and_does_not_move_the_others() -> None:
    values = [0.30, 0.31, 0.32, 0.1, float("nan"), float("inf"), float("-inf")]
    assert far_below(torch.tensor(values)).tolist() == [False, False, False, True, True, True, True]
    assert far_below(torch.tensor([0.1, 0.9, float("nan")])).tolist() == [False, False, True]
