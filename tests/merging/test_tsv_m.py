from __future__ import annotations

import pytest
import torch
from adapters import FULL_RANK, SHAPES, adapter_of, assert_same, deltas, random_adapter, unlike_adapters
from references import whitened
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.merging.tsv_m import TSVM

WEIGHTS = [0.5, 0.3, 0.2]


def reference(adapters, kept: list[int], counts: list[float]) -> dict[str, Tensor]:
    """The paper's algorithm on dense float64 updates; each client's σ times its count."""
    merged = {}
    for name in SHAPES:
        U, sigma, V = [], [], []
        for delta, most, count in zip(deltas(adapters, name), kept, counts, strict=True):
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            n = min(most, int((s > 1e-5).sum()))
            U, sigma, V = [*U, u[:, :n]], [*sigma, count * s[:n]], [*V, v[:n].T]
        merged[name] = whitened(torch.cat(U, 1)) * torch.cat(sigma) @ whitened(torch.cat(V, 1)).T
    return merged


def test_singular_vectors_are_whitened_and_singular_values_kept() -> None:
    adapters = unlike_adapters()
    assert_same(TSVM().merge(adapters), reference(adapters, [8, 8, 8], [1, 1, 1]), 1e-5)


@pytest.mark.parametrize("clients", [2, 3, 5])
def test_a_client_keeps_what_the_layer_has_room_for(clients: int) -> None:
    adapters = [random_adapter(seed, FULL_RANK) for seed in range(clients)]
    expected = reference(adapters, [FULL_RANK // clients] * clients, [1] * clients)
    assert_same(TSVM().merge(adapters), expected, 1e-5)


def test_a_share_of_each_client_s_own_rank_can_stay() -> None:
    adapters = unlike_adapters()  # of rank 4, 2 and 6
    assert_same(TSVM(share=0.5).merge(adapters), reference(adapters, [2, 1, 3], [1, 1, 1]), 1e-5)
    assert_same(TSVM(share=0.0).merge(adapters), reference(adapters, [1, 1, 1], [1, 1, 1]), 1e-5)


def test_weights_are_shares_of_the_number_of_clients() -> None:
    adapters = unlike_adapters()
    assert_same(TSVM().merge(adapters, WEIGHTS), reference(adapters, [8, 8, 8], [1.5, 0.9, 0.6]), 1e-5)


def test_scale_multiplies_the_merge() -> None:
    adapters = unlike_adapters()
    whole = TSVM().merge(adapters)
    assert_same(TSVM(scale=0.4).merge(adapters), {name: 0.4 * dense(update) for name, update in whole.items()})


def test_the_result_is_in_factor_form_of_the_rank_of_all_clients() -> None:
    assert {name: update.rank for name, update in TSVM().merge(unlike_adapters()).items()} == {"fc1": 6, "q": 12}


def test_copies_of_a_client_are_that_client() -> None:
    adapter = random_adapter(0)
    assert_same(TSVM().merge([adapter] * 3), adapter.layers, 1e-5)


def test_opposite_clients_cancel_out() -> None:
    merged = TSVM().merge([random_adapter(0), random_adapter(0, scale=-0.5)])
    assert all(dense(update).abs().max() < 1e-6 for update in merged.values())


def test_clients_that_change_nothing_turn_no_one_s_directions() -> None:
    adapter = random_adapter(0)
    nothing = adapter_of({name: LoRALayer(layer.A, 0 * layer.B) for name, layer in random_adapter(1).layers.items()})
    assert_same(TSVM().merge([adapter, nothing, random_adapter(2, scale=0.0)]), adapter.layers, 1e-5)


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.share must lie in \[0, 1\], got 1\.5"):
        TSVM(share=1.5)
