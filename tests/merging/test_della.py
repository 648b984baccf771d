from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from adapters import SHAPES, adapter_of, assert_same, delta_of, mergekit_group, random_adapter
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.spaces import DeltaSpace
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.dare import DARE
from sap_lightning.merging.della import DELLA
from sap_lightning.merging.pruning import uniform_scores

ADAPTERS = [random_adapter(0, 4), random_adapter(1, 2, 2.0), random_adapter(2, 3, 1.0)]
WEIGHTS = [0.5, 0.3, 0.2]


def drawn(adapter: Adapter, name: str) -> Tensor:
    """The uniform numbers that decide about a layer's elements."""
    return uniform_scores(0, adapter, {name: DeltaSpace(adapter.layers[name])})[name][0]


def magpruned(adapter: Adapter, name: str, sparsity: float, window: float) -> np.ndarray:
    """The paper's MAGPRUNE, row by row in float64, with those numbers."""
    pruned = delta_of(adapter, name).numpy()
    for row, numbers in zip(pruned, drawn(adapter, name).numpy(), strict=True):
        for rank, column in enumerate(np.argsort(np.abs(row))):
            p = sparsity + window / 2 - window * rank / (len(row) - 1)
            row[column] = row[column] / (1 - p) if numbers[column] >= p else 0
    return pruned


def elected(updates: np.ndarray, weights: list[float]) -> Tensor:
    weighted = updates * np.array(weights)[:, None, None]
    agrees = (updates != 0) & (np.sign(updates) == np.where(weighted.sum(0) >= 0, 1, -1))
    support = (agrees * np.array(weights)[:, None, None]).sum(0)
    return torch.from_numpy((weighted * agrees).sum(0) / np.where(support > 0, support, 1))


@pytest.mark.parametrize(("sparsity", "window"), [(0.3, 0.14), (0.8, 0.3), (0.5, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_it_is_the_elected_mean_of_what_magprune_leaves(weights, sparsity: float, window: float) -> None:
    expected = {
        name: 0.9 * elected(np.stack([magpruned(a, name, sparsity, window) for a in ADAPTERS]), weights)
        for name in SHAPES
    }
    assert_same(DELLA(sparsity, window, scale=0.9).merge(ADAPTERS, weights), expected)


@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_l1_rescales_as_mergekit_does(weights, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    expected = {}
    for name in SHAPES:
        numbers = iter([drawn(adapter, name) for adapter in ADAPTERS])
        monkeypatch.setattr(
            torch, "bernoulli", lambda keep, numbers=numbers: (next(numbers) >= 1 - keep).to(keep.dtype)
        )
        group = mergekit_group(ADAPTERS, name)
        expected[name] = registry.get("della").merge_group(
            group,
            weight=dict(enumerate(weights, 1)),
            density=dict.fromkeys((1, 2, 3), 0.6),
            epsilon=dict.fromkeys((1, 2, 3), 0.15),
            normalize=True,
            rescale=True,
            int8_mask=False,
            **{"lambda": 1.1},
        )
    assert_same(DELLA(0.4, 0.3, rescale="l1").merge(ADAPTERS, weights), expected)


def test_without_a_window_it_is_dare_with_election() -> None:
    assert_same(DELLA(0.6, window=0, scale=1).merge(ADAPTERS), DARE(0.6, election=True).merge(ADAPTERS))


def test_the_largest_elements_of_a_row_are_dropped_least() -> None:
    drops = torch.zeros(24)
    for seed in range(100):
        (mask,) = DELLA(0.5, 0.8, seed=seed).prepare(ADAPTERS[:1], [1.0]).kept(ADAPTERS[0])["q"]
        order = ADAPTERS[0].layers["q"].delta().abs().argsort(dim=1)
        drops += (~mask).gather(1, order).float().mean(0) / 100
    # 24 rows and 100 seeds: a standard deviation of at most 0.011.
    assert torch.allclose(drops, torch.linspace(0.9, 0.1, 24), atol=0.045)


def test_the_expectation_is_the_update() -> None:
    draws_of = torch.stack([DELLA(0.5, 0.4, 1.0, seed).merge(ADAPTERS[:1])["q"] for seed in range(200)])
    delta = ADAPTERS[0].layers["q"].delta()
    # 1 / (1 − p) is at most 1 / 0.3, so an element's mean deviates by at most √(0.7 / 0.3 / 200) of itself.
    assert ((draws_of.mean(0) - delta) / delta).square().mean().sqrt() < (0.7 / 0.3 / 200) ** 0.5


@pytest.mark.parametrize("sparsity", [0.02, 0.98])
def test_near_the_ends_the_window_is_narrowed_to_what_fits(sparsity: float) -> None:
    adapter = random_adapter(0)
    fitting = DELLA(sparsity, 2 * min(sparsity, 1 - sparsity))
    assert_same(DELLA(sparsity, 0.5).merge([adapter]), fitting.merge([adapter]), 0)


def test_nothing_or_everything_can_be_dropped() -> None:
    prepared = DELLA(scale=1).prepare(ADAPTERS[:1], [1.0])
    assert_same(prepared.apply(0.0), ADAPTERS[0].layers)
    assert not any(update.any() for update in prepared.apply(1.0).values())


def test_a_lower_sparsity_keeps_what_a_higher_one_keeps() -> None:
    prepared = DELLA(window=0.4).prepare(ADAPTERS[:1], [1.0])
    kept = [prepared.kept(ADAPTERS[0], sparsity)["q"][0] for sparsity in (0.0, 0.1, 0.5, 0.85, 0.95, 1.0)]
    assert all((more | ~fewer).all() for more, fewer in pairwise(kept))


def test_the_drops_of_a_client_do_not_depend_on_the_others_but_on_seed_and_layer() -> None:
    alone, among = (DELLA().prepare(some, [1 / len(some)] * len(some)) for some in (ADAPTERS[1:2], ADAPTERS))
    assert all(
        torch.equal(*masks) for masks in zip(alone.kept(ADAPTERS[1])["q"], among.kept(ADAPTERS[1])["q"], strict=True)
    )
    twins = adapter_of({"one": ADAPTERS[0].layers["q"], "two": ADAPTERS[0].layers["q"]})
    merged = DELLA().merge([twins])
    assert not torch.equal(merged["one"], merged["two"])
    assert not torch.equal(merged["one"], DELLA(seed=1).merge([twins])["one"])


@pytest.mark.parametrize("setting", ["sparsity", "window"])
def test_a_share_out_of_range_is_refused(setting: str) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{setting} must lie in \[0, 1\], got 1\.5"):
        DELLA(**{setting: 1.5})
