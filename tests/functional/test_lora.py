from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import (
    LoRALayer,
    dense,
    inner,
    largest_triplets,
    left_singular_vectors,
    recompress,
    scaled,
    singular_triplets,
    stack,
    times,
)

SHAPES = pytest.mark.parametrize(
    ("rank", "d_in", "d_out"), [(4, 7, 9), (4, 9, 7), (1, 7, 9), (9, 6, 8), (9, 8, 6), (20, 6, 8)]
)


def random_layer(rank: int = 4, d_in: int = 7, d_out: int = 9, scale: float = 0.5, seed: int = 0) -> LoRALayer:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return LoRALayer(A, B, scale)


def rank_one_update() -> LoRALayer:
    """Four ranks that are all multiples of the first."""
    A, B, scale = random_layer()
    multiples = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    return LoRALayer(multiples[:, None] * A[0], B[:, :1] * multiples, scale)


def zero_update() -> LoRALayer:
    """What a client that never trained sends: B is zero."""
    A, B, scale = random_layer()
    return LoRALayer(A, torch.zeros_like(B), scale)


def repeated_ranks() -> LoRALayer:
    A, B, scale = random_layer()
    return LoRALayer(torch.cat([A, A]), torch.cat([B, B], dim=1), scale)


DEGENERATE = pytest.mark.parametrize("make", [zero_update, rank_one_update, repeated_ranks])


def tail_norm(delta: Tensor, rank: int) -> Tensor:
    """The least Frobenius error that any matrix of this rank can have (Eckart–Young)."""
    return torch.linalg.svdvals(delta)[rank:].square().sum().sqrt()


def test_delta_is_the_scaled_sum_of_the_ranks_outer_products() -> None:
    layer = random_layer(scale=-0.25)
    expected = sum(-0.25 * torch.outer(layer.B[:, j], layer.A[j]) for j in range(layer.rank))
    assert_close(layer.delta(), expected)


def test_rank_is_the_number_of_rows_of_A() -> None:
    assert random_layer(rank=3).rank == 3


def test_moving_a_layer_moves_both_factors_and_keeps_its_scale() -> None:
    moved = random_layer(scale=0.3).to("meta")
    assert moved.A.is_meta and moved.B.is_meta and moved.scale == 0.3


def test_a_layer_s_shape_is_that_of_its_update() -> None:
    assert random_layer(rank=3, d_in=7, d_out=9).shape == random_layer(rank=3, d_in=7, d_out=9).delta().shape == (9, 7)


def test_dense_is_the_update_in_either_form() -> None:
    layer = random_layer()
    delta = layer.delta()
    assert dense(delta) is delta
    assert_close(dense(layer), delta, atol=0, rtol=0)


@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
def test_scaling_keeps_the_form_and_the_original(factor: float) -> None:
    for update, untouched in ((random_layer(), random_layer()), (random_layer().delta(), random_layer().delta())):
        result = scaled(update, factor)
        assert type(result) is type(update)
        assert_close(dense(result), factor * dense(untouched))
        assert_close(dense(update), dense(untouched), atol=0, rtol=0)


def test_times_scales_every_layer_in_its_own_form() -> None:
    updates = {"q": random_layer(), "v": random_layer(seed=1).delta()}
    result = times(updates, -2.0)
    assert list(result) == ["q", "v"]
    for name, update in updates.items():
        assert type(result[name]) is type(update)
        assert_close(dense(result[name]), -2 * dense(update))


def test_inner_is_the_sum_over_the_products_of_all_elements_of_the_dense_updates() -> None:
    one, other = random_layer(4, scale=-0.3, seed=1), random_layer(2, scale=2.0, seed=2)
    expected = float((one.delta() * other.delta()).sum())
    assert inner(one, other) == pytest.approx(expected, rel=1e-12)
    assert inner(other, one) == pytest.approx(expected, rel=1e-12)
    assert inner(one, one) == pytest.approx(float(one.delta().square().sum()), rel=1e-12)


