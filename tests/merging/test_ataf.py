from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from adapters import exact_delta
from probes import (
    FC2,
    LOGIT_SCALE,
    PROJECTION,
    Q,
    captions,
    deltas,
    exact_features,
    images,
    is_finite,
    negative,
    probe,
    random_adapter,
    random_layer,
    relative_gap,
    zero,
)
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.agreement import divergence
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.procrustes import Side, aligned
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.ataf import ATAF, Mixture

ANCHORS = 8
ADAPTERS = [random_adapter(1), random_adapter(2), random_adapter(3, rank=2), random_adapter(4)]
WEIGHTS = [0.4, 0.3, 0.2, 0.1]


EACH_SIDE = pytest.mark.parametrize("side", ["input", "output"])


def rotation(delta: Tensor, reference: Tensor) -> Tensor:
    """argmin over orthogonal P of ‖ΔW·P − ΔW_ref‖ from the dense SVD, shape (d_in, d_in)."""
    U, _, V = torch.linalg.svd(delta.T @ reference)
    return U @ V


def dense_aligned(delta: Tensor, reference: Tensor, side: Side = "input") -> Tensor:
    if side == "output":
        return dense_aligned(delta.T, reference.T).T
    rotated = delta @ rotation(delta, reference)
    columns = [
        (float(target @ column) / float(column @ column) if float(column @ column) > 1e-20 else 0.0) * column
        for column, target in zip(rotated.T, reference.T, strict=True)
    ]
    return torch.stack(columns, dim=1)


def medoid(adapters: Sequence[Adapter]) -> int:
    names = sorted({name for one in adapters for name in one.layers})
    whole = [torch.cat([deltas([one], name)[0].flatten() for name in names]) for one in adapters]
    sums = [sum(float((one - other).norm()) for other in whole) for one in whole]
    return sums.index(min(sums))


def predictions(layers: Mapping[str, LoRALayer]) -> Tensor:
    logits = LOGIT_SCALE * exact_features(layers, images(ANCHORS)) @ captions(ANCHORS).double().T
    return logits.softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def as_layer(delta: Tensor) -> LoRALayer:
    return LoRALayer(torch.eye(delta.shape[1]).double(), delta)


def reference(
    adapters: Sequence[Adapter], weights: Sequence[float], steps: int, side: Side
) -> tuple[float, dict[str, Tensor]]:
    r = medoid(adapters)
    others = [k for k in range(len(adapters)) if k != r]
    total = sum(weights[k] for k in others)
    own = [predictions(one.layers) for one in adapters]
    found: list[tuple[float, float, dict[str, Tensor]]] = []
    for alpha in torch.linspace(0, 1, steps).tolist():
        merged = {}
        for name in adapters[0].layers:
            delta = deltas(adapters, name)
            mixed = sum(weights[k] / total * dense_aligned(delta[k], delta[r], side) for k in others)
            merged[name] = (1 - alpha) * delta[r] + alpha * mixed
        p = predictions({name: as_layer(delta) for name, delta in merged.items()})
        js = torch.stack([kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2 for q in own]).mean()
        found.append((float(js), alpha, merged))
    _, alpha, merged = min(found, key=lambda one: one[0])
    return alpha, merged


@EACH_SIDE
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_alignment_is_the_dense_procrustes_and_its_scale(shape: tuple[int, int], side: Side) -> None:
    layer, to = random_layer(1, shape, rank=3), random_layer(5, shape, rank=3)
    expected = dense_aligned(exact_delta(layer), exact_delta(to), side)
    assert_close(aligned(layer, to, side).delta().double(), expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_no_other_rotation_comes_nearer_to_the_reference() -> None:
    layer, to = random_layer(1, (12, 9)), random_layer(5, (12, 9))
    target = exact_delta(to)
    ours = float((exact_delta(layer) @ rotation(exact_delta(layer), target) - target).norm())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=generator))
        assert float((exact_delta(layer) @ other - target).norm()) > ours
    assert float((aligned(layer, to).delta().double() - target).norm()) <= ours * (1 + 1e-6)


