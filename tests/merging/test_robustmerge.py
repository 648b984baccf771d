from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import SHAPES, adapter_of, assert_same, random_adapter

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.merging.fedavg import FedAvg
from sap_lightning.merging.robustmerge import RobustMerge


def trimmed(matrix: np.ndarray, sparsity: float) -> np.ndarray:
    threshold = np.sort(np.abs(matrix), axis=None)[int(sparsity * matrix.size) - 1]
    return np.where(np.abs(matrix) >= threshold, matrix, 0)


def reference(adapters, name: str, sparsity: float, factor: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """The merged A and B of the published code, client by client and rank by rank in float64."""
    layers = [adapter.layers[name] for adapter in adapters]
    A = sum(factor * trimmed(layer.A.double().numpy(), sparsity) for layer in layers)
    B, total = np.zeros(layers[0].B.shape), np.zeros(layers[0].rank)
    for layer in layers:
        down, up = layer.A.double().numpy(), trimmed(layer.B.double().numpy(), sparsity)
        kept = trimmed(down, sparsity)
        s = [np.abs(row).sum() / np.abs(kept_row).sum() for row, kept_row in zip(down, kept, strict=True)]
        floor, ceiling = sorted(s)[int(0.8 * len(s))], max(s)
        for rank, ratio in enumerate(np.clip(s, floor, ceiling)):
            B[:, rank] += factor * ratio * up[:, rank]
            total[rank] += ratio
    return A, B / total


@pytest.mark.parametrize("sparsity", [0.8, 0.5])
@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("clients", [1, 3])
def test_it_equals_the_published_code(clients: int, rank: int, sparsity: float) -> None:
    adapters = [random_adapter(seed, rank, 2.0) for seed in range(clients)]
    merged = RobustMerge(sparsity).merge(adapters)
    for name in SHAPES:
        A, B = reference(adapters, name, sparsity)
        # The clients' scale of 2 is in both factors by its root.
        torch.testing.assert_close(merged[name].A.double() / 2**0.5, torch.from_numpy(A), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged[name].B.double() / 2**0.5, torch.from_numpy(B), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged[name].delta().double(), torch.from_numpy(2 * B @ A), rtol=1e-5, atol=1e-5)


def test_each_matrix_keeps_one_element_more_than_the_share() -> None:
    merged = RobustMerge(0.8).merge([random_adapter(0)])["fc1"]
    assert int((merged.A != 0).sum()) == 4 * 24 - int(0.8 * 4 * 24) + 1
    assert int((merged.B != 0).sum()) == 32 * 4 - int(0.8 * 32 * 4) + 1


def test_the_update_is_lambda_squared_times_k_that_of_fedavg() -> None:
    adapters = [random_adapter(seed) for seed in range(3)]
    whole = {name: layer.delta() for name, layer in FedAvg().merge(adapters).items()}
    expected = {name: 12 * delta for name, delta in whole.items()}
    assert_same(RobustMerge(sparsity=0).merge(adapters), expected)
    assert_same(RobustMerge(sparsity=0, scale=3**-0.5).merge(adapters), whole)


def with_row(adapter, row: torch.Tensor):
    """The adapter with one row of every A replaced."""
    layers = {}
    for name, layer in adapter.layers.items():
        A = layer.A.clone()
        A[1] = row
        layers[name] = layer._replace(A=A)
    return adapter_of(layers)


@pytest.mark.parametrize("value", [0.0, 1e-6])
def test_a_rank_of_which_nothing_is_left_takes_no_part(value: float) -> None:
    empty = with_row(random_adapter(0), torch.full((24,), value))
    alone = RobustMerge().merge([empty])["q"]
    assert alone.A.isfinite().all() and not alone.A[1].any() and not alone.B[:, 1].any()
    other = random_adapter(1)
    both, only = RobustMerge().merge([empty, other])["q"], RobustMerge().merge([other])["q"]
    torch.testing.assert_close(both.B[:, 1], only.B[:, 1])
    torch.testing.assert_close(both.A[1], only.A[1])


def test_weights_multiply_lambda() -> None:
    adapters = [random_adapter(0), random_adapter(1)]
    merged = RobustMerge().merge(adapters, [0.75, 0.25])["q"]
    first, second = (RobustMerge().merge([adapter])["q"].A for adapter in adapters)
    torch.testing.assert_close(merged.A, 1.5 * first + 0.5 * second)


def test_other_ranks_and_missing_layers_are_zeros() -> None:
    small, large, partial = random_adapter(0, 2), random_adapter(1, 4), random_adapter(2, 4, names=["q"])
    merged = RobustMerge().merge([small, large, partial])
    without = RobustMerge().merge([large])["fc1"]
    torch.testing.assert_close(merged["fc1"].B[:, 2:], without.B[:, 2:])
    assert merged["fc1"].shape == (32, 24) and merged["q"].rank == 4


def test_another_sparsity_can_be_applied() -> None:
    prepared = RobustMerge().prepare([random_adapter(0)], [1.0])
    assert_same(prepared.apply(0.5), RobustMerge(0.5).merge([random_adapter(0)]), 0)
    assert_same(prepared.apply(), RobustMerge().merge([random_adapter(0)]), 0)


def test_everything_zero_merges_to_zero() -> None:
    layer = LoRALayer(torch.zeros(4, 24), torch.zeros(24, 4))
    assert not RobustMerge().merge([adapter_of({"q": layer})] * 2)["q"].delta().any()
