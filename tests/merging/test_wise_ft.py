from __future__ import annotations

import pytest
from adapters import SHAPES, assert_same, deltas, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.merging.average import Average
from sap_lightning.merging.wise_ft import WiSEFT


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0])
def test_it_is_a_point_between_the_base_and_the_weighted_average(scale: float) -> None:
    adapters, weights = unlike_adapters(), [0.5, 0.3, 0.2]
    expected = {}
    for name in SHAPES:
        first, second, third = deltas(adapters, name)
        expected[name] = scale * (0.5 * first + 0.3 * second + 0.2 * third)
    assert_same(WiSEFT(scale).merge(adapters, weights), expected)


def test_it_is_half_of_one_client() -> None:
    adapter = random_adapter(0)
    assert_same(WiSEFT().merge([adapter]), {name: 0.5 * layer.delta() for name, layer in adapter.layers.items()})


def test_its_ends_are_the_base_and_the_average() -> None:
    adapters = unlike_adapters()
    assert not any(dense(layer).any() for layer in WiSEFT(0).merge(adapters).values())
    assert_same(WiSEFT(1).merge(adapters), Average().merge(adapters), 0)


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan")])
def test_what_lies_outside_the_two_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match=r"merge\.method\.scale must lie in \[0, 1\]"):
        WiSEFT(scale)
