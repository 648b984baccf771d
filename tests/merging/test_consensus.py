from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import SHAPES, assert_same, deltas, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.merging.consensus import Consensus
from sap_lightning.merging.task_arithmetic import TaskArithmetic

WEIGHTS = [0.5, 0.3, 0.2]


def reference(adapters, threshold: float, wanted_by: int, weights=(1 / 3, 1 / 3, 1 / 3)) -> dict[str, torch.Tensor]:
    """TALL masks of each client and their consensus, element by element in float64."""
    merged = {}
    for name in SHAPES:
        updates = deltas(adapters, name).numpy()
        total = sum(len(updates) * weight * update for update, weight in zip(updates, weights, strict=True))
        merged[name] = torch.zeros(SHAPES[name], dtype=torch.float64)
        for position in np.ndindex(*SHAPES[name]):
            own = [update[position] for update in updates]
            wanting = [abs(value) > threshold * abs(total[position] - value) for value in own]
            if sum(wanting) >= wanted_by:
                merged[name][position] = total[position]
    return merged


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.0])
@pytest.mark.parametrize("wanted_by", [1, 2, 3])
def test_what_too_few_clients_want_is_removed(wanted_by: int, threshold: float) -> None:
    adapters = unlike_adapters()
    expected = {name: 0.7 * update for name, update in reference(adapters, threshold, wanted_by).items()}
    assert_same(Consensus(threshold, wanted_by, scale=0.7).merge(adapters), expected)


def test_weights_count_in_the_sum() -> None:
    adapters = unlike_adapters()
    assert_same(Consensus(scale=1).merge(adapters, WEIGHTS), reference(adapters, 0.4, 2, WEIGHTS))


def test_wanted_by_nobody_is_enough_for_task_arithmetic() -> None:
    adapters = unlike_adapters()
    assert_same(Consensus(wanted_by=0).merge(adapters, WEIGHTS), TaskArithmetic().merge(adapters, WEIGHTS))


@pytest.mark.parametrize("clients", [1, 2])
def test_of_fewer_clients_than_are_asked_for_all_must_want_an_element(clients: int) -> None:
    adapters = unlike_adapters()[:clients]
    assert_same(Consensus(wanted_by=5).merge(adapters), Consensus(wanted_by=clients).merge(adapters))


def test_one_client_stays_as_it_is_times_the_scale() -> None:
    adapter = random_adapter(0)
    assert_same(Consensus().merge([adapter]), {name: 0.3 * deltas([adapter], name)[0] for name in SHAPES})


@pytest.mark.parametrize(("clients", "stays"), [(2, True), (3, True), (4, False)])
def test_equal_clients_hide_each_other(clients: int, stays: bool) -> None:
    merged = Consensus(threshold=0.4).merge([random_adapter(0)] * clients)  # 0.4·2 < 1 < 0.4·3
    for name in SHAPES:
        expected = 0.3 * clients * deltas([random_adapter(0)], name)[0]
        assert_same({name: merged[name]}, {name: expected if stays else torch.zeros(SHAPES[name])})


@pytest.mark.parametrize("setting", ["threshold", "wanted_by"])
def test_a_negative_setting_is_refused(setting: str) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{setting} must be at least 0, got -1"):
        Consensus(**{setting: -1})
