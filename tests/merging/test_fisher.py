from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from probes import (
    FC2,
    PROJECTION,
    Q,
    anchor_gradients,
    deltas,
    is_finite,
    negative,
    probe,
    random_adapter,
    relative_gap,
    zero,
)
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.fisher import Fisher, normalised


def reference(adapters: Sequence[Adapter], weights: Sequence[float], floor: float) -> dict[str, Tensor]:
    names = sorted({name for one in adapters for name in one.layers})
    above, below = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for one, weight in zip(adapters, weights, strict=True):
        gradients = anchor_gradients(one.layers, names)
        F = {name: torch.stack([g[name] ** 2 for g in gradients]).mean(0) for name in names}
        everything = torch.cat([F[name].flatten() for name in names])
        for name in names:
            information = weight * F[name].clamp(min=floor * float(everything.max())) / everything.norm()
            above[name] = above[name] + information * deltas([one], name)[0]
            below[name] = below[name] + information
    return {name: above[name] / below[name] for name in names}


@pytest.mark.parametrize("floor", [1e-6, 1e-2])
def test_merge_is_the_papers_formula_with_autograds_fisher(floor: float) -> None:
    adapters = [random_adapter(1), random_adapter(2), random_adapter(3, rank=2)]
    weights = [0.5, 0.2, 0.3]
    merged = Fisher(floor).merge(adapters, weights, probe())
    assert relative_gap(merged, reference(adapters, weights, floor)) < 1e-5


def test_a_client_without_a_layer_counts_there_with_no_update() -> None:
    adapters = [random_adapter(1), random_adapter(2, names=[Q, FC2])]
    weights = [0.5, 0.5]
    merged = Fisher().merge(adapters, weights, probe())
    assert relative_gap(merged, reference(adapters, weights, 1e-6)) < 1e-5
    assert dense(merged[PROJECTION]).norm() < adapters[0].layers[PROJECTION].delta().norm()


def test_a_client_alone_and_equal_clients_are_fixed_points() -> None:
    one = random_adapter(1)
    for adapters in ([one], [one, one, one]):
        merged = Fisher().merge(adapters, anchors=probe())
        assert relative_gap(merged, one.layers) < 1e-6


def test_the_order_of_clients_does_not_matter() -> None:
    adapters = [random_adapter(seed) for seed in (1, 2, 3)]
    forth = Fisher().merge(adapters, [0.2, 0.3, 0.5], probe())
    back = Fisher().merge(adapters[::-1], [0.5, 0.3, 0.2], probe())
    assert relative_gap(forth, back) < 1e-6


def test_a_floor_of_one_is_the_plain_average_of_equally_informed_clients() -> None:
    flat = normalised({"one": torch.tensor([4.0, 1.0]), "two": torch.tensor([2.0])}, floor=1)
    assert_close(flat["one"], torch.full((2,), 4 / 21**0.5))
    assert_close(flat["two"], torch.full((1,), 4 / 21**0.5))


def test_no_information_counts_every_element_alike() -> None:
    assert_close(normalised({"one": torch.zeros(4)}, floor=1e-6), {"one": torch.full((4,), 0.5)})


def test_zero_and_opposite_adapters_give_no_nan() -> None:
    one = random_adapter(1)
    for adapters in ([zero(one), zero(one)], [one, negative(one)], [one, zero(one)]):
        assert is_finite(Fisher().merge(adapters, anchors=probe()))


def test_preparing_once_and_applying_twice_gives_the_same_bits() -> None:
    prepared = Fisher().prepare([random_adapter(1), random_adapter(2)], [0.5, 0.5], probe())
    assert_close(prepared.apply(), prepared.apply(), atol=0, rtol=0)


@pytest.mark.parametrize("floor", [0, -1, 1.1, float("nan")])
def test_a_bad_floor_is_refused_by_name(floor: float) -> None:
    with pytest.raises(InputError, match=r"merge\.method\.floor"):
        Fisher(floor)


def test_anchors_are_required() -> None:
    with pytest.raises(InputError, match="fisher looks at anchors"):
        Fisher().merge([random_adapter(1)])
