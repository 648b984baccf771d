from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from adapters import SHAPES, adapter_of, assert_same, delta_of, random_adapter, unlike_adapters
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.average import Average
from sap_lightning.merging.core_space import CoreSpace, shared_bases
from sap_lightning.merging.dare import DARE
from sap_lightning.merging.iso_c import IsoC
from sap_lightning.merging.krum import Krum
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.median import Median
from sap_lightning.merging.task_arithmetic import TaskArithmetic
from sap_lightning.merging.ties import TIES
from sap_lightning.merging.tsv_m import TSVM

WEIGHTS = [0.5, 0.3, 0.2]


def reference(adapters: list[Adapter], merge: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The paper's recipe in float64: cores (K, p, q) in the bases of the stacked factors, merged, and back again."""
    merged = {}
    for name in SHAPES:
        own = [one.layers[name] for one in adapters if name in one.layers]
        U = torch.linalg.svd(torch.cat([layer.B.double() for layer in own], dim=1), full_matrices=False)[0]
        V = torch.linalg.svd(torch.cat([layer.A.double() for layer in own]), full_matrices=False)[2]
        cores = torch.stack([U.T @ delta_of(one, name) @ V.T for one in adapters])
        merged[name] = U @ merge(cores) @ V
    return merged


def ties(cores: Tensor, sparsity: float = 0.6) -> Tensor:
    """Trim each core, elect signs, disjoint mean of clients that count alike."""
    trimmed = cores.clone()
    for core in trimmed:
        flat = core.flatten()
        flat[np.argsort(flat.abs().numpy())[: round(sparsity * len(flat))]] = 0
        core.copy_(flat.view_as(core))
    agrees = torch.where(trimmed.sum(0) >= 0, trimmed > 0, trimmed < 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def test_it_is_ties_of_the_cores() -> None:
    merged = CoreSpace(TIES(0.6, variant="mergekit")).merge(unlike_adapters())
    assert_same(merged, reference(unlike_adapters(), ties), 1e-5)


def test_it_is_the_median_of_the_cores() -> None:
    merged = CoreSpace("median").merge(unlike_adapters())
    assert_same(merged, reference(unlike_adapters(), lambda cores: cores.median(0).values), 1e-5)


def test_more_ranks_than_a_layer_has_dimensions_make_cores_as_large_as_the_layer() -> None:
    adapters = [random_adapter(seed, rank=4) for seed in range(15)]
    merged = CoreSpace("median").merge(adapters)
    assert_same(merged, reference(adapters, lambda cores: cores.median(0).values), 1e-5)
    assert merged["fc1"].rank == 24


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(0.4), Krum(), TSVM(share=1.0), IsoC()])
def test_methods_that_see_no_elements_merge_to_the_same(method) -> None:
    adapters = unlike_adapters()
    merged = CoreSpace(method).merge(adapters, WEIGHTS)
    assert_same(merged, method.merge(adapters, WEIGHTS), 1e-5)
    assert all(isinstance(layer, LoRALayer) for layer in merged.values())


def test_weights_reach_the_method_under_it() -> None:
    def weighted(cores: Tensor) -> Tensor:
        return (torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None] * cores).sum(0)

    assert_same(CoreSpace(Magnitude(0)).merge(unlike_adapters(), WEIGHTS), reference(unlike_adapters(), weighted), 1e-5)


def test_the_bases_are_orthonormal_and_span_every_update() -> None:
    layers = [random_adapter(seed, rank=1 + seed).layers["fc1"] for seed in range(3)]
    bases = shared_bases(layers)
    assert bases.U.shape == (32, 6) and bases.V.shape == (6, 24)
    assert_close(bases.U.T @ bases.U, torch.eye(6), atol=1e-6, rtol=0)
    assert_close(bases.V @ bases.V.T, torch.eye(6), atol=1e-6, rtol=0)
    for layer in layers:
        assert_close(bases.out(bases.into(layer)).delta(), layer.delta(), atol=1e-5, rtol=1e-5)
        assert_close(bases.out(bases.into(layer).delta()).delta(), layer.delta(), atol=1e-5, rtol=1e-5)


def test_directions_that_clients_share_count_once() -> None:
    one = random_adapter(0)
    assert shared_bases([one.layers["q"]] * 3).U.shape == (24, 4)
    assert_same(CoreSpace(TIES(0)).merge([one] * 3), one.layers, 1e-5)
    # Else most elements of the cores would be zero for everybody, and a sparsity of 0.5 would trim nothing.
    kept = CoreSpace(TIES(0.5)).merge([one] * 3)
    assert torch.linalg.matrix_norm(dense(kept["q"]) - one.layers["q"].delta()) > 0.1


def test_one_client_is_its_own_core() -> None:
    adapter = random_adapter(0)
    assert_same(CoreSpace(TIES(0)).merge([adapter]), adapter.layers, 1e-5)


def test_the_sparsity_is_that_of_the_method_under_it() -> None:
    assert CoreSpace().sparsity == 0.8 and CoreSpace("average").sparsity is None
    prepared = CoreSpace(TIES(0.2)).prepare(unlike_adapters(), WEIGHTS)
    assert_same(prepared.apply(0.6), CoreSpace(TIES(0.6)).merge(unlike_adapters(), WEIGHTS), 0)


def test_a_client_s_drops_depend_on_it_as_without_a_core() -> None:
    adapters = unlike_adapters()
    again = [adapter_of(one.layers) for one in adapters]
    assert_same(CoreSpace(DARE(0.5)).merge(adapters), CoreSpace(DARE(0.5)).merge(again), 0)
    assert {one.sha256 for one in adapters} == {one.sha256 for one in again}


@pytest.mark.parametrize("method", [TIES(0.6), TIES(0.3, majority="frequency"), DARE(0.5), Median(), Magnitude(0.5)])
@pytest.mark.parametrize("clients", [2, 4])
def test_the_order_of_clients_does_not_matter(method, clients: int) -> None:
    adapters = [random_adapter(seed, 1 + seed) for seed in range(clients)]
    assert_same(CoreSpace(method).merge(adapters[::-1]), CoreSpace(method).merge(adapters), 1e-5)


def test_zero_and_opposite_clients_give_finite_updates() -> None:
    one = random_adapter(0)
    nothing = adapter_of({name: layer._replace(B=0 * layer.B) for name, layer in one.layers.items()})
    other = adapter_of({name: layer._replace(scale=-layer.scale) for name, layer in one.layers.items()})
    for method in ("ties", "dare", "median", "knots", "fedavg", "core_space"):
        for adapters in ([nothing, nothing], [one, nothing], [one, other], [one]):
            merged = CoreSpace(method).merge(adapters)
            assert {name: layer.shape for name, layer in merged.items()} == SHAPES
            assert all(layer.delta().isfinite().all() for layer in merged.values())
    assert not any(layer.delta().any() for layer in CoreSpace().merge([nothing, nothing]).values())


@pytest.mark.parametrize("name", ["sap", "fisher", "regmean"])
def test_a_method_that_looks_at_anchors_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"core_space: {name} looks at anchors, which can be shown to a model"):
        CoreSpace(name)
