from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import SHAPES, assert_same, deltas, mergekit_group, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.merging.breadcrumbs import Breadcrumbs
from sap_lightning.merging.task_arithmetic import TaskArithmetic

WEIGHTS = [0.5, 0.3, 0.2]


def without_ends(vector: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    order = np.argsort(np.abs(vector), kind="stable")
    result = np.zeros_like(vector)
    middle = order[smallest : len(order) - largest]
    result[middle] = vector[middle]
    return result


@pytest.mark.parametrize(
    ("sparsity", "largest", "ends"), [(0.75, 1 / 32, (23, 1)), (0.5, 0.0, (16, 0)), (0.5, 0.5, (0, 16))]
)
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_every_layer_loses_its_own_ends(weights, sparsity: float, largest: float, ends: tuple[int, int]) -> None:
    adapters = unlike_adapters()
    expected = {}
    for name, (d_out, d_in) in SHAPES.items():
        of_32 = d_out * d_in // 32
        cut = [without_ends(delta.flatten().numpy(), *(n * of_32 for n in ends)) for delta in deltas(adapters, name)]
        total = sum(0.7 * 3 * weight * vector for weight, vector in zip(weights, cut, strict=True))
        expected[name] = torch.from_numpy(total).view(d_out, d_in)
    assert_same(Breadcrumbs(sparsity, largest, scale=0.7).merge(adapters, weights), expected)


def test_every_row_loses_its_own_ends_as_in_the_authors_code() -> None:
    adapters = unlike_adapters()
    expected = {}
    for name in SHAPES:
        rows = [[without_ends(row, 15, 3) for row in delta.numpy()] for delta in deltas(adapters, name)]
        expected[name] = torch.from_numpy(0.2 * np.sum(rows, axis=0))
    assert_same(Breadcrumbs(0.75, 0.125, scope="row").merge(adapters), expected)


@pytest.mark.parametrize(("density", "gamma"), [(0.25, 1 / 64), (0.5, 1 / 8)])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_it_equals_mergekit(weights, density: float, gamma: float) -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    adapters = unlike_adapters()
    expected = {}
    for name in SHAPES:
        group = mergekit_group(adapters, name)
        expected[name] = registry.get("breadcrumbs").merge_group(
            group,
            weight={k: 3 * weight for k, weight in enumerate(weights, 1)},
            density=dict.fromkeys((1, 2, 3), density),
            gamma=dict.fromkeys((1, 2, 3), gamma),
            normalize=False,
            rescale=False,
            int8_mask=False,
            **{"lambda": 0.2},
        )
    assert_same(Breadcrumbs(1 - density, gamma).merge(adapters, weights), expected)


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_a_lower_sparsity_than_the_share_at_the_upper_end_drops_the_largest_alone(scope) -> None:
    adapter = random_adapter(0)
    method = Breadcrumbs(0.5, 0.25, scope=scope)
    kept = method.prepare([adapter], [1.0]).kept(adapter, 0.125)
    for name, (mask,) in kept.items():
        delta = deltas([adapter], name)[0].abs()
        assert int((~mask).sum()) == delta.numel() // 8
        for values, stays in zip(delta, mask, strict=True) if scope == "row" else [(delta, mask)]:
            assert values[~stays].min() > values[stays].max()


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_without_a_share_to_drop_it_is_task_arithmetic(scope) -> None:
    adapters = unlike_adapters()
    method = Breadcrumbs(0.0, 0.0, scale=0.3, scope=scope)
    assert_same(method.merge(adapters, WEIGHTS), TaskArithmetic().merge(adapters, WEIGHTS))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.largest must lie in \[0, 1\], got -0\.1"):
        Breadcrumbs(largest=-0.1)
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in \[0, 1\], got 1\.5"):
        Breadcrumbs(sparsity=1.5)
    with pytest.raises(InputError, match=r"largest 0\.3 is a part of merge\.method\.sparsity, which is 0\.2"):
        Breadcrumbs(sparsity=0.2, largest=0.3)
