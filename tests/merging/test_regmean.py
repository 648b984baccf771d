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
from sap_lightning.merging.regmean import RegMean, Solver, shrunk

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


def gram_of(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Of inputs of very different sizes, one of which is always 0."""
    X = torch.randn(tokens, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    X *= 10 ** torch.linspace(-2, 2, inputs).double()
    X[:, inputs // 2] = 0
    return X.T @ X / tokens


def by_eigenvalues(right: Tensor, gram: Tensor, smallest: float) -> Tensor:
    """Z of least ‖Z·D‖ with Z·C = R, by all eigenvectors of C with its diagonal brought to 1, in float64."""
    sizes = gram.diag().sqrt().where(gram.diag() > 0, 1)
    eigenvalues, vectors = torch.linalg.eigh(gram / sizes.outer(sizes))
    there = eigenvalues > smallest
    inverse = vectors[:, there] / eigenvalues[there] @ vectors[:, there].T
    return right / sizes @ inverse / sizes


def test_a_regular_gram_matrix_is_solved_exactly() -> None:
    gram, right = gram_of(400, 30), torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).double()
    right[:, 15] = 0
    solver = Solver(gram)
    assert solver.is_regular
    seen = torch.arange(30) != 15
    expected = right[:, seen] @ torch.linalg.inv(gram[seen][:, seen])
    assert_close(solver.solve(right)[:, seen], expected, rtol=1e-9, atol=1e-12)
    assert not solver.solve(right)[:, 15].any()


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-2)])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_of_a_singular_gram_matrix_it_is_the_pseudo_inverse(tokens, precision, tolerance) -> None:
    gram = gram_of(tokens, 60).to(precision).double()
    solution = torch.randn(5, 60, generator=torch.Generator().manual_seed(1)).double()
    solver, right = Solver(gram), solution @ gram
    assert not solver.is_regular
    sizes = gram.diag().sqrt()
    gap = (solver.solve(right) - by_eigenvalues(right, gram, smallest=1e-3)) * sizes
    assert gap.norm() < tolerance * (solution * sizes).norm()
    assert_close(solver.solve(right) @ gram, right, rtol=0, atol=1e-6 * float(right.abs().max()))


def test_what_is_of_no_precision_at_all_is_still_finite() -> None:
    for gram in (torch.zeros(4, 4).double(), gram_of(3, 8).bfloat16().double()):
        assert Solver(gram).solve(torch.ones(2, len(gram)).double()).isfinite().all()
    with pytest.raises(InputError, match="a layer's inputs are not finite on the anchors"):
        Solver(torch.full((4, 4), torch.nan).double())


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
def test_a_shrunk_gram_matrix_is_regular_with_fewer_tokens_than_inputs(off_diagonal: float) -> None:
    gram = shrunk(gram_of(6, 20), off_diagonal)
    right = torch.randn(3, 20, generator=torch.Generator().manual_seed(3)).double() @ gram
    solver = Solver(gram)
    assert solver.is_regular
    expected, sizes = by_eigenvalues(right, gram, smallest=1e-9), gram.diag().sqrt()
    assert ((solver.solve(right) - expected) * sizes).norm() < 1e-9 * (expected * sizes).norm()


def test_the_layers_of_one_client_or_of_more_than_a_layer_is_high_are_solved_alike() -> None:
    adapters = [random_adapter(seed, rank=3) for seed in range(14)]  # 42 columns, where a layer has 32 rows
    for some in (adapters[:1] * 2 + adapters[1:2], adapters):
        weights = [1 / len(some)] * len(some)
        assert relative_gap(RegMean().merge(some, weights, probe(MANY)), reference(some, weights, 0.9)) < 1e-5
