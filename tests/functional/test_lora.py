from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import DEGENERATE, SHAPES, random_layer
from references import randn64
from torch.testing import assert_close

from sap_lightning.functional.lora import (
    LoRALayer,
    dense,
    inner,
    left_singular_vectors,
    scaled,
    singular_triplets,
    stack,
    times,
)


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
