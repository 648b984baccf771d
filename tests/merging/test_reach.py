"""How long a merge is made from what clients say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import deltas, random_adapter, reaching, unlike_adapters

from sap_lightning.functional.lora import dense
from sap_lightning.functional.reach import LENGTHS
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.average import Average
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.reach import at_length, reach_of

WEIGHTS = [0.5, 0.3, 0.2]
HALF = [0.1, 0.2, 0.3, 0.2, 0.2]


def norm_of(adapters: list[Adapter]) -> float:
    """The clients' mean Frobenius norm over both layers, dense and in float64."""
    squares = sum(deltas(adapters, name).square().sum((1, 2)) for name in ("fc1", "q"))
    return float((squares.sqrt() * torch.tensor(WEIGHTS)).sum())


def test_the_length_is_the_clients_mean_norm_times_how_far_they_reach():
    adapters = [reaching(one, HALF) for one in unlike_adapters()]
    reach = reach_of(adapters, WEIGHTS)
    assert reach is not None
    assert reach.factor == 0.5
    assert reach.length == pytest.approx(0.5 * norm_of(adapters))
    assert list(reach.carried_over) == list(LENGTHS)
    assert reach.findings["carried_over"][0.5] == pytest.approx(0.2)


def test_one_client_that_does_not_say_is_enough_not_to_know():
    adapters = [reaching(one, HALF) for one in unlike_adapters()[:2]]
    assert reach_of([*adapters, unlike_adapters()[2]], WEIGHTS) is None
    silent = replace(adapters[0], manifest=replace(adapters[0].manifest, reach={}))
    assert reach_of([silent, adapters[1]], [0.5, 0.5]) is None


@pytest.mark.parametrize("method", [Average(), Magnitude(0.5)], ids=lambda method: method.name)
def test_an_update_gets_that_length_and_keeps_its_direction(method):
    plain = method.merge(unlike_adapters(), WEIGHTS)
    merged = at_length(plain, 3.0)
    assert sum(float(dense(update).double().square().sum()) for update in merged.values()) ** 0.5 == pytest.approx(3.0)
    ratios = torch.cat([(dense(merged[n]) / dense(plain[n]))[dense(plain[n]) != 0] for n in merged])
    assert ratios.max() - ratios.min() < 1e-4


def test_at_length_0_nothing_changes_in_any_layer():
    merged = at_length(Average().merge(unlike_adapters()), 0.0)
    assert {name: tuple(update.shape) for name, update in merged.items()} == {"fc1": (32, 24), "q": (24, 24)}
    assert all(not dense(update).any() for update in merged.values())


def test_clients_that_changed_nothing_merge_to_nothing():
    one = random_adapter(0)
    still = replace(one, layers={name: layer._replace(B=0 * layer.B) for name, layer in one.layers.items()})
    reach = reach_of([reaching(still, HALF)], [1.0])
    assert reach is not None and reach.length == 0
    assert all(not dense(update).any() for update in at_length(Average().merge([still]), 2.0).values())
