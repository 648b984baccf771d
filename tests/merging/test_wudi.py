from __future__ import annotations

import pytest
import torch
from adapters import SHAPES, assert_same, deltas, random_adapter, unlike_adapters
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.merging.task_arithmetic import TaskArithmetic
from sap_lightning.merging.wudi import WUDI

UNIFORM, WEIGHTS = [1 / 3] * 3, [0.5, 0.3, 0.2]
CROWDED = [random_adapter(seed, rank=10, scale=0.5 + seed) for seed in range(3)]
"""Clients of whom not all can be met: their rows are more than the inputs."""


def interference(merged: Tensor, stacked: Tensor, weights: list[float]) -> Tensor:
    """The paper's loss, each client's term times K times its weight."""
    total = merged.new_zeros(())
    for delta, weight in zip(stacked, weights, strict=True):
        if delta.any():
            total = total + len(stacked) * weight * ((merged - delta) @ delta.T).norm() ** 2 / delta.norm() ** 2
    return total


def start(stacked: Tensor, weights: list[float]) -> Tensor:
    return torch.tensordot(len(stacked) * torch.tensor(weights, dtype=torch.float64), stacked, 1)


def flow(stacked: Tensor, weights: list[float], time: float | None) -> Tensor:
    """N·C⁺ + (S − N·C⁺)·exp(−t·C) with dense float64 matrices."""
    C = torch.zeros(stacked.shape[2], stacked.shape[2], dtype=torch.float64)
    N = torch.zeros(stacked.shape[1:], dtype=torch.float64)
    for delta, weight in zip(stacked, weights, strict=True):
        if delta.any():
            gram = len(stacked) * weight * delta.T @ delta / delta.norm() ** 2
            C, N = C + gram, N + delta @ gram
    least = N @ torch.linalg.pinv(C, hermitian=True, rtol=1e-10)
    return least if time is None else least + (start(stacked, weights) - least) @ torch.linalg.matrix_exp(-time * C)


@pytest.mark.parametrize("weights", [UNIFORM, WEIGHTS])
@pytest.mark.parametrize("time", [0.1, 2.0, 50.0, None])
@pytest.mark.parametrize("adapters", [unlike_adapters(), CROWDED], ids=["unlike", "crowded"])
def test_it_is_the_flow_of_the_dense_updates(adapters, time: float | None, weights) -> None:
    expected = {name: flow(deltas(adapters, name), weights, time) for name in SHAPES}
    assert_same(WUDI(time).merge(adapters, weights), expected, 1e-5)


def test_the_flow_is_what_small_steps_down_the_gradient_do() -> None:
    adapters, time, steps = unlike_adapters(), 2.0, 200
    merged = WUDI(time).merge(adapters, WEIGHTS)
    stacked = deltas(adapters, "fc1")
    point = start(stacked, WEIGHTS).requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(interference(point, stacked, WEIGHTS), point)
        # The loss has squares without the usual half, so time runs twice as fast.
        point = (point - time / steps * gradient / 2).detach().requires_grad_()
    assert_same({"fc1": merged["fc1"]}, {"fc1": point.detach()}, 1e-3)


def test_the_end_of_the_flow_is_where_adam_gets_with_patience_in_the_clients_rows() -> None:
    adapters = [random_adapter(seed, rank=3) for seed in range(3)]
    stacked = deltas(adapters, "q")
    point = torch.nn.Parameter(stacked.sum(0))
    adam = torch.optim.Adam([point], lr=0.1)
    for _ in range(300):
        adam.zero_grad()
        interference(point, stacked, UNIFORM).backward()
        adam.step()
    rows = torch.linalg.qr(torch.cat([adapter.layers["q"].A.double() for adapter in adapters]).T).Q
    merged = WUDI(None).merge(adapters)["q"]
    assert_same({"q": merged}, {"q": point.detach() @ rows @ rows.T}, 1e-6)
    assert_close(dense(merged).double() @ rows @ rows.T, dense(merged).double(), atol=1e-5, rtol=0)


def test_clients_whose_rows_fit_side_by_side_are_met_exactly_whatever_their_weights() -> None:
    adapters = unlike_adapters()
    merged = WUDI(None).merge(adapters, WEIGHTS)
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            rows = torch.linalg.qr(layer.A.double().T).Q
            assert_close(dense(merged[name]).double() @ rows, layer.delta().double() @ rows, atol=1e-4, rtol=1e-4)
    assert_same(merged, WUDI(None).merge(adapters), 1e-5)


def test_it_ends_at_a_minimum_also_where_not_all_can_be_met() -> None:
    stacked = deltas(CROWDED, "fc1")
    merged = dense(WUDI(None).merge(CROWDED, WEIGHTS)["fc1"]).double().requires_grad_()
    loss = interference(merged, stacked, WEIGHTS)
    (gradient,) = torch.autograd.grad(loss, merged)
    (at_the_sum,) = torch.autograd.grad(interference(point := merged * 0 + stacked.sum(0), stacked, WEIGHTS), point)
    assert loss > 1 and gradient.norm() < 1e-5 * at_the_sum.norm()


def test_it_begins_at_the_sum_and_ends_at_the_minimum() -> None:
    adapters = unlike_adapters()
    assert_same(WUDI(1e-9).merge(adapters, WEIGHTS), TaskArithmetic(1).merge(adapters, WEIGHTS), 1e-6)
    assert_same(WUDI(1e9).merge(adapters, WEIGHTS), WUDI(None).merge(adapters, WEIGHTS), 1e-6)


def test_at_the_minimum_copies_of_a_client_are_that_client_and_opposites_cancel_out() -> None:
    adapter = random_adapter(0)
    assert_same(WUDI(None).merge([adapter] * 3), adapter.layers, 1e-5)
    merged = WUDI(None).merge([adapter, random_adapter(0, scale=-0.5)])
    assert all(dense(update).abs().max() < 1e-6 for update in merged.values())


def test_the_result_is_in_factor_form_of_the_rank_of_all_clients() -> None:
    assert {name: update.rank for name, update in WUDI().merge(unlike_adapters()).items()} == {"fc1": 6, "q": 12}


@pytest.mark.parametrize("time", [0.0, -1.0])
def test_a_time_that_is_not_ahead_is_refused(time: float) -> None:
    with pytest.raises(InputError, match=rf"merge\.method\.time must be above 0, got {time}"):
        WUDI(time)
