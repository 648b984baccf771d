"""A model that wears updates and gives its base back, bit for bit."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import FC2, PROJECTION, Q, random_adapter, tower
from references import reproducibly
from torch import Tensor, nn
from torch.testing import assert_close

from sap_lightning.functional.lora import Update, dense, scaled
from sap_lightning.models.patched import Patched

BASE = dict(tower().state_dict())
UPDATES: list[dict[str, Update]] = [
    {},
    dict(random_adapter(1).layers),
    dict(random_adapter(2, (Q, PROJECTION)).layers),
    {FC2: random_adapter(3).layers[FC2].delta()},
    # After these little of the base is left in the sum.
    {name: scaled(layer, 1e9) for name, layer in random_adapter(4).layers.items()},
    {Q: torch.full((32, 32), torch.inf), FC2: torch.full((32, 64), torch.nan)},
]


def worn(update: dict[str, Update]) -> dict[str, Tensor]:
    """The base's weights with an update added, every other weight as it is."""
    weights = {name: weight.clone() for name, weight in BASE.items()}
    for name, layer in update.items():
        weights[f"{name}.weight"] = BASE[f"{name}.weight"] + dense(layer)
    return weights


def assert_same_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert_close(dict(model.state_dict()), expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("update", UPDATES)
def test_the_weights_are_the_base_plus_the_update(update: dict[str, Update]) -> None:
    patched = Patched(deepcopy(tower()))
    assert patched.update == {}
    patched.set_update(update)
    assert_same_bits(patched.model, worn(update))
    assert list(patched.update) == list(update) and all(patched.update[name] is update[name] for name in update)


@settings(reproducibly, max_examples=50)
@given(st.lists(st.sampled_from(UPDATES), max_size=6))
def test_any_sequence_of_updates_leaves_the_base_bit_for_bit(sequence: list[dict[str, Update]]) -> None:
    patched = Patched(deepcopy(tower()))
    for update in sequence:
        patched.set_update(update)
        assert_same_bits(patched.model, worn(update))
    patched.set_update({})
    assert_same_bits(patched.model, BASE)
    assert patched.update == {}


def test_the_model_is_changed_in_place_and_only_where_the_update_is() -> None:
    model = deepcopy(tower())
    addresses = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    patched = Patched(model)
    patched.set_update({Q: random_adapter(1).layers[Q]})
    assert patched.model is model
    assert {name: weight.data_ptr() for name, weight in model.state_dict().items()} == addresses
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, BASE[name])}
    assert changed == {f"{Q}.weight"}


def test_what_is_done_to_the_given_mapping_later_changes_nothing() -> None:
    update = dict(random_adapter(1).layers)
    patched = Patched(deepcopy(tower()))
    patched.set_update(update)
    del update[Q]
    assert list(patched.update) == list(random_adapter(1).layers)
    patched.set_update({})
    assert_same_bits(patched.model, BASE)


def test_an_update_may_be_worn_in_inference_mode_and_trained_through_afterwards() -> None:
    patched = Patched(deepcopy(tower()))
    with torch.inference_mode():
        patched.set_update(random_adapter(1).layers)
    pixels = torch.zeros(1, 3, 16, 16, requires_grad=True)
    patched.model(pixels).image_embeds.sum().backward()
    assert pixels.grad is not None and pixels.grad.any()
    with torch.inference_mode():
        patched.set_update({})
    assert_same_bits(patched.model, BASE)


def test_a_trainable_weight_is_changed_without_a_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    patched = Patched(model)
    patched.set_update({"0": torch.ones(2, 3)})
    assert model[0].weight.is_leaf and model[0].weight.requires_grad
    patched.set_update({})
    assert torch.equal(model[0].weight, before)


def test_an_update_of_another_model_is_an_error_after_which_the_base_can_be_had_back() -> None:
    patched = Patched(deepcopy(tower()))
    patched.set_update(random_adapter(1).layers)
    with pytest.raises(AttributeError):
        patched.set_update({"no.such.layer": torch.ones(2, 2), Q: random_adapter(1).layers[Q]})
    with pytest.raises(RuntimeError):
        patched.set_update({Q: random_adapter(1).layers[Q], FC2: torch.ones(3, 3)})
    patched.set_update({})
    assert_same_bits(patched.model, BASE)
