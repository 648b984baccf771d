"""StatsMerging of adapters: against autograd on the definition, and what it makes of one client and of equal ones."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from probes import (
    FC2,
    LOGIT_SCALE,
    PROJECTION,
    Q,
    captions,
    deltas,
    exact_features,
    images,
    probe,
    random_adapter,
    relative_gap,
    tower,
    unlike_clients,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.adamerging import MixtureSpace
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.stats_merging import StatsMerging, taught

NAMES = sorted([Q, FC2, PROJECTION])


def own_answers(adapters: Sequence[Adapter], anchors: int = 8) -> Tensor:
    """Of each client and image the caption that its own model finds most probable, in float64."""
    return torch.stack(
        [(exact_features(one.layers, images(anchors)) @ captions(anchors).double().T).argmax(1) for one in adapters]
    )


def loss_of(adapters: Sequence[Adapter], alphas: Tensor, anchors: int = 8) -> Tensor:
    """Σ_k of the mean cross-entropy to client k's own answers at base + Σ α_k·ΔW_k, by definition in float64."""
    precise = deepcopy(tower()).double()
    weights = {
        f"{name}.weight": precise.get_submodule(name).weight
        + sum(alpha * delta for alpha, delta in zip(row, deltas(adapters, name), strict=True))
        for name, row in zip(NAMES, alphas, strict=True)
    }
    features = normalize(functional_call(precise, weights, (images(anchors).double(),)).image_embeds, dim=-1)
    logits = LOGIT_SCALE * features @ captions(anchors).double().T
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    rows = torch.arange(anchors)
    return sum((-p[rows, answers].log().mean() for answers in own_answers(adapters, anchors)), torch.zeros(()))


def statistics(adapters: Sequence[Adapter]) -> Tensor:
    """Of each layer and client, by numpy; each of mean 0 and deviation 1 over all."""
    every = []
    for name in NAMES:
        for delta in deltas(adapters, name):
            array = delta.numpy()
            sigma = np.linalg.svd(array, compute_uv=False)[:3]
            every.append([array.mean(), array.var(), np.linalg.norm(array), *sigma])
    found = np.array(every)
    return torch.tensor((found - found.mean(0)) / found.std(0)).view(len(NAMES), len(adapters), 6)


def reference(adapters: Sequence[Adapter], steps: int, rate: float, seed: int) -> tuple[Tensor, list[float]]:
    """Adam on autograd's gradients of the definition through the network, and the loss before each step and after."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    seen, adam, losses = statistics(adapters), torch.optim.Adam(network.parameters(), lr=rate), []
    for _ in range(steps):
        loss = loss_of(adapters, network(seen).squeeze(-1).softmax(-1))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    alphas = network(seen).squeeze(-1).softmax(-1).detach()
    return alphas, [*losses, float(loss_of(adapters, alphas))]


def test_coefficients_gradients_are_autograd_s() -> None:
    adapters = unlike_clients()
    at = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.7, 0.1, 0.2]])
    layers = client_layers(adapters)
    spaces = {name: MixtureSpace(layers[name], row.tolist()) for name, row in zip(NAMES, at, strict=True)}
    update = {name: space.update(space.parameters) for name, space in spaces.items()}
    answer = taught(probe(), adapters).gradients(update, spaces, "mean_then_abs", "contrastive")
    leaf = at.double().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(adapters, leaf), leaf)
    found = torch.stack([answer.of[name][0] for name in NAMES]).double()
    assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    assert answer.loss == pytest.approx(float(loss_of(adapters, at.double())), rel=1e-5)


def test_what_it_learns_is_what_adam_learns_on_autograd_s_gradients() -> None:
    adapters = unlike_clients()
    prepared = StatsMerging(steps=6, seed=3).prepare(adapters, [1 / 3] * 3, probe())
    alphas, losses = reference(adapters, 6, 0.05, 3)
    found = torch.tensor([prepared.findings["coefficients"][name] for name in NAMES])
    assert_close(found.double(), alphas, atol=1e-5, rtol=0)
    assert prepared.findings["losses"] == pytest.approx(losses, rel=1e-5)
    expected = {
        name: sum(alpha * delta for alpha, delta in zip(row, deltas(adapters, name), strict=True))
        for name, row in zip(NAMES, alphas, strict=True)
    }
    assert relative_gap(prepared.apply(), expected) < 1e-5


def test_the_loss_falls_and_coefficients_of_a_layer_are_shares() -> None:
    prepared = StatsMerging().prepare(unlike_clients(), [1 / 3] * 3, probe())
    losses = prepared.findings["losses"]
    assert len(losses) == 11 and losses[-1] < losses[0]
    alphas = torch.tensor(list(prepared.findings["coefficients"].values()))
    assert_close(alphas.sum(1), torch.ones(3))
    assert alphas.std(1).min() > 0.01


def test_one_client_is_itself_and_equal_clients_are_that_client() -> None:
    one = random_adapter(1)
    for adapters in ([one], [one, replace(one, name="again"), replace(one, name="and again")]):
        assert relative_gap(StatsMerging(steps=2).merge(adapters, anchors=probe()), one.layers) < 1e-6


def test_it_is_told_nothing_of_an_image_s_own_caption() -> None:
    """Images in another order among the captions have the same answers."""
    adapters, order = unlike_clients(), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    turned = probe(batches=lambda: [(images(8)[order], torch.arange(8))])
    assert (
        relative_gap(StatsMerging().merge(adapters, anchors=turned), StatsMerging().merge(adapters, anchors=probe()))
        < 1e-4
    )


def test_half_of_the_anchors_are_asked_alone() -> None:
    half, _ = probe().halves()
    told = taught(half, unlike_clients()).targets
    assert told is not None and torch.equal(told[::2].T, own_answers(unlike_clients())[:, ::2])


def test_it_gives_the_same_bits_again_also_in_inference_mode() -> None:
    batches, method = list(probe().batches()), StatsMerging(steps=3)
    first, again = (probe(batches=lambda: batches) for _ in range(2))
    expected = method.merge(unlike_clients(), anchors=first)
    torch.manual_seed(5)
    with torch.inference_mode():  # in which a trainer validates
        assert relative_gap(method.merge(unlike_clients(), anchors=again), expected) == 0


def test_the_order_of_clients_does_not_matter() -> None:
    adapters, method = unlike_clients(), StatsMerging(steps=3)
    assert relative_gap(method.merge(adapters[::-1], anchors=probe()), method.merge(adapters, anchors=probe())) < 1e-4


@pytest.mark.parametrize("setting", [{"steps": 0}, {"rate": 0}, {"hidden": 0}])
def test_faulty_settings_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{next(iter(setting))}"):
        StatsMerging(**setting)
