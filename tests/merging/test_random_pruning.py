from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import SHAPES, assert_same, deltas, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.merging.fedavg import FedAvg
from sap_lightning.merging.random_pruning import RandomPruning

WEIGHTS = [0.5, 0.3, 0.2]


def test_what_is_left_is_as_it_was_and_averaged() -> None:
    adapters = unlike_adapters()
    prepared = RandomPruning().prepare(adapters, WEIGHTS)
    for name in SHAPES:
        expected = torch.zeros(SHAPES[name], dtype=torch.float64)
        for adapter, delta, weight in zip(adapters, deltas(adapters, name), WEIGHTS, strict=True):
            if name in adapter.layers:
                (keep,) = prepared.kept(adapter)[name]
                assert int((~keep).sum()) == round(0.8 * keep.numel())
                expected += weight * delta * keep
        assert_same({name: prepared.apply()[name]}, {name: expected})


def test_the_kept_share_is_spread_evenly_whatever_the_size_of_the_elements() -> None:
    adapter = random_adapter(0)
    keeps = [RandomPruning(0.5, seed=seed).prepare([adapter], [1.0]).kept(adapter)["q"][0] for seed in range(200)]
    often = torch.stack(keeps).float().mean(0)
    assert (often - 0.5).abs().max() < 5 * (0.25 / 200) ** 0.5
    magnitude = adapter.layers["q"].delta().abs().flatten()
    assert torch.corrcoef(torch.stack([often.flatten(), magnitude]))[0, 1].abs() < 0.2


def test_the_choice_follows_seed_adapter_and_layer_alone() -> None:
    one, other = random_adapter(0), random_adapter(1)
    kept = RandomPruning().prepare([one, other], [0.5, 0.5]).kept(one)
    again = RandomPruning(rescale="l2").prepare([one], [1.0]).kept(one)
    assert all(torch.equal(kept[name][0], again[name][0]) for name in SHAPES)
    for prepared, adapter in (
        (RandomPruning(seed=1).prepare([one], [1.0]), one),
        (RandomPruning().prepare([other], [1.0]), other),
    ):
        assert not torch.equal(kept["q"][0], prepared.kept(adapter)["q"][0])


def test_a_higher_sparsity_keeps_a_part_of_what_a_lower_one_does() -> None:
    adapter = random_adapter(0)
    prepared = RandomPruning().prepare([adapter], [1.0])
    low, high = prepared.kept(adapter, 0.3), prepared.kept(adapter, 0.9)
    assert not any((high[name][0] & ~low[name][0]).any() for name in SHAPES)


def test_as_its_authors_run_it_a_and_b_are_pruned_and_averaged_apart() -> None:
    adapters = [random_adapter(0), random_adapter(1), random_adapter(2)]
    method = RandomPruning(0.5, "factor", "tensor", mean_of="factors")
    prepared = method.prepare(adapters, WEIGHTS)
    expected = {}
    for name in SHAPES:
        layers = [prepared.pruned(adapter)[name] for adapter in adapters]
        A, B = (sum(w * getattr(x, part).double() for w, x in zip(WEIGHTS, layers, strict=True)) for part in ("A", "B"))
        expected[name] = 0.5 * B @ A
    assert_same(prepared.apply(), expected)
    assert_same(replace(method, sparsity=0).merge(adapters, WEIGHTS), FedAvg().merge(adapters, WEIGHTS))


@pytest.mark.parametrize("rescale", ["l1", "l2"])
def test_it_may_restore_the_norm_of_each_layer(rescale) -> None:
    adapter, p = random_adapter(0), int(rescale[1])
    for name, update in RandomPruning(rescale=rescale).merge([adapter]).items():
        assert float(dense(update).norm(p)) == pytest.approx(float(adapter.layers[name].delta().norm(p)), rel=1e-5)


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in"):
        RandomPruning(1.5)
    with pytest.raises(InputError, match=r"mean_of factors needs merge\.method\.space factor, got delta"):
        RandomPruning(mean_of="factors")
    with pytest.raises(InputError, match=r"rescale robust needs merge\.method\.space factor, got singular"):
        RandomPruning(space="singular", rescale="robust")
