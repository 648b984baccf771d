"""How long a merge is made from what clients say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import deltas, random_adapter, unlike_adapters

from sap_lightning.functional.lora import dense
from sap_lightning.functional.reach import LENGTHS, MEASURED
from sap_lightning.io.adapter import Adapter
from sap_lightning.io.manifest import Manifest
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.reach import AtLength, reach_of

WEIGHTS = [0.5, 0.3, 0.2]
HALF = [0.1, 0.2, 0.3, 0.2, 0.2]


def saying(adapter: Adapter, curve: list[float]) -> Adapter:
    """The adapter of a client that says this of every style."""
    manifest = Manifest(
        "tiny", "0" * 64, "home", ("cat", "dog"), 10, 4, 8, ("q",), 0, {}, adapter.sha256,
        dict.fromkeys(MEASURED, tuple(curve)),
    )  # fmt: skip
    return replace(adapter, manifest=manifest)


def norm_of(adapters: list[Adapter]) -> float:
    """The clients' mean Frobenius norm over both layers, dense and in float64."""
    squares = sum(deltas(adapters, name).square().sum((1, 2)) for name in ("fc1", "q"))
    return float((squares.sqrt() * torch.tensor(WEIGHTS)).sum())


def test_the_length_is_the_clients_mean_norm_times_how_far_they_reach():
    adapters = [saying(one, HALF) for one in unlike_adapters()]
    reach = reach_of(adapters, WEIGHTS)
    assert reach is not None
    assert reach.factor == 0.5
    assert reach.length == pytest.approx(0.5 * norm_of(adapters))
    assert list(reach.carried_over) == list(LENGTHS)
    assert reach.findings["carried_over"][0.5] == pytest.approx(0.2)


def test_one_client_that_does_not_say_is_enough_not_to_know():
    adapters = [saying(one, HALF) for one in unlike_adapters()[:2]]
    assert reach_of([*adapters, unlike_adapters()[2]], WEIGHTS) is None
    silent = replace(adapters[0], manifest=replace(adapters[0].manifest, reach={}))
    assert reach_of([silent, adapters[1]], [0.5, 0.5]) is None


def at_length(length: float, sparsity: float = 0.5) -> AtLength:
    prepared = Magnitude(sparsity).prepare(unlike_adapters(), WEIGHTS)
    parts = (prepared.method, prepared.adapters, prepared.weights, prepared.space_of, prepared.answers, {})
    return AtLength(*parts, length)


@pytest.mark.parametrize("sparsity", [None, 0.9])
def test_the_merge_has_that_length_and_its_direction_stays(sparsity):
    merged = at_length(3.0).apply(sparsity)
    plain = Magnitude(0.5).prepare(unlike_adapters(), WEIGHTS).apply(sparsity)
    size = sum(float(dense(update).double().square().sum()) for update in merged.values()) ** 0.5
    assert size == pytest.approx(3.0, rel=1e-6)
    ratios = torch.cat([(dense(merged[n]) / dense(plain[n]))[dense(plain[n]) != 0] for n in merged])
    assert ratios.max() - ratios.min() < 1e-4


def test_at_length_0_nothing_changes_in_any_layer():
    merged = at_length(0.0).apply()
    assert {name: tuple(update.shape) for name, update in merged.items()} == {"fc1": (32, 24), "q": (24, 24)}
    assert all(not dense(update).any() for update in merged.values())


def test_clients_that_changed_nothing_merge_to_nothing():
    one = random_adapter(0)
    still = replace(one, layers={name: layer._replace(B=0 * layer.B) for name, layer in one.layers.items()})
    reach = reach_of([saying(still, HALF)], [1.0])
    assert reach is not None and reach.length == 0
    prepared = Magnitude(0.5).prepare([still], [1.0])
    merged = AtLength(Magnitude(0.5), [still], [1.0], prepared.space_of, {}, {}, 2.0).apply()
    assert all(not dense(update).any() for update in merged.values())
