from __future__ import annotations

import pytest
import torch
from adapters import FULL_RANK, SHAPES, adapter_of, assert_same, peft_merge, random_adapter

from sap_lightning.functional.lora import dense
from sap_lightning.merging.dare import DARE

ADAPTERS = [random_adapter(0, 4), random_adapter(1, 2, 2.0), random_adapter(2, 3, 1.0)]


def test_what_stays_is_divided_by_the_share_that_is_kept() -> None:
    merged = DARE(0.75).merge(ADAPTERS[:1])
    for name, layer in ADAPTERS[0].layers.items():
        stays = merged[name] != 0
        assert torch.allclose(merged[name][stays], 4 * layer.delta()[stays])


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_elements_are_dropped_with_the_probability_and_not_by_count(sparsity: float) -> None:
    drops = [int((DARE(sparsity, seed).merge(ADAPTERS[:1])["q"] == 0).sum()) for seed in range(50)]
    elements, deviation = 576 * 50, (576 * 50 * sparsity * (1 - sparsity)) ** 0.5
    assert abs(sum(drops) - sparsity * elements) < 4 * deviation
    assert len(set(drops)) > 10


def test_the_expectation_is_the_update() -> None:
    draws = torch.stack([DARE(0.5, seed).merge(ADAPTERS[:1])["q"] for seed in range(400)])
    delta = ADAPTERS[0].layers["q"].delta()
    # Each element is 0 or 2·ΔW, so the mean of 400 draws deviates by ΔW / 20.
    assert ((draws.mean(0) - delta) / (delta / 20)).square().mean().sqrt() == pytest.approx(1, abs=0.15)


def test_the_drops_of_a_client_do_not_depend_on_the_others() -> None:
    alone = [DARE(0.5).merge([adapter]) for adapter in ADAPTERS]
    mean = {name: sum(dense(merged[name]) for merged in alone) / 3 for name in SHAPES}
    assert_same(DARE(0.5).merge(ADAPTERS), mean)


def test_the_drops_differ_between_seeds_clients_and_layers() -> None:
    twins = adapter_of({"one": ADAPTERS[0].layers["q"], "two": ADAPTERS[0].layers["q"]})
    merged = DARE(0.5).merge([twins])
    others = [
        merged["two"],
        DARE(0.5, seed=1).merge([twins])["one"],
        DARE(0.5).merge([adapter_of({"one": twins.layers["one"]})])["one"],
    ]
    assert DARE(0.5).merge([twins])["one"].equal(merged["one"])
    for other in others:
        agreement = ((other == 0) == (merged["one"] == 0)).float().mean()
        assert agreement == pytest.approx(0.5, abs=0.1)


def test_a_lower_sparsity_keeps_what_a_higher_one_keeps() -> None:
    prepared = DARE(0.9).prepare(ADAPTERS[:1], [1.0])
    assert ((prepared.apply()["q"] == 0) | (prepared.apply(0.5)["q"] != 0)).all()


def test_l1_rescales_as_mergekit_does() -> None:
    sparsify = pytest.importorskip("mergekit.sparsify")
    prepared = DARE(0.75, rescale="l1").prepare(ADAPTERS[:1], [1.0])
    masks = prepared.kept(ADAPTERS[0])
    expected = {
        name: sparsify.rescaled_masked_tensor(layer.delta(), masks[name][0], sparsify.RescaleNorm.l1)
        for name, layer in ADAPTERS[0].layers.items()
    }
    assert_same(prepared.apply(), expected)


@pytest.mark.parametrize(
    ("election", "combination", "weight"), [(False, "dare_linear_svd", 1 / 3), (True, "dare_ties_svd", 1.0)]
)
def test_without_drops_it_equals_peft(election: bool, combination: str, weight: float) -> None:
    with pytest.warns(UserWarning, match="no pruning"):
        expected = peft_merge(ADAPTERS, [weight] * 3, combination, svd_rank=FULL_RANK, density=1.0)
    assert_same(DARE(0, election=election).merge(ADAPTERS), expected, 1e-5)


def test_the_election_is_among_what_stays() -> None:
    alone = torch.stack([DARE(0.5).merge([adapter])["q"] for adapter in ADAPTERS])
    positive = alone.sum(0) >= 0
    agrees = (alone > 0) == positive
    agrees &= alone != 0
    expected = (alone * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    assert_same({"q": DARE(0.5, election=True).merge(ADAPTERS)["q"]}, {"q": expected})


def test_everything_can_be_dropped() -> None:
    assert not any(update.any() for update in DARE(1.0).merge(ADAPTERS).values())
