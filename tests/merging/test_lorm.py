from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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
from references import randn
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.lorm import LoRM, alternate
from sap_lightning.merging.regmean import RegMean

MANY = 40
ADAPTERS = [random_adapter(1), random_adapter(2), random_adapter(3, rank=2)]
WEIGHTS = [0.5, 0.2, 0.3]


def objective(merged: Tensor, adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> float:
    """Σ w_k·‖(ΔW − ΔW_k)·X_kᵀ‖² / tokens in float64."""
    total = 0.0
    for one, delta, weight in zip(adapters, deltas(adapters, name), weights, strict=True):
        X = layer_inputs(one.layers, name, MANY)
        total += weight * float(((merged.double() - delta) @ X.T).square().sum()) / len(X)
    return total


def best(product: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The minimiser of tr((ΔW − N·C⁻¹)·C·(ΔW − N·C⁻¹)ᵀ) of a rank, by an SVD of N·C⁻¹ whitened with C^½."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    half = vectors * eigenvalues.sqrt() @ vectors.T
    U, sigma, V = torch.linalg.svd(product @ torch.linalg.inv(half), full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ V[:rank] @ torch.linalg.inv(half)


def summed(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> tuple[Tensor, Tensor]:
    """Σ w_k·ΔW_k·G_k and Σ w_k·G_k in float64."""
    X = [layer_inputs(one.layers, name, MANY) for one in adapters]
    G = [w * x.T @ x / len(x) for w, x in zip(weights, X, strict=True)]
    return torch.stack([d @ g for d, g in zip(deltas(adapters, name), G, strict=True)]).sum(0), torch.stack(G).sum(0)


def delta_of(layer: object) -> Tensor:
    assert isinstance(layer, LoRALayer)
    return layer.delta()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_alternating_reaches_the_best_update_of_its_rank(rank: int) -> None:
    X, start = randn(1, 60, 8).double(), LoRALayer(randn(2, rank, 8), randn(3, 6, rank))
    gram = X.T @ X / 60
    # Singular values that halve one after another: power iteration gains a factor of four with every sweep.
    U, _, V = torch.linalg.svd(randn(4, 6, 8).double(), full_matrices=False)
    product = U * 0.5 ** torch.arange(6) @ V @ gram
    merged = alternate(start, product, gram, sweeps=30)
    assert_close(merged.delta().double(), best(product, gram, rank), rtol=0, atol=1e-6)


def by_pseudo_inverses(start: LoRALayer, product: Tensor, gram: Tensor, sweeps: int) -> Tensor:
    """The paper's two closed forms in turn, each step going on from the one before, C⁺ by eigenvalues."""
    A, B = start.A.double(), start.B.double()
    sizes = gram.diag().sqrt()
    C = torch.linalg.pinv(gram / sizes.outer(sizes), rtol=1e-6, hermitian=True) / sizes.outer(sizes)
    for _ in range(sweeps):
        B = B + (product - B @ A @ gram) @ A.T @ torch.linalg.pinv(A @ gram @ A.T, hermitian=True)
        A = A + torch.linalg.pinv(B) @ (product - B @ A @ gram) @ C
    return B @ A


@pytest.mark.parametrize("sweeps", [1, 10])
@pytest.mark.parametrize("tokens", [4, 20, 60])
def test_without_eigenvalues_it_is_what_pseudo_inverses_give(tokens: int, sweeps: int) -> None:
    X = randn(1, tokens, 30).double() * 10 ** torch.linspace(-1, 1, 30)
    gram, start = X.T @ X / tokens, LoRALayer(randn(2, 3, 30), randn(3, 12, 3))
    product = (randn(4, 12, 3) @ randn(5, 3, 30)).double() @ gram
    merged = alternate(start, product, gram, sweeps).delta().double()
    expected = by_pseudo_inverses(start, product, gram, sweeps)
    assert (torch.linalg.matrix_rank(gram) == 30) == (tokens == 60)
    assert (merged - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3])
def test_merge_comes_near_the_best_objective_of_its_rank_on_a_real_tower(rank: int) -> None:
    merged = LoRM(rank).merge(ADAPTERS, WEIGHTS, probe(MANY))
    for name, layer in merged.items():
        optimum = objective(best(*summed(ADAPTERS, WEIGHTS, name), rank), ADAPTERS, WEIGHTS, name)
        assert optimum * (1 - 1e-6) <= objective(delta_of(layer), ADAPTERS, WEIGHTS, name) <= 1.02 * optimum


def test_every_sweep_lowers_the_objective_or_leaves_it() -> None:
    anchors = probe(MANY)
    for name in (Q, FC2, PROJECTION):
        values = [
            objective(delta_of(LoRM(2, sweeps).merge(ADAPTERS, WEIGHTS, anchors)[name]), ADAPTERS, WEIGHTS, name)
            for sweeps in (1, 2, 4, 8, 16)
        ]
        assert all(later <= sooner * (1 + 1e-6) for sooner, later in pairwise(values)), values


@pytest.mark.parametrize(("off_diagonal", "tolerance"), [(0.9, 1e-6), (1.0, 1e-5)])
def test_full_rank_is_regmean(off_diagonal: float, tolerance: float) -> None:
    anchors = probe(MANY)
    merged = LoRM(rank=32, off_diagonal=off_diagonal).merge(ADAPTERS, WEIGHTS, anchors)
    assert relative_gap(merged, RegMean(off_diagonal).merge(ADAPTERS, WEIGHTS, anchors)) < tolerance


@pytest.mark.parametrize("anchors", [1, MANY])
def test_a_client_alone_and_equal_clients_are_fixed_points_with_any_number_of_anchors(anchors: int) -> None:
    one = random_adapter(1)
    for adapters in ([one], [one, one, one]):
        assert relative_gap(LoRM().merge(adapters, anchors=probe(anchors)), one.layers) < 1e-5


def test_rank_is_the_largest_clients_unless_given() -> None:
    for method, rank in ((LoRM(), 3), (LoRM(rank=1), 1)):
        merged = method.merge(ADAPTERS, WEIGHTS, probe())
        assert all(isinstance(layer, LoRALayer) and layer.rank == rank for layer in merged.values())


def test_the_order_of_clients_does_not_matter() -> None:
    forth = LoRM().merge(ADAPTERS, WEIGHTS, probe(MANY))
    back = LoRM().merge(ADAPTERS[::-1], WEIGHTS[::-1], probe(MANY))
    assert relative_gap(forth, back) < 1e-4


def test_opposite_updates_are_merged_by_their_outputs_though_their_average_is_zero() -> None:
    one = random_adapter(1)
    pair = [one, negative(one)]
    merged = LoRM().merge(pair, anchors=probe(MANY))
    for name in (FC2, PROJECTION):
        nothing = objective(torch.zeros(one.layers[name].shape), pair, [0.5, 0.5], name)
        assert objective(delta_of(merged[name]), pair, [0.5, 0.5], name) < 0.999 * nothing


def test_zero_opposite_and_missing_layers_give_no_nan() -> None:
    one, other = random_adapter(1), random_adapter(2, names=[Q])
    for adapters in ([zero(one), zero(one)], [one, negative(one)], [one, zero(one)], [one, other]):
        for anchors in (1, 8):
            assert is_finite(LoRM().merge(adapters, anchors=probe(anchors)))


@pytest.mark.parametrize(
    ("argument", "value"), [("rank", 0), ("sweeps", 0), ("off_diagonal", 1.5), ("off_diagonal", -0.5)]
)
def test_bad_arguments_are_refused_by_name(argument: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{argument}"):
        LoRM(**{argument: value})


def test_anchors_are_required() -> None:
    with pytest.raises(InputError, match="lorm looks at anchors"):
        LoRM().merge(ADAPTERS)
