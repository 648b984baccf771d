from __future__ import annotations

import pytest
import torch
from adapters import FULL_RANK, SHAPES, assert_same, deltas, random_adapter, unlike_adapters
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.merging.average import Average
from sap_lightning.merging.cart import CART

UNIFORM, WEIGHTS = [1 / 3] * 3, [0.5, 0.3, 0.2]


def reference(adapters, weights: list[float], ranks: dict[str, int], scale: float = 1.0) -> dict[str, Tensor]:
    """The paper's formula on dense float64 updates: the nearest matrices of a rank by projection on eigenvectors."""
    merged = {}
    for name in SHAPES:
        stacked = deltas(adapters, name)
        merged[name] = average = torch.tensordot(torch.tensor(weights, dtype=torch.float64), stacked, 1)
        for delta, weight in zip(stacked, weights, strict=True):
            deviation = delta - average
            leading = torch.linalg.eigh(deviation.T @ deviation).eigenvectors[:, -ranks[name] :]
            merged[name] = merged[name] + scale * len(adapters) * weight * deviation @ leading @ leading.T
    return merged


@pytest.mark.parametrize("weights", [UNIFORM, WEIGHTS])
@pytest.mark.parametrize(("share", "ranks"), [(0.08, {"fc1": 1, "q": 1}), (0.3, {"fc1": 2, "q": 4})])
def test_truncated_deviations_are_added_to_the_average(share: float, ranks: dict[str, int], weights) -> None:
    adapters = unlike_adapters()  # which span 6 and 12 dimensions
    assert_same(CART(share).merge(adapters, weights), reference(adapters, weights, ranks), 1e-5)


def test_scale_multiplies_the_deviations_only() -> None:
    adapters = unlike_adapters()
    assert_same(CART(scale=2.5).merge(adapters), reference(adapters, UNIFORM, dict.fromkeys(SHAPES, 1), 2.5), 1e-5)
    assert_same(CART(scale=0).merge(adapters), Average().merge(adapters))


def test_updates_of_full_rank_are_merged_as_the_authors_do() -> None:
    adapters = [random_adapter(seed, FULL_RANK) for seed in range(3)]
    ranks = dict.fromkeys(SHAPES, 6)
    assert_same(CART(share=0.25).merge(adapters), reference(adapters, UNIFORM, ranks), 1e-5)


@pytest.mark.parametrize("weights", [UNIFORM, WEIGHTS])
def test_deviations_that_are_not_cut_cancel_out(weights) -> None:
    assert_same(CART(share=1).merge(unlike_adapters(), weights), Average().merge(unlike_adapters(), weights), 1e-6)


def test_two_clients_that_count_alike_give_their_average() -> None:
    adapters = [random_adapter(0), random_adapter(1, scale=2.0)]
    assert_same(CART().merge(adapters), Average().merge(adapters))


def test_the_result_stays_in_the_joint_space() -> None:
    assert {name: update.rank for name, update in CART().merge(unlike_adapters()).items()} == {"fc1": 6, "q": 12}


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.share must lie in \[0, 1\], got -0\.1"):
        CART(share=-0.1)
