from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from adapters import adapter_of, assert_same, exact_delta
from references import randn
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.at_reach import AtReach
from sap_lightning.merging.average import Average
from sap_lightning.merging.core_space import CoreSpace
from sap_lightning.merging.lines import LiNeS, depths
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.task_arithmetic import TaskArithmetic
from sap_lightning.merging.ties import TIES

FIRST, SECOND, FOURTH, HEAD = (
    "vision_model.encoder.layers.0.self_attn.q_proj",
    "vision_model.encoder.layers.1.mlp.fc1",
    "vision_model.encoder.layers.3.self_attn.q_proj",
    "visual_projection",
)
DEPTHS = {FIRST: 0.0, SECOND: 1 / 3, FOURTH: 1.0, HEAD: 0.0}
SHAPES = {FIRST: (6, 6), SECOND: (9, 6), FOURTH: (6, 6), HEAD: (4, 6)}
WEIGHTS = [0.5, 0.3, 0.2]


def client(seed: int, rank: int = 2, scale: float = 1.0, without: str = "") -> Adapter:
    return adapter_of(
        {
            name: LoRALayer(randn(100 * seed + i, rank, d_in), randn(100 * seed + 50 + i, d_out, rank), scale)
            for i, (name, (d_out, d_in)) in enumerate(SHAPES.items())
            if name != without
        }
    )


def clients() -> list[Adapter]:
    """Of other ranks and scales, the last without a layer."""
    return [client(1), client(2, 3, 0.5), client(3, 1, 2.0, without=SECOND)]


def weighted(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    """Σ w_k·ΔW_k in float64."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, layer in adapter.layers.items():
            total[name] += weight * exact_delta(layer)
    return total


def length(update: Mapping[str, Tensor]) -> float:
    return sum(float(layer.abs().sum()) for layer in update.values())


def graded(update: Mapping[str, Tensor], alpha: float, beta: float) -> dict[str, Tensor]:
    return {name: (alpha + beta * DEPTHS[name]) * layer for name, layer in update.items()}


@pytest.mark.parametrize(("alpha", "beta"), [(0.25, 0.75), (1.0, 0.0), (0.0, 2.0)])
def test_a_layer_is_scaled_by_its_block_s_depth(alpha: float, beta: float) -> None:
    merged = LiNeS("average", alpha, beta).merge(clients(), WEIGHTS)
    assert_same(merged, graded(weighted(clients(), WEIGHTS), alpha, beta))


def test_the_first_block_has_the_length_of_the_average_whatever_the_method() -> None:
    average, ties = weighted(clients(), WEIGHTS), TIES(0.5).merge(clients(), WEIGHTS)
    exact = {name: dense(layer).double() for name, layer in ties.items()}
    merged = LiNeS(TIES(0.5), beta=0.4).merge(clients(), WEIGHTS)
    assert_same(merged, graded(exact, length(average) / length(exact), 0.4))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_of_the_sum_alpha_is_the_authors_one_over_k(beta: float) -> None:
    merged = LiNeS(TaskArithmetic(1.0), beta=beta).merge(clients())
    assert_same(merged, graded(weighted(clients(), [1.0] * 3), 1 / 3, beta))
    assert_same(LiNeS(beta=3 * beta).merge(clients()), merged), "of the average, α is 1 and β is K times theirs"


def test_the_default_goes_from_the_average_to_twice_as_much() -> None:
    assert_same(LiNeS().merge(clients(), WEIGHTS), graded(weighted(clients(), WEIGHTS), 1.0, 1.0))


def test_without_beta_it_is_the_method_itself_at_the_length_of_the_average() -> None:
    assert_same(LiNeS(beta=0).merge(clients(), WEIGHTS), Average().merge(clients(), WEIGHTS), 0)


def test_another_sparsity_is_that_of_the_method_under_it() -> None:
    prepared = LiNeS(Magnitude(0.5), alpha=0.5, beta=0.5).prepare(clients(), WEIGHTS)
    expected = {name: dense(layer) for name, layer in Magnitude(0.8).merge(clients(), WEIGHTS).items()}
    assert_same(prepared.apply(0.8), graded(expected, 0.5, 0.5))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["vision_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.11.mlp.fc1"], [0, 1]),
        (["encoder.layer.1.attention.self.query", "encoder.layer.4.output.dense", "pooler.dense"], [0.25, 1, 0]),
        (["h.0.attn.c_attn", "h.2.attn.c_attn", "h.10.mlp.c_fc"], [0, 0.2, 1]),
        (["encoder.block.2.layer.1.wi", "encoder.block.4.layer.0.q"], [0.5, 1]),
        (["vision_model.layers.5.q", "vision_model.layers.20.q", "text_model.layers.5.q"], [0.25, 1, 1]),
        (["fc1", "head"], [0, 0]),
        (["layers.0.q"], [0]),
        ([], []),
    ],
)
def test_a_layer_s_block_is_the_first_number_in_its_name(names: list[str], expected: list[float]) -> None:
    assert depths(names) == dict(zip(names, map(pytest.approx, expected), strict=True))


def test_one_client_and_clients_of_equal_and_no_updates() -> None:
    one = client(1)
    assert_same(LiNeS().merge([one]), graded(weighted([one], [1.0]), 1.0, 1.0))
    assert_same(LiNeS("ties").merge([one, one]), LiNeS("ties").merge([one]))
    nothing = adapter_of({name: layer._replace(B=0 * layer.B) for name, layer in one.layers.items()})
    for method in ("average", "ties"):
        assert not any(dense(layer).any() for layer in LiNeS(method).merge([nothing]).values())


def test_of_opposite_clients_the_average_and_so_the_first_block_is_nothing() -> None:
    one = client(1)
    other = adapter_of({name: layer._replace(scale=-layer.scale) for name, layer in one.layers.items()})
    merged = LiNeS(TIES(0)).merge([one, other])
    assert dense(merged[FIRST]).norm() < 1e-6 * dense(merged[FOURTH]).norm()


def test_the_order_of_clients_does_not_matter() -> None:
    shuffled = LiNeS("ties").merge(clients()[::-1], WEIGHTS[::-1])
    assert_same(shuffled, LiNeS("ties").merge(clients(), WEIGHTS))


@pytest.mark.parametrize("setting", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_negative_factor_is_refused(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.{setting} must be at least 0"):
        LiNeS(**{setting: value})


@pytest.mark.parametrize("made", [LiNeS, CoreSpace, AtReach])
def test_a_method_on_top_of_none_is_refused(made) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.method is null; name the method under {made.name}"):
        made(method=None)
