from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import SHAPES, adapter_of, assert_same, deltas, random_adapter
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.merging.average import Average
from sap_lightning.merging.knots import AlignedSpace, KnOTS, shared_basis

WEIGHTS = [0.5, 0.3, 0.2]


def reference(adapters, sparsity: float, majority: str = "total") -> dict[str, torch.Tensor]:
    """The paper's recipe on dense float64 updates of clients that count alike."""
    bases, coordinates = {}, {}
    for name in SHAPES:
        stacked = deltas(adapters, name)
        U, sigma, V = torch.linalg.svd(torch.cat(list(stacked), dim=1), full_matrices=False)
        U, sigma, V = U[:, sigma > 1e-5], sigma[sigma > 1e-5], V[sigma > 1e-5]
        bases[name] = U
        coordinates[name] = torch.stack((sigma[:, None] * V).split(stacked.shape[2], dim=1))
    flat = torch.cat([coordinates[name].flatten(1) for name in SHAPES], dim=1).numpy()
    for vector in flat:
        vector[np.argsort(np.abs(vector))[: round(sparsity * len(vector))]] = 0
    votes = flat if majority == "total" else np.sign(flat)
    agrees = np.where(votes.sum(0) >= 0, flat > 0, flat < 0)
    merged = torch.from_numpy((flat * agrees).sum(0) / agrees.sum(0).clip(1))
    pieces = merged.split([coordinates[name][0].numel() for name in SHAPES])
    return {name: bases[name] @ piece.view_as(coordinates[name][0]) for name, piece in zip(SHAPES, pieces, strict=True)}


@pytest.mark.parametrize("sparsity", [0.8, 0.5])
@pytest.mark.parametrize("clients", [1, 3, 9, 40])
def test_it_is_ties_of_the_aligned_updates(clients: int, sparsity: float) -> None:
    adapters = [random_adapter(seed, rank=1 + seed % 4, scale=1 + seed) for seed in range(clients)]
    assert_same(KnOTS(sparsity).merge(adapters), reference(adapters, sparsity), 1e-5)


def test_the_sign_can_be_that_of_more_clients() -> None:
    # An even number of clients could have a draw of signs, which goes with the arbitrary sign of U.
    adapters = [random_adapter(seed) for seed in range(3)]
    assert_same(KnOTS(0, majority="frequency").merge(adapters), reference(adapters, 0, "frequency"), 1e-5)


def test_the_result_is_in_factor_form_of_the_rank_of_all_clients() -> None:
    merged = KnOTS(scale=0.6).merge([random_adapter(seed) for seed in range(3)])
    assert {layer.rank for layer in merged.values()} == {12}
    whole = KnOTS().merge([random_adapter(seed) for seed in range(3)])
    assert_same(merged, {name: 0.6 * layer.delta() for name, layer in whole.items()})


def test_directions_that_clients_share_count_once() -> None:
    merged = KnOTS(0).merge([random_adapter(0), random_adapter(0)])
    assert {layer.rank for layer in merged.values()} == {4}
    assert_same(merged, Average().merge([random_adapter(0)]))


def test_the_basis_is_orthonormal_and_spans_every_update_even_after_folding() -> None:
    layers = [random_adapter(seed, rank=1 + seed % 3).layers["fc1"] for seed in range(60)]
    layers = [layer._replace(B=layer.B * (torch.arange(32) < 20)[:, None]) for layer in layers]
    U = shared_basis(layers)
    assert U.shape == (32, 20)
    assert_close(U.T @ U, torch.eye(20), atol=1e-5, rtol=0)
    for layer in layers:
        assert_close(U @ (U.T @ layer.delta()), layer.delta(), atol=1e-5, rtol=0)


def test_the_aligned_gradient_is_that_of_autograd() -> None:
    layer = random_adapter(0).layers["fc1"]
    space = AlignedSpace(layer, shared_basis([layer, random_adapter(1).layers["fc1"]]))
    x, weights = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), torch.arange(160.0).view(5, 32)
    theta = space.parameters[0].clone().requires_grad_()
    (x @ space.update((theta,)).delta().T * weights).sum().backward()
    assert_close(space.gradients(x, weights)[0], theta.grad, rtol=1e-4, atol=1e-2)


def test_pruning_in_the_basis_without_sparsity_is_the_update_itself() -> None:
    adapters = [random_adapter(seed) for seed in range(3)]
    prepared = KnOTS().prepare(adapters, WEIGHTS)
    assert_same(prepared.pruned(adapters[1], 0), {name: deltas(adapters[1:2], name)[0] for name in SHAPES}, 1e-5)


def test_a_layer_that_no_client_changed_stays_as_it_is() -> None:
    nothing = adapter_of({"q": LoRALayer(torch.ones(2, 24), torch.zeros(24, 2))})
    merged = KnOTS().merge([nothing, nothing])["q"]
    assert merged.rank == 1 and not merged.delta().any()
