from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from probes import (
    FC2,
    PROJECTION,
    Q,
    deltas,
    is_finite,
    layer_inputs,
    negative,
    probe,
    random_adapter,
    relative_gap,
    zero,
)
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.regmean import RegMean, inverse, shrunk

MANY = 40
"""Anchors whose tokens (5 each, 1 for the projection) are more than any layer has inputs."""


def grams(adapters: Sequence[Adapter], name: str, off_diagonal: float, anchors: int = MANY) -> list[Tensor]:
    found = []
    for one in adapters:
        X = layer_inputs(one.layers, name, anchors)
        G = X.T @ X / len(X)
        found.append(torch.where(torch.eye(len(G)).bool(), G, off_diagonal * G))
    return found


def reference(adapters: Sequence[Adapter], weights: Sequence[float], off_diagonal: float) -> dict[str, Tensor]:
    merged = {}
    for name in sorted({name for one in adapters for name in one.layers}):
        G = grams(adapters, name, off_diagonal)
        C = sum(w * g for w, g in zip(weights, G, strict=True))
        N = sum(w * g @ delta.T for w, g, delta in zip(weights, G, deltas(adapters, name), strict=True))
        merged[name] = torch.linalg.solve(C, N).T
    return merged


# Unshrunk, the Gram matrix of fc2's inputs has condition 8e5, and the probe's are float32.
@pytest.mark.parametrize(("off_diagonal", "tolerance"), [(0.0, 1e-6), (0.9, 1e-5), (1.0, 1e-3)])
def test_merge_is_the_papers_closed_form(off_diagonal: float, tolerance: float) -> None:
    adapters = [random_adapter(1), random_adapter(2), random_adapter(3, rank=2)]
    weights = [0.5, 0.2, 0.3]
    merged = RegMean(off_diagonal).merge(adapters, weights, probe(MANY))
    assert relative_gap(merged, reference(adapters, weights, off_diagonal)) < tolerance


def test_a_client_without_a_layer_counts_there_with_no_update() -> None:
    adapters = [random_adapter(1), random_adapter(2, names=[Q, FC2])]
    merged = RegMean().merge(adapters, [0.5, 0.5], probe(MANY))
    assert relative_gap(merged, reference(adapters, [0.5, 0.5], 0.9)) < 1e-5
    assert PROJECTION in merged


@pytest.mark.parametrize("anchors", [1, 8, MANY])
@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_a_client_alone_and_equal_clients_are_fixed_points_with_any_number_of_anchors(
    anchors: int, off_diagonal: float
) -> None:
    one = random_adapter(1)
    for adapters in ([one], [one, one, one]):
        merged = RegMean(off_diagonal).merge(adapters, anchors=probe(anchors))
        assert relative_gap(merged, one.layers) < 1e-6


def test_with_few_anchors_outputs_are_regressed_and_the_rest_is_averaged() -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    merged = RegMean(off_diagonal=1).merge(adapters, anchors=probe(2))[FC2].double()
    G = grams(adapters, FC2, 1, anchors=2)
    C = G[0] / 2 + G[1] / 2
    N = deltas(adapters, FC2)[0] @ G[0] / 2 + deltas(adapters, FC2)[1] @ G[1] / 2
    assert torch.linalg.matrix_rank(C) < len(C)
    assert torch.linalg.vector_norm(merged @ C - N) < 1e-5 * torch.linalg.vector_norm(N)
    average = (deltas(adapters, FC2)[0] + deltas(adapters, FC2)[1]) / 2
    sizes = C.diag().sqrt()
    eigenvalues, vectors = torch.linalg.eigh(C / sizes.outer(sizes))
    unseen = vectors[:, eigenvalues < 1e-9]
    # With inputs brought to one size, the minimiser nearest to the average keeps it on the null space.
    moved = torch.linalg.vector_norm((merged - average) * sizes @ unseen)
    assert moved < 1e-2 * torch.linalg.vector_norm(average * sizes @ unseen)


def test_inverse_is_exact_where_the_gram_matrix_is_regular_and_zero_where_it_is_zero() -> None:
    X = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X *= torch.tensor([1e-3, 1, 1, 1, 1e3, 0])
    G = X.T @ X
    inverted = inverse(G)
    assert_close(inverted[:5, :5] @ G[:5, :5], torch.eye(5).double())
    assert not inverted[5].any()


def test_the_order_of_clients_does_not_matter() -> None:
    adapters = [random_adapter(seed) for seed in (1, 2, 3)]
    forth = RegMean().merge(adapters, [0.2, 0.3, 0.5], probe())
    back = RegMean().merge(adapters[::-1], [0.5, 0.3, 0.2], probe())
    assert relative_gap(forth, back) < 1e-6


def test_zero_and_opposite_adapters_give_no_nan() -> None:
    one = random_adapter(1)
    for adapters in ([zero(one), zero(one)], [one, negative(one)], [one, zero(one)]):
        assert is_finite(RegMean().merge(adapters, anchors=probe()))


@pytest.mark.parametrize("off_diagonal", [-0.1, 1.1])
def test_a_bad_off_diagonal_is_refused_by_name(off_diagonal: float) -> None:
    with pytest.raises(InputError, match=r"merge\.method\.off_diagonal"):
        RegMean(off_diagonal)


def test_anchors_are_required() -> None:
    with pytest.raises(InputError, match="regmean looks at anchors"):
        RegMean().merge([random_adapter(1)])


@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.9, 0.999])
def test_a_shrunk_gram_matrix_has_the_same_inverse_without_eigenvalues(off_diagonal: float) -> None:
    X = torch.randn(6, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # fewer tokens than inputs
    X[:, 4] *= 300
    X[:, 7] = 0
    shrunk_gram = shrunk(X.T @ X, off_diagonal)
    assert_close(inverse(shrunk_gram, off_diagonal), inverse(shrunk_gram), rtol=1e-9, atol=1e-12)