@EACH_SIDE
def test_a_reference_aligned_to_itself_is_itself_and_so_is_its_opposite_and_multiple(side: Side) -> None:
    one = random_layer(1, (20, 30))
    for factor in (1.0, -1.0, 3.0):
        assert relative_gap({"": aligned(one._replace(scale=factor * one.scale), one, side)}, {"": one}) < 1e-6


def test_a_rotated_update_is_turned_back_on_the_side_it_was_rotated_on() -> None:
    one = random_layer(1, (20, 20))
    turn, _ = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
    of_inputs, of_outputs = one._replace(A=one.A @ turn), one._replace(B=turn @ one.B)
    assert relative_gap({"": aligned(of_inputs, one, "input")}, {"": one}) < 1e-5
    assert relative_gap({"": aligned(of_outputs, one, "output")}, {"": one}) < 1e-5
    assert relative_gap({"": aligned(of_outputs, one, "input")}, {"": one}) > 0.1


@EACH_SIDE
def test_merge_and_its_alpha_are_those_of_the_dense_reference(side: Side) -> None:
    # Rank-deficient rotations are not unique, so all clients are of one rank here.
    adapters, weights = [random_adapter(seed) for seed in (1, 2, 4)], [0.5, 0.3, 0.2]
    method = ATAF(steps=6, side=side)
    prepared = method.prepare(adapters, weights, probe(ANCHORS))
    alpha, expected = reference(adapters, weights, 6, side)
    assert prepared.findings == {"reference": adapters[medoid(adapters)].name, "alpha": pytest.approx(alpha)}
    assert relative_gap(prepared.apply(), expected) < 1e-5
    assert method.settings == {"steps": 6, "side": side, "alpha": None}


def test_the_chosen_alpha_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sap_lightning.merging.ataf"):
        prepared = ATAF(steps=3).prepare(ADAPTERS, WEIGHTS, probe())
    assert f"alpha {prepared.findings['alpha']:g}" in caplog.text


def test_divergence_is_zero_of_equals_and_ln_2_of_strangers() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert_close(divergence(p, p), torch.zeros(2))
    assert_close(divergence(p[:1], p[:1].flip(1)), torch.tensor([math.log(2)]))


def test_alpha_moves_from_the_reference_to_the_aligned_others() -> None:
    mixture = Mixture.of(ADAPTERS, WEIGHTS)
    r = medoid(ADAPTERS)
    assert mixture.reference == r
    assert relative_gap(mixture.at(0.0), ADAPTERS[r].layers) < 1e-6
    total = sum(WEIGHTS) - WEIGHTS[r]
    for name, update in mixture.at(1.0).items():
        others = [
            weight / total * aligned(one.layers[name], ADAPTERS[r].layers[name]).delta()
            for k, (one, weight) in enumerate(zip(ADAPTERS, WEIGHTS, strict=True))
            if k != r
        ]
        assert relative_gap({name: update}, {name: torch.stack(others).sum(0)}) < 1e-5


def test_equal_clients_are_a_fixed_point() -> None:
    one = random_adapter(1)
    assert relative_gap(ATAF().merge([one, one, one], anchors=probe()), one.layers) < 1e-6


def test_the_order_of_clients_does_not_matter() -> None:
    forth = ATAF().merge(ADAPTERS, WEIGHTS, probe())
    back = ATAF().merge(ADAPTERS[::-1], WEIGHTS[::-1], probe())
    assert relative_gap(forth, back) < 1e-5


def test_zero_opposite_and_missing_layers_give_no_nan() -> None:
    one = random_adapter(1)
    for adapters in (
        [zero(one), zero(one)],
        [one, negative(one)],
        [one, zero(one)],
        [one, random_adapter(2, names=[Q, FC2])],
        [random_adapter(2, names=[Q, FC2]), one],
    ):
        merged = ATAF(steps=3).merge(adapters, anchors=probe())
        assert is_finite(merged)
        assert PROJECTION in merged


def test_a_client_alone_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 adapters"):
        ATAF().merge([random_adapter(1)], anchors=probe())


def test_bad_steps_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.steps"):
        ATAF(steps=1)


def test_anchors_are_required() -> None:
    with pytest.raises(InputError, match="ataf looks at anchors"):
        ATAF().merge(ADAPTERS)
