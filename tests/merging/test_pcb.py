from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from adapters import SHAPES, assert_same, deltas, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import scaled
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.pcb import PCB

WEIGHTS = [0.5, 0.3, 0.2]


def resized(adapters: list[Adapter], factor: float) -> list[Adapter]:
    return [
        Adapter(a.name, {name: scaled(layer, factor) for name, layer in a.layers.items()}, a.sha256, None)
        for a in adapters
    ]


def reference(adapters, sparsity: float, weights=None, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The published code's recipe, softmax written out, on the whole updates (K, N) in float64."""
    updates = torch.cat([deltas(adapters, name).flatten(1) for name in SHAPES], dim=1).numpy()
    clients, size = updates.shape
    total = updates.sum(0)
    numerator, denominator = np.zeros(size), np.zeros(size)
    for update, weight in zip(updates, weights or [1 / clients] * clients, strict=True):
        magnitudes = np.sort(np.abs(update))
        low, high = magnitudes[int(size * 1e-4)], magnitudes[int(size * (1 - 1e-4) - 1)]
        clipped = np.clip(np.abs(update), low, high)
        intra = clients * ((clipped - low) / (high - low)) ** 2
        inter = [math.tanh(value) for value in update * total]
        beta = np.exp(intra) / np.exp(intra).sum() * inter
        floor = np.sort(beta)[min(int(sparsity * size), size - 1)]
        coefficients = np.maximum(beta - floor, 0) / max(beta.max() - floor, 1e-300) * weight * clients
        numerator += coefficients * np.sign(update) * clipped
        denominator += coefficients
    merged = torch.from_numpy(scale * numerator / np.maximum(denominator, 1e-12))
    pieces = merged.split([d_out * d_in for d_out, d_in in SHAPES.values()])
    return {name: piece.view(SHAPES[name]) for name, piece in zip(SHAPES, pieces, strict=True)}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_it_follows_the_published_code(size: float, sparsity: float) -> None:
    adapters = resized(unlike_adapters(), size)
    assert_same(PCB(sparsity).merge(adapters), reference(adapters, sparsity))


def test_weights_count_in_the_mean() -> None:
    adapters = unlike_adapters()
    assert_same(PCB(0.8, scale=0.7).merge(adapters, WEIGHTS), reference(adapters, 0.8, WEIGHTS, scale=0.7))


def test_of_one_client_the_largest_elements_stay_but_for_the_clipped_ends() -> None:
    adapter = random_adapter(0)
    whole = deltas([adapter], "fc1")[0], deltas([adapter], "q")[0]
    flat = torch.cat([delta.flatten() for delta in whole]).abs().sort().values
    for delta, merged in zip(whole, PCB(0.8).merge([adapter]).values(), strict=True):
        kept = merged != 0
        assert torch.equal(kept, delta.abs() > flat[int(0.8 * len(flat))] * (1 + 1e-6))
        torch.testing.assert_close(merged[kept].double(), delta.clamp(-flat[-2], flat[-2])[kept])


def test_a_client_against_the_sum_is_dropped_where_it_is_large() -> None:
    one, other = random_adapter(0), random_adapter(0, scale=-0.25)
    merged = PCB(0.5).merge([one, other])
    updates = {name: deltas([one], name)[0] for name in SHAPES}
    magnitudes = torch.cat([delta.flatten() for delta in updates.values()]).abs().sort().values
    for name, delta in updates.items():
        # All β of the other are negative: at its larger half it is at the floor, and at the smaller it is kept.
        large = delta.abs() > magnitudes[len(magnitudes) // 2] * (1 + 1e-6)
        assert torch.equal(merged[name][large].sign().double(), delta[large].sign())
        assert (merged[name][~large].sign() == -delta[~large].sign()).any()


def test_small_updates_times_c_merge_to_c_times_the_merge_and_large_ones_do_not() -> None:
    def gap(size: float) -> float:
        adapters = resized(unlike_adapters(), size)
        merged, twice = PCB().merge(adapters)["q"], PCB().merge(resized(adapters, 2.0))["q"]
        return float((twice - 2 * merged).norm() / twice.norm())

    assert gap(1e-3) < 1e-5 < 0.05 < gap(1.0)


def test_hundreds_of_clients_do_not_overflow() -> None:
    adapters = [random_adapter(seed % 3, scale=1 + seed / 100) for seed in range(100)]
    assert all(update.isfinite().all() and update.any() for update in PCB().merge(adapters).values())


def test_opposite_clients_leave_nothing() -> None:
    merged = PCB(0.5).merge([random_adapter(0), random_adapter(0, scale=-0.5)])
    assert not any(update.any() for update in merged.values())


def test_at_sparsity_one_nothing_is_left() -> None:
    assert not any(update.any() for update in PCB(1.0).merge(unlike_adapters()).values())


def test_a_sparsity_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in \[0, 1\], got 90; 90 % is 0\.9"):
        PCB(sparsity=90)
