"""How long a merge is made from what clients say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import deltas, random_adapter, reaching, unlike_adapters

from sap_lightning.functional.lora import dense
from sap_lightning.functional.reach import LENGTHS, MEASURED
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.average import Average
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.reach import at_length, reach_of

WEIGHTS = [0.5, 0.3, 0.2]
LOST, HELD = [0.2, 0.3, 0.4, 0.21, 0.21], [0.2, 0.3, 0.4, 0.4, 0.35]


def norms_of(adapters: list[Adapter]) -> tuple[float, float]:
    """The clients' mean Frobenius norm over both layers and that of their mean, dense and in float64."""
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    every = [deltas(adapters, name) for name in ("fc1", "q")]
    clients = sum(one.square().sum((1, 2)) for one in every).sqrt() @ weights
    mean = sum(float(torch.tensordot(weights, one, dims=1).square().sum()) for one in every) ** 0.5
    return float(clients), mean


def test_where_what_was_learned_holds_in_every_style_the_length_is_halfway_between_the_average_and_a_client():
    reach = reach_of([reaching(one, HELD) for one in unlike_adapters()], WEIGHTS)
    client, average = norms_of(unlike_adapters())
    assert reach is not None and reach.transfers
    assert reach.length == pytest.approx((average + client) / 2)
    assert list(reach.carried_over) == list(LENGTHS)
    assert reach.findings["carried_over"][0.5] == pytest.approx(0.2)
    assert reach.findings["won_at_home"] == pytest.approx(0.15)


@pytest.mark.parametrize("edges", [LOST, [0.5, 0.4, 0.3, 0.2, 0.1]], ids=["at the end", "at once"])
def test_where_it_does_not_hold_in_one_style_half_of_the_average_is_left(edges):
    said = {style: edges if style == "edges" else [0.1, 0.4, 0.6, 0.7, 0.8] for style in MEASURED}
    reach = reach_of([reaching(one, said) for one in unlike_adapters()], WEIGHTS)
    assert reach is not None and not reach.transfers
    assert reach.length == pytest.approx(norms_of(unlike_adapters())[1] / 2)


def test_where_nothing_carries_over_in_the_mean_over_styles_nothing_is_left():
    reach = reach_of([reaching(one, [0.5, 0.4, 0.3, 0.2, 0.1]) for one in unlike_adapters()], WEIGHTS)
    assert reach is not None and reach.length == 0


def test_one_client_that_does_not_say_is_enough_not_to_know():
    adapters = [reaching(one, LOST) for one in unlike_adapters()[:2]]
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
    reach = reach_of([reaching(still, LOST)], [1.0])
    assert reach is not None and reach.length == 0
    assert all(not dense(update).any() for update in at_length(Average().merge([still]), 2.0).values())