def test_inner_of_float32_factors_is_summed_in_float64() -> None:
    one, other = (random_layer(8, 64, 48, seed=seed) for seed in (1, 2))
    singles = [layer._replace(A=layer.A.float(), B=layer.B.float()) for layer in (one, other)]
    doubles = [layer._replace(A=layer.A.double(), B=layer.B.double()) for layer in singles]
    expected = float((doubles[0].delta() * doubles[1].delta()).sum())
    assert inner(*singles) == pytest.approx(expected, rel=1e-12)


def test_inner_with_an_update_of_rank_zero_is_zero() -> None:
    nothing = LoRALayer(torch.zeros(0, 7), torch.zeros(9, 0))
    assert inner(nothing, random_layer()) == inner(nothing, nothing) == 0


def test_stack_is_the_weighted_sum_of_the_dense_updates() -> None:
    layers = [random_layer(rank, scale=scale, seed=rank) for rank, scale in [(1, 2.0), (4, 0.5), (6, -1.0)]]
    weights = [0.2, 0.5, 0.3]
    stacked = stack(layers, weights)
    assert stacked.rank == 11
    assert_close(stacked.delta(), sum(w * layer.delta() for layer, w in zip(layers, weights, strict=True)))


def test_stack_refuses_another_number_of_weights_than_layers() -> None:
    with pytest.raises(ValueError, match="shorter"):
        stack([random_layer(), random_layer()], [1.0])


@SHAPES
@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_singular_triplets_are_those_of_the_dense_update(rank: int, d_in: int, d_out: int, scale: float) -> None:
    layer = random_layer(rank, d_in, d_out, scale)
    U, sigma, V = singular_triplets(layer)
    size = min(rank, d_in, d_out)
    assert (U.shape, sigma.shape, V.shape) == ((d_out, size), (size,), (size, d_in))
    assert_close(sigma, torch.linalg.svdvals(layer.delta())[:size])
    assert_close(U * sigma @ V, layer.delta())
    assert_close(U.T @ U, torch.eye(size, dtype=torch.float64))
    assert_close(V @ V.T, torch.eye(size, dtype=torch.float64))


@DEGENERATE
def test_singular_triplets_of_a_degenerate_update_still_rebuild_it(make: Callable[[], LoRALayer]) -> None:
    layer = make()
    U, sigma, V = singular_triplets(layer)
    assert_close(U * sigma @ V, layer.delta())
    assert_close(U.T @ U, torch.eye(len(sigma), dtype=torch.float64))
    assert (sigma >= 0).all() and (sigma.diff() <= 0).all()


@SHAPES
def test_recompress_has_the_least_error_of_its_rank(rank: int, d_in: int, d_out: int) -> None:
    layer = random_layer(rank, d_in, d_out)
    for smaller in range(1, rank):
        error = torch.linalg.matrix_norm(layer.delta() - recompress(layer, smaller).delta())
        assert_close(error, tail_norm(layer.delta(), smaller), atol=1e-12, rtol=1e-7)


def pruned_update(d_out: int = 200, d_in: int = 320) -> Tensor:
    """A third of a LoRA's elements, at random: few large σ over a bulk that lies close together."""
    delta = random_layer(16, d_in, d_out).delta()
    return delta * (torch.rand(delta.shape, generator=torch.Generator().manual_seed(1)) < 1 / 3)


def slowly_decaying() -> Tensor:
    Q, _ = torch.linalg.qr(randn64(2, 300, 240))
    P, _ = torch.linalg.qr(randn64(3, 240, 240))
    return (Q * torch.arange(1, 241, dtype=torch.float64) ** -0.2) @ P


