from __future__ import annotations

import math

import pytest
import torch
from adapters import SHAPES, adapter_of, assert_same, exact_delta, random_adapter, unlike_adapters
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.lora_lego import LoRALEGO, clustered

WEIGHTS = [0.5, 0.3, 0.2]


def alike(centres: Adapter, seed: int, noise: float = 0.05) -> Adapter:
    """A client whose ranks are near to those of the centres, in another order."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in centres.layers.items():
        order = torch.randperm(layer.rank, generator=generator)
        A, B = (factor + noise * torch.randn(factor.shape, generator=generator) for factor in (layer.A, layer.B))
        layers[name] = layer._replace(A=A[order], B=B[:, order])
    return adapter_of(layers, f"client {seed}")


def reference(adapters: list[Adapter], weights: list[float], centres: Adapter) -> dict[str, Tensor]:
    """The paper's formula in float64 where everybody sees the clusters: around each rank of the centres."""
    merged = {}
    for name, (_, d_in) in SHAPES.items():
        units, shares, owners = [], [], []
        around = torch.cat([centres.layers[name].A, centres.layers[name].B.T], dim=1).double()
        for adapter, weight in zip(adapters, weights, strict=True):
            layer = adapter.layers[name]
            for j in range(layer.rank):
                raw = torch.cat([layer.A[j], layer.B[:, j]]).double()
                owners.append(int((around - raw).norm(dim=1).argmin()))
                units.append(math.sqrt(layer.scale) * raw)
                shares.append(weight)
        total = torch.zeros(SHAPES[name], dtype=torch.float64)
        for cluster in set(owners):
            own = [i for i, owner in enumerate(owners) if owner == cluster]
            share = sum(shares[i] for i in own)
            mean = sum(shares[i] * units[i] for i in own) / share
            largest = sum(shares[i] * float(units[i].abs().max()) for i in own) / share
            mean *= largest / float(mean.abs().max())
            total += mean[d_in:].outer(mean[:d_in])
        merged[name] = math.sqrt(max(a.layers[name].rank for a in adapters) / len(set(owners))) * total
    return merged


@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_it_is_one_rank_for_each_cluster_of_ranks(weights: list[float]) -> None:
    centres = random_adapter(0, rank=5)
    adapters = [alike(centres, seed) for seed in range(3)]
    merged = LoRALEGO().merge(adapters, weights)
    assert_same(merged, reference(adapters, weights, centres))
    assert {layer.rank for layer in merged.values()} == {5}


def test_another_rank_is_made_up_for() -> None:
    centres = random_adapter(0, rank=4)
    double = adapter_of(
        {n: x._replace(A=x.A.repeat(2, 1), B=x.B.repeat(1, 2)) for n, x in alike(centres, 1, 0).layers.items()}
    )
    merged = LoRALEGO(rank=4).merge([double, alike(centres, 2)])
    assert_same(merged, reference([double, alike(centres, 2)], [0.5, 0.5], centres))
    whole = {name: math.sqrt(8 / 4) * exact_delta(layer) for name, layer in centres.layers.items()}
    assert_same(LoRALEGO(rank=4).merge([double]), whole)


def test_ranks_and_scales_may_differ() -> None:
    centres = random_adapter(0, rank=6, scale=0.5)
    layers = alike(centres, 1).layers
    shorter = adapter_of({n: LoRALayer(x.A[:2], x.B[:, :2], 0.8) for n, x in layers.items()}, "shorter")
    adapters = [alike(centres, 2), shorter, alike(centres, 3)]
    assert_same(LoRALEGO().merge(adapters, WEIGHTS), reference(adapters, WEIGHTS, centres))


def test_a_client_without_a_layer_has_no_say_there() -> None:
    adapters = unlike_adapters()
    merged = LoRALEGO().merge(adapters, WEIGHTS)
    assert_same({"fc1": merged["fc1"]}, {"fc1": LoRALEGO().merge(adapters[:2], [0.625, 0.375])["fc1"]}, 1e-5)
    assert merged["q"].rank == 6 and merged["fc1"].rank == 4


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_one_client_and_clients_of_equal_updates_stay_as_they_are(scale: float) -> None:
    one = random_adapter(0, scale=scale)
    for clients in (1, 2, 5):
        assert_same(LoRALEGO().merge([one] * clients), one.layers)


def test_as_many_clusters_as_ranks_are_the_sum_of_all_but_for_output_reweighting() -> None:
    adapters = [random_adapter(seed) for seed in range(3)]
    total = {name: sum(exact_delta(one.layers[name]) for one in adapters) / math.sqrt(3) for name in SHAPES}
    for rank in (12, 50):
        assert_same(LoRALEGO(rank).merge(adapters), total)


def test_the_same_update_in_other_factors_is_merged_otherwise() -> None:
    one, other = random_adapter(0), random_adapter(1)
    turned = adapter_of({n: x._replace(A=-x.A, B=-x.B) for n, x in other.layers.items()})
    assert_same({"q": turned.layers["q"]}, {"q": other.layers["q"]})
    first, second = (LoRALEGO().merge([one, client])["q"].delta() for client in (other, turned))
    assert torch.linalg.matrix_norm(first - second) > 0.1 * torch.linalg.matrix_norm(first)


def test_the_order_of_clients_does_not_matter() -> None:
    adapters = [random_adapter(seed, 1 + seed) for seed in range(5)]
    weights = [0.1, 0.1, 0.2, 0.3, 0.3]
    assert_same(LoRALEGO().merge(adapters[::-1], weights[::-1]), LoRALEGO().merge(adapters, weights))


def test_a_mean_that_is_nothing_stays_nothing() -> None:
    units = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0]])
    assert not clustered(units, torch.tensor([1 / 3, 2 / 3, 1 / 3]).double(), 1).any()


def test_zero_and_opposite_clients_give_finite_updates() -> None:
    one = random_adapter(0)
    nothing = adapter_of({name: layer._replace(B=0 * layer.B) for name, layer in one.layers.items()})
    empty = adapter_of({name: LoRALayer(0 * layer.A, 0 * layer.B) for name, layer in one.layers.items()})
    other = adapter_of({name: layer._replace(scale=-layer.scale) for name, layer in one.layers.items()})
    for adapters in ([nothing], [nothing, empty], [empty, empty], [one, nothing], [one, other], [one, empty, other]):
        assert all(dense(layer).isfinite().all() for layer in LoRALEGO().merge(adapters).values())
    assert not any(dense(layer).any() for layer in LoRALEGO().merge([nothing, empty]).values())


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.rank must be at least 1, got 0"):
        LoRALEGO(rank=0)
