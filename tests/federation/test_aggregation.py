"""Ways to bring LoRA back down, each against its definition on dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.federation.aggregation import AGGREGATIONS, joined, next_start, on_the_base
from sap_lightning.functional.lora import LoRALayer, stack
from sap_lightning.io.adapter import Adapter, sha256_of

WEIGHTS = [0.5, 0.3, 0.2]
SCALE = 2.0


def clients(same_a: bool = False) -> list[LoRALayer]:
    return [LoRALayer(randn64(0 if same_a else k, 2, 7), randn64(10 + k, 9, 2), SCALE) for k in range(3)]


def mean_of(of: list[Tensor]) -> Tensor:
    return sum((weight * one for weight, one in zip(WEIGHTS, of, strict=True)), torch.zeros(()))


def brought_down(way: str, layers: list[LoRALayer]) -> tuple[LoRALayer | None, LoRALayer | None]:
    """Start and folded part of one layer."""
    start, folded = next_start(AGGREGATIONS[way], {"fc": layers}, WEIGHTS, {"fc": stack(layers, WEIGHTS)}, rank=2)
    return start.get("fc"), folded.get("fc")


@pytest.mark.parametrize("way", AGGREGATIONS)
def test_what_is_handed_over_is_the_exact_mean_where_the_authors_say_so(way):
    layers = clients(same_a=way == "ffa_lora")  # whose A is drawn from a common seed
    start, folded = brought_down(way, layers)
    exact = mean_of([SCALE * layer.B @ layer.A for layer in layers])
    made = sum(part.delta() for part in (start, folded) if part is not None)
    error = float((made - exact).norm() / exact.norm())
    assert (error < 1e-12) == (way in ("flora", "fedex_lora", "ffa_lora"))
    assert error < 1.5


def test_fedit_and_fedsa_average_the_factors():
    layers = clients()
    for way in ("fedit", "fedsa_lora"):
        start, folded = brought_down(way, layers)
        assert start is not None and folded is None and start.scale == SCALE
        assert_close(start.A, mean_of([layer.A for layer in layers]))
        assert_close(start.B, mean_of([layer.B for layer in layers]))


def test_flexlora_takes_the_largest_singular_values_of_the_mean():
    layers = clients()
    start, folded = brought_down("flexlora", layers)
    U, sigma, V = torch.linalg.svd(mean_of([layer.delta() for layer in layers]))
    assert start is not None and folded is None
    assert_close(start.delta(), (U[:, :2] * sigma[:2]) @ V[:2])


def test_flora_stacks_the_clients_and_starts_anew():
    layers = [*clients()[:2], LoRALayer(randn64(5, 4, 7), randn64(6, 9, 4), 1.0)]  # of another rank
    start, folded = brought_down("flora", layers)
    assert start is None and folded is not None and folded.rank == 2 + 2 + 4
    assert_close(folded.A, torch.cat([layer.A for layer in layers]))


def test_fedex_goes_on_in_the_means_and_folds_what_they_miss():
    layers = clients()
    start, folded = brought_down("fedex_lora", layers)
    assert start is not None and folded is not None
    assert_close(start.B, mean_of([layer.B for layer in layers]))
    residual = mean_of([layer.B @ layer.A for layer in layers]) - start.B @ start.A  # as fed_agg.py has it
    assert_close(folded.delta(), SCALE * residual)


def test_ffa_keeps_a_bit_for_bit():
    layers = clients(same_a=True)
    start, folded = brought_down("ffa_lora", layers)
    assert start is not None and folded is None
    assert torch.equal(start.A, layers[0].A)
    assert_close(start.B, mean_of([layer.B for layer in layers]))


def test_lora_fair_is_nearer_to_the_mean_in_direction_than_the_averaged_factors():
    layers = clients()
    exact = mean_of([layer.delta() for layer in layers]).flatten()
    (fair, _), (plain, _) = brought_down("lora_fair", layers), brought_down("fedit", layers)
    assert fair is not None and plain is not None and torch.equal(fair.A, plain.A)
    near, far = (torch.cosine_similarity(one.delta().flatten(), exact, dim=0) for one in (fair, plain))
    assert near > far + 0.01


@pytest.mark.parametrize(
    ("way", "sent", "last"), [("fedit", "AB", "AB"), ("ffa_lora", "B", "B"), ("fedsa_lora", "A", "AB")]
)
def test_what_clients_send(way, sent, last):
    assert AGGREGATIONS[way].sent_in(last_round=False) == sent
    assert AGGREGATIONS[way].sent_in(last_round=True) == last


def adapter(layers: dict[str, LoRALayer]) -> Adapter:
    return Adapter("photo", layers, sha256_of(layers), size=7)


def test_an_adapter_of_a_base_to_which_something_was_added_is_that_and_itself_on_the_base_as_it_was():
    first, second, own = clients()
    folded = [adapter({"fc": first}), adapter({"fc": second, "out": first})]
    (whole,) = on_the_base([adapter({"fc": own})], folded)
    assert_close(whole.layers["fc"].delta(), first.delta() + second.delta() + own.delta())
    assert_close(whole.layers["out"].delta(), first.delta())
    assert whole.sha256 == sha256_of(whole.layers) != sha256_of({"fc": own}) and whole.size == 7
    assert on_the_base([adapter({"fc": own})], []) == [adapter({"fc": own})]


def test_adapters_are_joined_layer_by_layer():
    one, other, _ = clients()
    both = joined({"fc": one, "out": one}, {"fc": other, "in": other})
    assert list(both) == ["fc", "in", "out"] and both["in"] is other and both["out"] is one
    assert_close(both["fc"].delta(), one.delta() + other.delta())
