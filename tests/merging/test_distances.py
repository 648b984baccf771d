from __future__ import annotations

import pytest
import torch
from adapters import SHAPES, adapter_of, deltas, random_adapter, unlike_adapters
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.distances import mean_cosine, squared_distances


def whole(one: Adapter) -> Tensor:
    """ΔW of all layers as one float64 vector, 0 where the client lacks a layer."""
    return torch.cat([deltas([one], name).flatten() for name in SHAPES])


def test_the_distances_are_those_of_the_dense_updates() -> None:
    adapters = unlike_adapters()
    distances = squared_distances(adapters)
    expected = [[float((whole(one) - whole(other)).square().sum()) for other in adapters] for one in adapters]
    assert_close(distances, distances.new_tensor(expected), rtol=1e-12, atol=0)
    assert distances.equal(distances.T)


def test_equal_adapters_are_at_distance_zero() -> None:
    assert not squared_distances([random_adapter(0)] * 2).any()


def test_distances_are_between_updates_and_not_between_factors() -> None:
    one, other = random_adapter(0), random_adapter(1)
    # The same ΔW from factors far away.
    gauge = {n: LoRALayer(4 * layer.A.flip(0), layer.B.flip(1) / 8, 2 * layer.scale) for n, layer in one.layers.items()}
    distances = squared_distances([one, other, adapter_of(gauge)]).sqrt()
    assert distances[0, 1] == pytest.approx(float((whole(one) - whole(other)).norm()), rel=1e-9)
    assert distances[0, 2] < 1e-6 * distances[0, 1]
    assert_close(distances, distances.T, rtol=0, atol=0)
    assert not distances.diag().any()


def test_the_mean_cosine_is_that_of_the_dense_updates() -> None:
    first, second, third = unlike_adapters()
    # The second wants the opposite of the first, but half as much.
    contrary = adapter_of({name: layer._replace(B=-layer.B / 2) for name, layer in first.layers.items()})
    for adapters in ([first, second, third], [first, contrary, third]):
        pairs = [
            float(torch.cosine_similarity(whole(adapters[i]), whole(adapters[j]), dim=0))
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        assert mean_cosine(adapters) == pytest.approx(sum(pairs) / 3, abs=1e-7)
    assert mean_cosine([first, contrary, third]) < 0


def test_fewer_than_two_clients_and_clients_that_change_nothing_have_no_cosine() -> None:
    one = random_adapter(0)
    nothing = adapter_of({name: layer._replace(B=0 * layer.B) for name, layer in one.layers.items()})
    assert mean_cosine([one]) == mean_cosine([one, nothing]) == mean_cosine([nothing, nothing]) == 0
