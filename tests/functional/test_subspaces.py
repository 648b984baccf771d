from __future__ import annotations

import pytest
import torch
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.subspaces import (
    Triplets,
    joint_space,
    leading_triplets,
    orthogonalised,
    outside,
    polar_factor,
    summands,
)

D_OUT, D_IN = 9, 7


def random_layer(seed: int = 0, rank: int = 3, scale: float = 0.5) -> LoRALayer:
    return LoRALayer(randn64(seed, rank, D_IN), randn64(seed + 50, D_OUT, rank), scale)


def missing() -> LoRALayer:
    return LoRALayer(torch.zeros(0, D_IN), torch.zeros(D_OUT, 0))


def inverse_root(gram: Tensor) -> Tensor:
    """Of a positive definite matrix, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors / values.sqrt() @ vectors.T


def test_summands_add_up_to_k_times_the_weighted_mean_in_float64() -> None:
    layers, weights = [random_layer(seed, rank=seed + 1) for seed in range(3)], [0.5, 0.3, 0.2]
    single = [layer._replace(A=layer.A.float(), B=layer.B.float()) for layer in layers]
    terms = summands(single, weights)
    assert {term.A.dtype for term in terms} == {term.B.dtype for term in terms} == {torch.float64}
    expected = 3 * sum(w * x.scale * x.B.double() @ x.A.double() for w, x in zip(weights, single, strict=True))
    assert_close(sum(term.delta() for term in terms), expected)


@pytest.mark.parametrize("rank", [None, 1, 2, 5])
def test_leading_triplets_are_the_first_of_the_dense_svd(rank: int | None) -> None:
    layer = random_layer()
    U, sigma, V = leading_triplets(layer, rank)
    expected = torch.linalg.svdvals(layer.delta())[: min(3, rank or 3)]
    assert_close(sigma, expected)
    assert_close(U.T @ layer.delta() @ V.T, sigma.diag())


def test_triplets_that_are_rounding_errors_are_left_out() -> None:
    U, V = (torch.linalg.qr(randn64(seed, size, 4)).Q for seed, size in ((6, D_OUT), (7, D_IN)))
    sigma = torch.tensor([1.0, 0.1, 1e-4, 1e-8], dtype=torch.float64)
    assert_close(leading_triplets(LoRALayer(V.T, U * sigma)).sigma, sigma[:3])


def test_what_cancels_out_is_measured_by_what_it_was_made_from() -> None:
    layer = random_layer(rank=2)
    cancelled = LoRALayer(torch.cat([layer.A, layer.A]), torch.cat([layer.B, -(1 + 1e-9) * layer.B], dim=1))
    assert len(leading_triplets(cancelled, size=1.0).sigma) == 0


@pytest.mark.parametrize("layer", [missing(), random_layer(scale=0.0)], ids=["rank 0", "zero"])
def test_no_update_has_no_triplets(layer: LoRALayer) -> None:
    U, sigma, V = leading_triplets(layer)
    assert (U.shape, sigma.shape, V.shape) == ((D_OUT, 0), (0,), (0, D_IN))


def test_triplets_become_a_layer_and_none_become_one_of_rank_1_that_is_zero() -> None:
    layer = random_layer()
    same = leading_triplets(layer).layer()
    assert same.A.dtype == same.B.dtype == torch.float32
    assert_close(same.delta().double(), layer.delta(), atol=1e-6, rtol=1e-6)
    nothing = leading_triplets(missing()).layer()
    assert (nothing.rank, nothing.shape) == (1, (D_OUT, D_IN)) and not nothing.delta().any()


def test_outside_a_space_nothing_of_it_is_left() -> None:
    U = torch.linalg.qr(randn64(3, D_OUT, 2)).Q
    rest = outside(U, random_layer()).delta()
    assert_close(U.T @ rest, torch.zeros(2, D_IN, dtype=torch.float64))
    assert_close(rest, (torch.eye(D_OUT, dtype=torch.float64) - U @ U.T) @ random_layer().delta())


def test_the_polar_factor_is_the_matrix_whitened() -> None:
    X = randn64(4, D_OUT, 5)
    assert_close(polar_factor(X), X @ inverse_root(X.T @ X))
    assert_close(polar_factor(X.T), inverse_root(X.T @ X) @ X.T)


def test_columns_that_depend_on_each_other_share_their_direction() -> None:
    X = torch.linalg.qr(randn64(5, D_OUT, 2)).Q
    for copies in ([X, X, X], [X, X + 1e-9, X - 1e-9]):
        assert_close(polar_factor(torch.cat(copies, dim=1)), torch.cat([X, X, X], dim=1) / 3**0.5, atol=1e-8, rtol=0)
    assert polar_factor(torch.zeros(D_OUT, 0)).shape == (D_OUT, 0)


def test_orthogonalised_triplets_keep_their_order_and_their_sigma() -> None:
    parts = [leading_triplets(random_layer(seed, rank=2)) for seed in range(3)]
    U, sigma, V = orthogonalised(parts)
    assert_close(U.T @ U, torch.eye(6, dtype=torch.float64))
    assert_close(V @ V.T, torch.eye(6, dtype=torch.float64))
    assert_close(sigma, torch.cat([part.sigma for part in parts]))
    stacked = torch.cat([part.U for part in parts], dim=1)
    assert_close(U, stacked @ inverse_root(stacked.T @ stacked))
    moved = orthogonalised(parts[::-1])
    assert_close(moved.layer().delta(), Triplets(U, sigma, V).layer().delta())


@pytest.mark.parametrize("ranks", [(2, 1, 3), (5, 4, 3)], ids=["roomy", "full"])
def test_the_joint_space_holds_every_update(ranks: tuple[int, ...]) -> None:
    layers = [random_layer(seed, rank, scale=1 + seed) for seed, rank in enumerate(ranks)] + [missing()]
    U, cores, V = joint_space(layers)
    assert U.shape[1] == min(sum(ranks), D_OUT) and V.shape[0] == min(sum(ranks), D_IN)
    assert_close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64))
    assert_close(V @ V.T, torch.eye(V.shape[0], dtype=torch.float64))
    for layer, core in zip(layers, cores, strict=True):
        assert_close(U @ core @ V, layer.delta().double())
