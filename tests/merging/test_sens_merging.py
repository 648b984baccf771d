from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from probes import (
    FC2,
    LOGIT_SCALE,
    PROJECTION,
    Q,
    anchor_gradients,
    captions,
    deltas,
    exact_features,
    images,
    is_finite,
    negative,
    probe,
    random_adapter,
    relative_gap,
    tower,
    zero,
)
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.sens_merging import SensMerging, coefficients

ANCHORS = 8


def reference(adapters: Sequence[Adapter], scale: float, temperature: float) -> dict[str, Tensor]:
    names = sorted({name for one in adapters for name in one.layers})
    alphas, logits = [], []
    for one in adapters:
        gradients = anchor_gradients(one.layers, names, ANCHORS)
        theta = {n: tower().get_submodule(n).weight.double() + deltas([one], n)[0] for n in names}
        s = torch.tensor([sum(float((theta[n] * g[n]).abs().sum()) for g in gradients) / ANCHORS for n in names])
        alphas.append(s.double() / s.double().norm())
        logits.append(LOGIT_SCALE * exact_features(one.layers, images(ANCHORS)) @ captions(ANCHORS).double().T)
    tau = torch.tensor(
        [sum(float((mine - other).norm(dim=1).mean()) for other in logits) for mine in logits], dtype=torch.float64
    )
    tau /= tau.sum()
    merged = {}
    for index, name in enumerate(names):
        exponentials = [torch.exp(a[index] * t / temperature) for a, t in zip(alphas, tau, strict=True)]
        sigma = [e / sum(exponentials) for e in exponentials]
        merged[name] = scale * sum(
            len(adapters) * share * delta for share, delta in zip(sigma, deltas(adapters, name), strict=True)
        )
    return merged


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_merge_is_the_papers_formula_on_a_real_tower(temperature: float) -> None:
    adapters = [random_adapter(1), random_adapter(2), random_adapter(3, rank=2)]
    merged = SensMerging(0.4, temperature).merge(adapters, anchors=probe(ANCHORS))
    assert relative_gap(merged, reference(adapters, 0.4, temperature)) < 1e-5


def test_a_client_without_a_layer_counts_there_with_no_update() -> None:
    adapters = [random_adapter(1), random_adapter(2, names=[Q, FC2])]
    merged = SensMerging(temperature=0.1).merge(adapters, anchors=probe(ANCHORS))
    assert PROJECTION in merged
    assert relative_gap(merged, reference(adapters, 0.4, 0.1)) < 1e-5


def test_equal_clients_give_the_scaled_sum_of_task_arithmetic() -> None:
    one = random_adapter(1)
    for count in (1, 3):
        merged = SensMerging(scale=1 / count).merge([one] * count, anchors=probe())
        assert relative_gap(merged, one.layers) < 1e-6


def test_a_hot_softmax_counts_clients_alike_and_a_cold_one_prefers_the_different_and_sensitive() -> None:
    sensitivity = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    logits = torch.tensor([0.0, 0.0, 5.0])[:, None, None].expand(3, 4, 2)
    assert_close(coefficients(sensitivity, logits, 1e6), torch.full((3, 2), 1 / 3).double(), rtol=1e-5, atol=0)
    cold = coefficients(sensitivity, logits, 0.01)
    assert_close(cold.sum(0), torch.ones(2).double())
    assert (cold.argmax(0) == 2).all()
    assert cold[1, 0] > cold[0, 0] and cold[0, 1] > cold[1, 1]


def test_the_order_of_clients_does_not_matter() -> None:
    adapters = [random_adapter(seed) for seed in (1, 2, 3)]
    method = SensMerging(temperature=0.1)
    assert relative_gap(method.merge(adapters, anchors=probe()), method.merge(adapters[::-1], anchors=probe())) < 1e-5


def test_zero_and_opposite_adapters_give_no_nan() -> None:
    one = random_adapter(1)
    for adapters in ([zero(one), zero(one)], [one, negative(one)], [one, zero(one)]):
        assert is_finite(SensMerging().merge(adapters, anchors=probe()))
    assert_close(coefficients(torch.zeros(2, 3), torch.zeros(2, 4, 4), 1.0), torch.full((2, 3), 0.5).double())


@pytest.mark.parametrize("argument", ["scale", "temperature"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_bad_arguments_are_refused_by_name(argument: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{argument}"):
        SensMerging(**{argument: value})


def test_anchors_are_required() -> None:
    with pytest.raises(InputError, match="sens_merging looks at anchors"):
        SensMerging().merge([random_adapter(1)])
