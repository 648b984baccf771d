from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from probes import (
    FC2,
    LOGIT_SCALE,
    PROJECTION,
    Q,
    captions,
    deltas,
    images,
    is_finite,
    negative,
    probe,
    random_adapter,
    relative_gap,
    tower,
    unlike_clients,
    zero,
)
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.adamerging import AdaMerging, MixtureSpace
from sap_lightning.merging.clients import client_layers

NAMES = sorted([Q, FC2, PROJECTION])
WEIGHTS = [0.5, 0.3, 0.2]


def entropy(adapters: Sequence[Adapter], coefficients: Tensor, anchors: int = 8) -> Tensor:
    """The mean entropy of the anchors at base + Σ λ_k·ΔW_k in float64, by definition; λ of shape (layers, K)."""
    precise = deepcopy(tower()).double()
    weights = {
        f"{name}.weight": precise.get_submodule(name).weight
        + sum(c * delta for c, delta in zip(row, deltas(adapters, name), strict=True))
        for name, row in zip(NAMES, coefficients, strict=True)
    }
    features = normalize(functional_call(precise, weights, (images(anchors).double(),)).image_embeds, dim=-1)
    p = (LOGIT_SCALE * features @ captions(anchors).double().T).exp()
    p = p / p.sum(1, keepdim=True)
    return -(p * p.log()).sum(1).mean()


def gradient(adapters: Sequence[Adapter], coefficients: Tensor) -> Tensor:
    leaf = coefficients.double().clone().requires_grad_()
    return torch.autograd.grad(entropy(adapters, leaf), leaf)[0]


def reference(adapters: Sequence[Adapter], weights: Sequence[float], steps: int, rate: float) -> Tensor:
    """Adam (Kingma & Ba 2015) on autograd's gradients in float64, beyond [0, 1] without one."""
    free = torch.tensor([list(weights)] * len(NAMES), dtype=torch.float64)
    first, second = torch.zeros_like(free), torch.zeros_like(free)
    for t in range(1, steps + 1):
        g = gradient(adapters, free.clamp(0, 1)) * ((free >= 0) & (free <= 1))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        free = free - rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return free.clamp(0, 1)


def coefficients_of(prepared) -> Tensor:
    return torch.tensor([prepared.findings["coefficients"][name] for name in NAMES])


def test_coefficients_gradients_are_autograds() -> None:
    adapters, at = unlike_clients(), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.9, 0.4], [0.7, 0.0, 1.0]])
    layers = client_layers(adapters)
    spaces = {name: MixtureSpace(layers[name], row.tolist()) for name, row in zip(NAMES, at, strict=True)}
    update = {name: space.update(space.parameters) for name, space in spaces.items()}
    answer = probe().gradients(update, spaces, "mean_then_abs", "entropy")
    found, expected = torch.stack([answer.of[name][0] for name in NAMES]).double(), gradient(adapters, at)
    assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    assert answer.loss == pytest.approx(float(entropy(adapters, at.double())), rel=1e-5)
    assert found[NAMES.index(FC2), 2] == 0, "a client without the layer has no gradient there"


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.05), (6, 0.05), (4, 0.4)])
def test_the_merge_is_that_of_adam_on_autograd_s_gradients(steps: int, rate: float) -> None:
    adapters = unlike_clients()
    expected = {
        name: sum(c * delta for c, delta in zip(row, deltas(adapters, name), strict=True))
        for name, row in zip(NAMES, reference(adapters, WEIGHTS, steps, rate), strict=True)
    }
    assert relative_gap(AdaMerging(steps, rate).merge(adapters, WEIGHTS, probe()), expected) < 1e-5


def test_the_entropy_falls_and_is_that_of_the_merge() -> None:
    adapters, anchors = unlike_clients(), probe()
    prepared = AdaMerging().prepare(adapters, WEIGHTS, anchors)
    losses = prepared.findings["entropy"]
    assert len(losses) == 11 and losses[-1] < losses[0]
    assert losses[0] == pytest.approx(float(entropy(adapters, torch.tensor([WEIGHTS] * 3).double())), rel=1e-5)
    assert anchors.loss(prepared.apply(), "entropy") == pytest.approx(losses[-1], rel=1e-5)


def test_without_steps_it_is_the_weighted_average() -> None:
    adapters = unlike_clients()
    merged = AdaMerging(steps=0).merge(adapters, WEIGHTS, probe())
    expected = {
        name: sum(w * delta for w, delta in zip(WEIGHTS, deltas(adapters, name), strict=True)) for name in NAMES
    }
    assert relative_gap(merged, expected) < 1e-6


def test_coefficients_stay_between_zero_and_one() -> None:
    found = coefficients_of(AdaMerging(4, rate=1.0).prepare(unlike_clients(), WEIGHTS, probe()))
    assert found.min() == 0 and found.max() == 1


def test_it_gives_the_same_bits_again_also_in_inference_mode() -> None:
    batches, method = list(probe().batches()), AdaMerging(steps=3)
    first, again = (probe(batches=lambda: batches) for _ in range(2))
    expected = method.merge(unlike_clients(), WEIGHTS, first)
    with torch.inference_mode():  # in which a trainer validates
        assert relative_gap(method.merge(unlike_clients(), WEIGHTS, again), expected) == 0


def test_the_order_of_clients_does_not_matter() -> None:
    adapters, method = unlike_clients(), AdaMerging(steps=3)
    shuffled = method.merge(adapters[::-1], WEIGHTS[::-1], probe())
    assert relative_gap(shuffled, method.merge(adapters, WEIGHTS, probe())) < 1e-4


def test_one_equal_zero_and_opposite_clients_give_no_nan() -> None:
    one = random_adapter(1)
    for adapters in ([one], [one, one], [zero(one), zero(one)], [one, negative(one)], [one, zero(one)]):
        assert is_finite(AdaMerging(steps=1).merge(adapters, anchors=probe()))
    prepared = AdaMerging(steps=2).prepare([one, zero(one)], [0.6, 0.4], probe())
    assert all(row[1] == pytest.approx(0.4) for row in prepared.findings["coefficients"].values())


def test_anchors_are_required() -> None:
    with pytest.raises(InputError, match="adamerging looks at anchors"):
        AdaMerging().merge([random_adapter(1)])


@pytest.mark.parametrize("setting", [{"steps": -1}, {"rate": 0}, {"rate": float("nan")}])
def test_faulty_settings_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{next(iter(setting))}"):
        AdaMerging(**setting)
