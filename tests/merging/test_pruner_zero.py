from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import exact_delta
from probes import FC2, PROJECTION, Q, anchor_gradients, probe, random_adapter, relative_gap, zero

from sap_lightning.errors import InputError
from sap_lightning.merging.pruner_zero import PrunerZero, min_max
from sap_lightning.models.probe import Answer

NAMES = (Q, FC2, PROJECTION)


def reference(one, sparsity: float) -> dict[str, torch.Tensor]:
    """|W|²·minmax(√Σ g²) per matrix and the lowest of every row dropped, in float64."""
    gradients = anchor_gradients(one.layers, NAMES)
    pruned = {}
    for name, layer in one.layers.items():
        W = exact_delta(layer).numpy()
        G = np.sqrt(sum(g[name].numpy() ** 2 for g in gradients))
        score = np.abs(W) * np.abs(W) * (G - G.min()) / (G.max() - G.min())
        for row, ranked in zip(W, score.argsort(axis=1, kind="stable"), strict=True):
            row[ranked[: round(sparsity * len(row))]] = 0
        pruned[name] = torch.from_numpy(W)
    return pruned


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_pruner_zero_is_its_symbolic_score_on_every_row(sparsity):
    clients = [random_adapter(seed) for seed in (1, 2)]
    merged = PrunerZero(sparsity).merge(clients, [0.7, 0.3], probe())
    one, other = (reference(client, sparsity) for client in clients)
    assert relative_gap(merged, {name: 0.7 * one[name] + 0.3 * other[name] for name in NAMES}) < 1e-5


def test_every_row_loses_the_same_number_of_elements():
    merged = PrunerZero(0.4).merge([random_adapter(1)], anchors=probe())
    for layer in merged.values():
        assert ((layer == 0).sum(1) == round(0.4 * layer.shape[1])).all()


def test_a_gradient_that_is_the_same_everywhere_leaves_the_score_to_the_weights():
    assert torch.equal(min_max(torch.full((2, 3), 4.0)), torch.ones(2, 3))
    one, method, anchors = random_adapter(1, (Q,)), PrunerZero(0.5), probe()
    anchors.recall(method.question, one.sha256, lambda: Answer({Q: (torch.zeros(32, 32),)}, 0.5))
    delta = one.layers[Q].delta()
    kept = method.merge([one], anchors=anchors)[Q] != 0
    lowest_kept = delta.abs().masked_fill(~kept, torch.inf).amin(1)
    largest_dropped = delta.abs().masked_fill(kept, 0).amax(1)
    assert (lowest_kept >= largest_dropped).all()


def test_an_adapter_that_changes_nothing_merges_to_nothing():
    merged = PrunerZero().merge([zero(random_adapter(1))], anchors=probe())
    assert all(not layer.any() and layer.isfinite().all() for layer in merged.values())


def test_a_share_beyond_one_is_refused():
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in \[0, 1\], got 2"):
        PrunerZero(2)
