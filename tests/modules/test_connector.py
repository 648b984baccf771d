"""Connectors of Pilot's two stages, and the mean of several."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sap_lightning.errors import InputError
from sap_lightning.functional.mixture import difference_loss
from sap_lightning.modules.connector import (
    LossWeights,
    MixedConnector,
    SharedConnector,
    TaskConnector,
    ends_in_zeros,
    mean_connector,
)

WEIGHTS = LossWeights()


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 5))


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(7))


def trained(connector: nn.Module) -> set[str]:
    return {name for name, parameter in connector.named_parameters() if parameter.requires_grad}


def test_a_form_that_there_is_not_is_refused():
    with pytest.raises(InputError, match=r"model.losses.form 'normalised': it takes one of"):
        LossWeights(form="normalised")


def test_a_shared_connector_is_a_copy_of_the_base_s(features):
    base = perceptron(0)
    connector = SharedConnector(base)
    found, loss = connector(features)
    assert torch.equal(found, base(features)) and float(loss) == 0
    assert connector.kept() == {}
    assert trained(connector) == {f"sent.{name}" for name, _ in base.named_parameters()}


def test_the_first_stage_starts_as_the_base(features):
    base = perceptron(0)
    connector = TaskConnector(base, WEIGHTS)
    found, loss = connector(features)
    assert torch.equal(found, base(features)) and float(loss.detach()) == 0
    assert {name.split(".")[0] for name in trained(connector)} == {"sent", "own"}
    assert set(connector.kept()) == {f"own.{name}" for name, _ in base.named_parameters()}


def test_the_first_stage_s_loss_keeps_task_and_client_apart(features):
    connector = TaskConnector(perceptron(0), LossWeights(difference=0.3))
    nn.init.normal_(connector.own[-1].weight)
    found, loss = connector(features)
    task, own = connector.sent(features), connector.own(features)
    assert torch.allclose(found, task + own)
    assert float(loss.detach()) == pytest.approx(0.3 * float(difference_loss(task, own).detach()))


def test_the_second_stage_starts_as_the_even_mean_of_what_was_received(features):
    tasks, own = [perceptron(seed) for seed in range(3)], perceptron(9)
    connector = MixedConnector(tasks[0], {"vqa": tasks[1], "caption": tasks[2]}, own, WEIGHTS)
    found, loss = connector(features)
    expected = torch.stack([task(features) for task in tasks]).mean(0) + own(features)
    assert torch.allclose(found, expected, atol=1e-6)
    logits = torch.zeros(2, 4, 3)
    assert float(loss.detach()) == pytest.approx(0.01 * 1 + 0.001 * float(logits.logsumexp(-1).square().mean()))


def test_a_router_that_takes_the_own_task_alone_gives_the_first_stage(features):
    own = perceptron(9)
    first = TaskConnector(perceptron(0), WEIGHTS)
    first.own.load_state_dict(own.state_dict())
    second = MixedConnector(perceptron(0), {"vqa": perceptron(1)}, own, WEIGHTS)
    with torch.no_grad():
        second.router.bias.copy_(torch.tensor([200.0, 0.0]))
    assert torch.allclose(second(features)[0], first(features)[0], atol=1e-6)


def test_the_second_stage_trains_the_own_task_the_corrections_and_the_router(features):
    connector = MixedConnector(perceptron(0), {"a.b": perceptron(1)}, perceptron(9), WEIGHTS)
    assert {name.split(".")[0] for name in trained(connector)} == {"sent", "corrections", "router"}
    frozen = {name: value.clone() for name, value in connector.state_dict().items() if name not in trained(connector)}
    optimizer = torch.optim.AdamW([p for p in connector.parameters() if p.requires_grad], lr=0.1)
    found, loss = connector(features)
    (found.square().mean() + loss).backward()
    optimizer.step()
    assert all(torch.equal(value, connector.state_dict()[name]) for name, value in frozen.items())
    assert {name.split(".")[0] for name in connector.kept()} == {"own", "corrections", "router"}


def test_one_that_ends_in_zeros_is_drawn_anew_and_gives_0(features):
    base = perceptron(0)
    other = ends_in_zeros(base)
    assert float(other(features).detach().abs().max()) == 0
    assert not torch.equal(other[0].weight, base[0].weight)


def test_the_mean_is_by_weights_in_float64():
    connectors = [perceptron(seed).state_dict() for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    mean = mean_connector(connectors, weights)
    for name in connectors[0]:
        expected = sum(w * one[name].double() for w, one in zip(weights, connectors, strict=True)).float()
        assert torch.equal(mean[name], expected)
    same = mean_connector([connectors[0]] * 2, [0.5, 0.5])
    assert all(torch.equal(same[name], value) for name, value in connectors[0].items())
