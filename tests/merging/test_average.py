from __future__ import annotations

import pytest
from adapters import SHAPES, assert_same, deltas, peft_merge, random_adapter, unlike_adapters

from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.functional.recompression import recompress
from sap_lightning.merging.average import Average

WEIGHTS = [0.5, 0.3, 0.2]


def average_of(adapters, weights):
    return {name: sum(w * d for w, d in zip(weights, deltas(adapters, name), strict=True)).float() for name in SHAPES}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_the_dense_weighted_mean(weights) -> None:
    adapters = unlike_adapters()
    assert_same(Average().merge(adapters, weights), average_of(adapters, weights or [1 / 3] * 3))


def test_it_stays_in_factor_form_while_that_is_smaller() -> None:
    merged = Average().merge([random_adapter(seed) for seed in range(3)])
    assert {layer.rank for layer in merged.values()} == {12}
    assert not any(isinstance(layer, LoRALayer) for layer in Average().merge([random_adapter(0)] * 4).values())


def test_it_equals_peft_cat() -> None:
    adapters = [random_adapter(0), random_adapter(1, 2, 2.0), random_adapter(2, 3, 1.0)]
    assert_same(Average().merge(adapters, WEIGHTS), peft_merge(adapters, WEIGHTS, "cat"))


@pytest.mark.parametrize("clients", [3, 5])
def test_it_recompressed_equals_peft_svd(clients: int) -> None:
    adapters = [random_adapter(seed) for seed in range(clients)]
    merged = Average().merge(adapters)
    small = {name: recompress(update, 4) for name, update in merged.items()}
    assert {layer.rank for layer in small.values()} == {4}
    expected = peft_merge(adapters, [1 / clients] * clients, "svd", svd_rank=4)
    assert_same({name: dense(layer) for name, layer in small.items()}, expected, 1e-5)
