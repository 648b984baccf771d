from __future__ import annotations

import pytest
import torch
from references import REDUCTIONS
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.saliency import Reduction, SaliencySum, alignment_loss
from sap_lightning.functional.spaces import SPACES, Space, SpaceName, dense

ANCHORS, TOKENS, D_IN, D_OUT, RANK, FEATURES = 7, 3, 6, 8, 4, 4
EACH_SPACE = pytest.mark.parametrize("name", list(SPACES))
EACH_REDUCTION = pytest.mark.parametrize("reduction", list(REDUCTIONS))


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = randn(0, D_OUT, D_IN)
LAYER = LoRALayer(randn(1, RANK, D_IN), randn(2, D_OUT, RANK), 0.3)
INPUTS = randn(3, ANCHORS, TOKENS, D_IN)
CAPTIONS = randn(4, ANCHORS, FEATURES)
HEAD = randn(5, FEATURES, D_OUT)


def losses_from(outputs: Tensor, captions: Tensor) -> Tensor:
    return alignment_loss(linear(nn.functional.gelu(outputs).mean(1), HEAD), captions)


def taylor_terms(space: Space) -> tuple[Tensor, ...]:
    """θ·∂Lᵢ/∂θ by autograd, one anchor after another; shape (ANCHORS, *θ)."""
    theta = tuple(parameter.clone().requires_grad_() for parameter in space.parameters)
    terms = []
    for x, caption in zip(INPUTS, CAPTIONS, strict=True):
        loss = losses_from(linear(x[None], BASE + dense(space.update(theta))), caption[None]).sum()
        terms.append([p.detach() * g for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)])
    return tuple(torch.stack(term) for term in zip(*terms, strict=True))


def saliency(space: Space, reduction: Reduction, batch_sizes: tuple[int, ...] = (ANCHORS,)) -> tuple[Tensor, ...]:
    outputs = linear(INPUTS, BASE + LAYER.delta()).requires_grad_()
    gradients = torch.autograd.grad(losses_from(outputs, CAPTIONS).sum(), outputs)[0]
    total = SaliencySum(space, reduction)
    for x, g in zip(INPUTS.split(batch_sizes), gradients.split(batch_sizes), strict=True):
        total.add(x, g)
    return total.scores(ANCHORS)


@EACH_SPACE
@EACH_REDUCTION
def test_saliency_is_its_definition_over_a_loop_of_anchors(name: SpaceName, reduction: Reduction) -> None:
    space = SPACES[name](LAYER)
    expected = tuple(REDUCTIONS[reduction](term) for term in taylor_terms(space))
    assert_close(saliency(space, reduction), expected)


@EACH_SPACE
@EACH_REDUCTION
@pytest.mark.parametrize("batch_sizes", [(1,) * ANCHORS, (4, 3), (2, 5)])
def test_saliency_does_not_depend_on_how_the_anchors_are_batched(
    name: SpaceName, reduction: Reduction, batch_sizes: tuple[int, ...]
) -> None:
    space = SPACES[name](LAYER)
    assert_close(saliency(space, reduction, batch_sizes), saliency(space, reduction))


@EACH_SPACE
@EACH_REDUCTION
def test_scoring_leaves_the_parameters_and_the_sums_alone(name: SpaceName, reduction: Reduction) -> None:
    space = SPACES[name](LAYER)
    before = tuple(parameter.clone() for parameter in space.parameters)
    first, second = saliency(space, reduction), saliency(space, reduction)
    assert_close(space.parameters, before, atol=0, rtol=0)
    assert_close(first, second, atol=0, rtol=0)


def test_a_parameter_that_is_zero_has_no_saliency() -> None:
    B = LAYER.B.clone()
    B[2, 1] = 0
    _, of_B = saliency(SPACES["factor"](LAYER._replace(B=B)), "abs_then_mean")
    assert of_B[2, 1] == 0 and (of_B > 0).sum() == B.numel() - 1


def test_the_reductions_order_themselves_as_jensen_says() -> None:
    space = SPACES["delta"](LAYER)
    (mean_then_abs,), (abs_then_mean,), (square,) = (saliency(space, reduction) for reduction in REDUCTIONS)
    assert (mean_then_abs <= abs_then_mean + 1e-15).all()
    assert (abs_then_mean <= square.sqrt() + 1e-15).all()


def test_alignment_loss_is_one_minus_the_cosine_of_every_pair() -> None:
    images, captions = randn(8, ANCHORS, FEATURES), randn(9, ANCHORS, FEATURES)
    expected = [1 - float(i @ c / (i.norm() * c.norm())) for i, c in zip(images, captions, strict=True)]
    assert_close(alignment_loss(images, captions).tolist(), expected)


@pytest.mark.parametrize(("factor", "loss"), [(3.0, 0.0), (-0.1, 2.0)])
def test_alignment_loss_runs_from_zero_to_two_whatever_the_length(factor: float, loss: float) -> None:
    features = randn(8, ANCHORS, FEATURES)
    assert_close(alignment_loss(features, factor * features), torch.full((ANCHORS,), loss, dtype=torch.float64))
