from __future__ import annotations

import pytest
import torch
from adapters import exact_delta
from probes import FC2, PROJECTION, Q, captions, images, probe, random_adapter, relative_gap, tower
from torch import Tensor
from torch.func import functional_call

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.grasp import GRASP

NAMES = (Q, FC2, PROJECTION)
Triplets = dict[str, tuple[Tensor, Tensor, Tensor]]


def triplets_of(one: Adapter) -> Triplets:
    """U (d_out, r), σ (r,), Vᵀ (r, d_in) of every ΔW in float64, as leaves."""
    found = {}
    for name, layer in one.layers.items():
        U, sigma, V = torch.linalg.svd(exact_delta(layer), full_matrices=False)
        parts = U[:, : layer.rank], sigma[: layer.rank], V[: layer.rank]
        found[name] = tuple(part.clone().requires_grad_() for part in parts)
    return found


def taylor(triplets: Triplets) -> dict[str, list[Tensor]]:
    """|θ·∂L/∂θ| of every element of U, σ and V, by autograd through W + U·diag(σ)·V."""
    weights = {
        f"{name}.weight": tower().get_submodule(name).weight.double() + U * sigma @ V
        for name, (U, sigma, V) in triplets.items()
    }
    state = {name: tensor.double() for name, tensor in tower().state_dict().items()} | weights
    features = functional_call(tower(), state, (images(8).double(),)).image_embeds
    loss = (1 - torch.cosine_similarity(features, captions(8).double())).mean()
    leaves = [leaf for parts in triplets.values() for leaf in parts]
    of = iter(torch.autograd.grad(loss, leaves))
    return {name: [(leaf * next(of)).abs().detach() for leaf in parts] for name, parts in triplets.items()}


def scores(one: Adapter, score: str) -> dict[str, Tensor]:
    terms = taylor(triplets_of(one))
    if score == "code":
        return {name: of_sigma for name, (_, of_sigma, _) in terms.items()}
    return {name: of_sigma + of_u.sum(0) + of_v.sum(1) for name, (of_u, of_sigma, of_v) in terms.items()}


def reference(one: Adapter, score: str, sparsity: float) -> dict[str, Tensor]:
    pruned = {}
    of_layers = scores(one, score)
    for name, (U, sigma, V) in triplets_of(one).items():
        kept = of_layers[name].sort().indices[round(sparsity * len(sigma)) :]
        pruned[name] = (U[:, kept] * sigma[kept] @ V[kept]).detach()
    return pruned


@pytest.mark.parametrize("score", ["paper", "code"])
def test_a_triplet_s_score_is_that_of_autograd_on_its_elements(score):
    one = random_adapter(1, rank=6)
    answer = GRASP(score=score).prepare([one], [1.0], probe()).answer(one)
    for name, expected in scores(one, score).items():
        torch.testing.assert_close(answer.of[name][0].double(), expected, rtol=1e-3, atol=1e-7)
    assert answer.loss == pytest.approx(probe().loss(one.layers), rel=1e-5)


@pytest.mark.parametrize("score", ["paper", "code"])
def test_grasp_is_the_mean_without_the_lowest_triplets_of_every_layer(score):
    clients, weights = [random_adapter(1, rank=6), random_adapter(2, rank=5)], [0.6, 0.4]
    merged = GRASP(0.5, score).merge(clients, weights, probe())
    one, other = (reference(client, score, 0.5) for client in clients)
    assert relative_gap(merged, {name: 0.6 * one[name] + 0.4 * other[name] for name in NAMES}) < 1e-4


def test_the_paper_s_score_and_the_code_s_keep_other_triplets():
    one = random_adapter(1, rank=6)
    merged = [GRASP(0.5, score).merge([one], anchors=probe()) for score in ("paper", "code")]
    assert relative_gap(*merged) > 0.1


def test_unpruned_grasp_is_the_mean():
    one = random_adapter(1)
    merged = GRASP(0.0).merge([one], anchors=probe())
    assert relative_gap(merged, {name: exact_delta(layer) for name, layer in one.layers.items()}) < 1e-5


def test_a_share_beyond_one_is_refused():
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in \[0, 1\], got -1"):
        GRASP(-1)
