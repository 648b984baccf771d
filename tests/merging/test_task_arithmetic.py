from __future__ import annotations

import pytest
from adapters import SHAPES, assert_same, deltas, mergekit_group, unlike_adapters

from sap_lightning.merging.average import Average
from sap_lightning.merging.task_arithmetic import TaskArithmetic


def test_it_is_lambda_times_the_sum() -> None:
    adapters = unlike_adapters()
    assert_same(TaskArithmetic(0.4).merge(adapters), {name: 0.4 * deltas(adapters, name).sum(0) for name in SHAPES})


def test_weights_are_shares_of_the_number_of_clients() -> None:
    adapters, weights = unlike_adapters(), [0.5, 0.3, 0.2]
    expected = {}
    for name in SHAPES:
        first, second, third = deltas(adapters, name)
        expected[name] = 0.4 * (1.5 * first + 0.9 * second + 0.6 * third)
    assert_same(TaskArithmetic(0.4).merge(adapters, weights), expected)


def test_one_over_k_is_the_average() -> None:
    adapters = unlike_adapters()
    assert_same(TaskArithmetic(1 / 3).merge(adapters), Average().merge(adapters))


def test_it_equals_mergekit() -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    adapters = unlike_adapters()
    expected = {}
    for name in SHAPES:
        group = mergekit_group(adapters, name)
        expected[name] = registry.get("task_arithmetic").merge_group(
            group, weight={1: 1, 2: 1, 3: 1}, normalize=False, rescale=False, int8_mask=False, **{"lambda": 0.3}
        )
    assert_same(TaskArithmetic().merge(adapters), expected)
