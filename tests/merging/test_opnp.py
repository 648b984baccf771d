from __future__ import annotations

import pytest
import torch
from probes import FC2, PROJECTION, Q, anchor_gradients, probe, random_adapter, relative_gap

from sap_lightning.errors import InputError
from sap_lightning.functional.masking import Scope
from sap_lightning.merging.opnp import OPNP

NAMES = (Q, FC2, PROJECTION)


def sensitivity(one) -> dict[str, torch.Tensor]:
    """Mean |∂L/∂ΔW| over anchors by autograd in float64."""
    gradients = anchor_gradients(one.layers, NAMES)
    return {name: torch.stack([G[name].abs() for G in gradients]).mean(0) for name in NAMES}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_largest_and_the_smallest_sensitivities_are_dropped_in_exact_numbers(scope: Scope):
    one = random_adapter(1)
    merged = OPNP(0.3, largest=0.05, scope=scope).merge([one], anchors=probe())
    scores = sensitivity(one)
    groups = [[name] for name in NAMES] if scope == "layer" else [sorted(NAMES)]
    for names in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        ranked = flat.sort().indices
        low, high = round(0.25 * len(flat)), round(0.05 * len(flat))
        expected = torch.cat([one.layers[name].delta().flatten() for name in names]).double()
        expected[ranked[:low]] = 0
        expected[ranked[len(flat) - high :]] = 0
        actual = torch.cat([merged[name].flatten() for name in names]).double()
        assert int((actual == 0).sum()) == low + high
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_the_mean_of_clients_is_that_of_each_pruned_alone():
    clients = [random_adapter(seed) for seed in (1, 2, 3)]
    weights = [0.5, 0.3, 0.2]
    merged = OPNP().merge(clients, weights, probe())
    alone = [OPNP().merge([one], anchors=probe()) for one in clients]
    expected = {name: sum(w * one[name] for w, one in zip(weights, alone, strict=True)) for name in NAMES}
    assert relative_gap(merged, expected) < 1e-6


def test_equal_sensitivities_are_never_dropped_at_both_ends():
    scores = {"fc": (torch.ones(10, 10),)}
    masks = OPNP(0.5, largest=0.2).masks(scores, 0.5)
    assert int((~masks["fc"][0]).sum()) == 50


def test_a_sparsity_of_one_drops_all_and_of_zero_nothing():
    one = random_adapter(1)
    prepared = OPNP(0.5, largest=0.05).prepare([one], [1.0], probe())
    assert not any(layer.any() for layer in prepared.apply(1.0).values())
    assert relative_gap(prepared.apply(0.0), {name: layer.delta() for name, layer in one.layers.items()}) == 0


def test_the_share_at_the_upper_end_is_a_part_of_the_whole():
    with pytest.raises(InputError, match=r"merge\.method\.largest 0\.6 is a part of merge\.method\.sparsity"):
        OPNP(0.5, largest=0.6)
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in"):
        OPNP(1.5)
