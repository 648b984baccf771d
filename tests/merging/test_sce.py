from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import SHAPES, assert_same, deltas, mergekit_group, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.merging.sce import SCE, variance

WEIGHTS = [0.5, 0.3, 0.2]


def reference(
    adapters, density: float, masks_the_merge: bool, weights=(1 / 3, 1 / 3, 1 / 3)
) -> dict[str, torch.Tensor]:
    """Select, calculate and erase on dense float64 updates."""
    merged = {}
    for name, shape in SHAPES.items():
        updates = deltas(adapters, name).flatten(1).numpy()
        order = np.argsort(-np.var(updates, axis=0))
        selected = np.zeros(updates.shape[1], dtype=bool)
        selected[order[: int(density * np.count_nonzero(np.var(updates, axis=0)))]] = True
        eta = [w * np.sum(update[selected] ** 2) for w, update in zip(weights, updates, strict=True)]
        merged[name] = torch.zeros(updates.shape[1], dtype=torch.float64)
        for i, values in enumerate(updates.T):
            sign = 1 if np.dot(weights, values) >= 0 else -1
            agreeing = [k for k, value in enumerate(values) if value * sign > 0]
            if agreeing and (selected[i] or not masks_the_merge):
                merged[name][i] = sum(eta[k] * values[k] for k in agreeing) / sum(eta[k] for k in agreeing)
        merged[name] = merged[name].view(shape)
    return merged


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["mergekit", "authors"])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_it_selects_calculates_and_erases(weights, variant, density: float) -> None:
    adapters = unlike_adapters()
    expected = reference(adapters, density, variant == "mergekit", weights)
    assert_same(SCE(1 - density, variant).merge(adapters, weights), expected)


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_it_equals_mergekit(density: float) -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    adapters = unlike_adapters()
    expected = {}
    for name in SHAPES:
        group = mergekit_group(adapters, name)
        expected[name] = registry.get("sce").merge_group(group, int8_mask=False, select_topk=density)
    assert_same(SCE(1 - density).merge(adapters), expected)


@pytest.mark.parametrize("variant", ["mergekit", "authors"])
@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_equal_clients_are_all_selected(clients: int, variant) -> None:
    adapter = random_adapter(0)
    assert_same(SCE(0.9, variant).merge([adapter] * clients), adapter.layers)


def test_small_updates_have_coefficients_too() -> None:
    adapters = [random_adapter(0, scale=1e-5), random_adapter(1, scale=3e-5)]
    assert_same(SCE(0.5).merge(adapters), reference(adapters, 0.5, True, (0.5, 0.5)))


def test_a_larger_client_has_the_larger_say() -> None:
    large, small = random_adapter(0), random_adapter(0, scale=0.25)  # half as large as 0.5
    # η is 4 to 1, and all agree.
    expected = {name: (4 * 1 + 1 * 0.5) / 5 * deltas([large], name)[0] for name in SHAPES}
    assert_same(SCE(0.0).merge([large, small]), expected)


@pytest.mark.parametrize("clients", [2, 5])
def test_the_variance_keeps_its_digits_beside_large_means(clients: int) -> None:
    layers = [random_adapter(0, scale=1 + seed * 1e-3).layers["q"] for seed in range(clients)]
    exact = torch.stack([layer.scale * layer.B.double() @ layer.A.double() for layer in layers]).var(0, correction=0)
    # The updates themselves are rounded at 1e-7 of themselves, 1e-4 of what they differ by.
    assert float((variance(layers).double() - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("variant", ["mergekit", "authors"])
def test_a_sparsity_of_one_selects_nothing(variant) -> None:
    adapters = unlike_adapters()
    merged = SCE(1.0, variant).merge(adapters)
    if variant == "mergekit":
        assert not any(update.any() for update in merged.values())
    else:  # coefficients are equal, the disjoint mean is left
        for name in SHAPES:
            updates = deltas(adapters, name)
            agrees = (updates != 0) & (updates.sign() == torch.where(updates.sum(0) >= 0, 1, -1))
            assert_same({name: merged[name]}, {name: (updates * agrees).sum(0) / agrees.sum(0).clamp(min=1)})


def test_another_sparsity_can_be_applied() -> None:
    adapters = unlike_adapters()
    assert_same(SCE(0.9).prepare(adapters, WEIGHTS).apply(0.5), SCE(0.5).merge(adapters, WEIGHTS), 0)


def test_a_sparsity_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in \[0, 1\], got -0\.5"):
        SCE(sparsity=-0.5)
