"""Statistics of weights against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.weight_statistics import weight_statistics


@pytest.mark.parametrize("shape", [(7, 4), (4, 9), (2, 5), (1, 6)])
def test_they_are_numpy_s(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    array = weight.double().numpy()
    singular = [*np.linalg.svd(array, compute_uv=False)[:3], 0, 0][:3]
    expected = [array.mean(), array.var(), np.linalg.norm(array), *singular]
    assert weight_statistics(weight).tolist() == pytest.approx(expected, abs=1e-9)


def test_a_vector_s_largest_is_its_norm() -> None:
    *_, norm, first, second, third = weight_statistics(torch.tensor([[3.0, 4.0]])).tolist()
    assert (norm, first, second, third) == pytest.approx((5, 5, 0, 0))


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_of_factors_they_are_those_of_the_product(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(*shape, generator=generator).double() for shape in ((rank, 4), (7, rank)))
    layer = LoRALayer(A, B, 1.5)
    assert weight_statistics(layer).tolist() == pytest.approx(weight_statistics(layer.delta()).tolist(), abs=1e-6)