@pytest.mark.parametrize("count", [1, 8, 16])
@pytest.mark.parametrize(
    "make",
    [
        pruned_update,
        lambda: pruned_update(320, 200),
        slowly_decaying,
        lambda: torch.eye(200, dtype=torch.float64),
        lambda: random_layer(3, 250, 200).delta(),
        lambda: torch.zeros(200, 250, dtype=torch.float64),
    ],
    ids=["pruned", "pruned tall", "slowly decaying", "all alike", "of rank 3", "zero"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_triplets_leave_the_error_of_an_svd(make: Callable[[], Tensor], count: int, dtype: torch.dtype):
    delta = make()
    U, sigma, V = (part.double() for part in largest_triplets(delta.to(dtype), count))
    identity, loose = torch.eye(count, dtype=torch.float64), 1e-9 if dtype == torch.float64 else 2e-5
    assert_close(U.T @ U, identity, atol=loose, rtol=0)
    assert_close(V @ V.T, identity, atol=loose, rtol=0)
    assert (sigma.diff() <= 0).all()
    error = torch.linalg.matrix_norm(delta - (U * sigma) @ V)
    assert error <= tail_norm(delta, count) * (1 + 1e-5) + 1e-6 * torch.linalg.matrix_norm(delta)


def test_few_triplets_of_a_large_update_take_no_svd_of_it(monkeypatch) -> None:
    taken, svd = [], torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda matrix, **options: taken.append(matrix.shape) or svd(matrix, **options)
    )
    largest_triplets(pruned_update(400, 600), 4)
    assert [d_out for d_out, d_in in taken if d_in > 200] == []
    largest_triplets(pruned_update(400, 600), 300)
    assert taken[-1] == (600, 400)


def test_recompress_never_exceeds_the_rank_asked_for() -> None:
    assert recompress(random_layer(rank=6), 2).rank == 2
    assert recompress(random_layer(rank=2), 6).rank == 2


def test_recompress_shares_the_singular_values_between_A_and_B() -> None:
    layer = random_layer()
    A, B, scale = recompress(layer, 3)
    sigma = torch.linalg.svdvals(layer.delta())[:3].diag()
    assert_close(A @ A.T, sigma)
    assert_close(B.T @ B, sigma)
    assert scale == 1


@DEGENERATE
@pytest.mark.parametrize("rank", [1, 4])
def test_recompress_of_a_degenerate_update_has_no_nan(make: Callable[[], LoRALayer], rank: int) -> None:
    layer = make()
    small = recompress(layer, rank)
    assert small.A.isfinite().all() and small.B.isfinite().all()
    error = torch.linalg.matrix_norm(layer.delta() - small.delta())
    assert_close(error, tail_norm(layer.delta(), rank), atol=1e-12, rtol=1e-7)


def test_recompress_in_float32_is_exact_to_float32() -> None:
    layer = stack([random_layer(8, 64, 48, seed=seed) for seed in range(3)], [1 / 3] * 3)
    single = recompress(LoRALayer(layer.A.float(), layer.B.float()), 24)
    assert torch.linalg.matrix_norm(single.delta() - layer.delta()) < 2e-6 * torch.linalg.matrix_norm(layer.delta())


@pytest.mark.parametrize("rank", [1, 3, 7, 20])
def test_compress_dense_has_the_least_error_of_its_rank(rank: int) -> None:
    delta = random_layer(rank=7).delta() + random_layer(rank=7, seed=1).delta()
    small = recompress(delta, rank)
    assert small.rank == min(rank, 7)
    error = torch.linalg.matrix_norm(delta - small.delta())
    assert_close(error, tail_norm(delta, rank), atol=1e-12, rtol=1e-7)


def test_compress_dense_of_nothing_is_nothing() -> None:
    assert not recompress(torch.zeros(5, 4), 2).delta().any()


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_left_singular_vectors_are_those_of_all_blocks_side_by_side(blocks: int) -> None:
    parts = [randn64(seed, 8, 1 + seed % 4) for seed in range(blocks)]
    U, sigma = left_singular_vectors(parts)
    expected, values, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    assert_close(sigma, values)
    assert_close((U.T @ expected).abs(), torch.eye(len(values)).double(), atol=1e-9, rtol=0)


def test_of_no_blocks_there_are_no_singular_vectors() -> None:
    with pytest.raises(ValueError, match="no block"):
        left_singular_vectors([])
