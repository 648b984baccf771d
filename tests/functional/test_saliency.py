from __future__ import annotations

import math

import pytest
import torch
from references import (
    ANCHORS,
    BASE,
    CAPTIONS,
    FEATURES,
    INPUTS,
    LAYER,
    REDUCTIONS,
    anchor_losses,
    output_gradients,
    randn64,
)
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from sap_lightning.functional.lora import dense
from sap_lightning.functional.saliency import (
    GradientSum,
    Reduction,
    alignment_loss,
    contrastive_loss,
    entropy_loss,
    loss_reduction,
    saliency,
    symmetric_contrastive_loss,
)
from sap_lightning.functional.spaces import SPACES, Space, SpaceName

EACH_SPACE = pytest.mark.parametrize("name", list(SPACES))
EACH_REDUCTION = pytest.mark.parametrize("reduction", list(REDUCTIONS))


def taylor_terms(space: Space) -> tuple[Tensor, ...]:
    """θ·∂Lᵢ/∂θ by autograd, one anchor after another; shape (ANCHORS, *θ)."""
    theta = tuple(parameter.clone().requires_grad_() for parameter in space.parameters)
    terms = []
    for x, caption in zip(INPUTS, CAPTIONS, strict=True):
        loss = anchor_losses(linear(x[None], BASE + dense(space.update(theta))), caption[None]).sum()
        terms.append([p.detach() * g for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)])
    return tuple(torch.stack(term) for term in zip(*terms, strict=True))


def summed(space: Space, reduction: Reduction, batch_sizes: tuple[int, ...] = (ANCHORS,)) -> tuple[Tensor, ...]:
    """The anchors' gradients, reduced."""
    total = GradientSum(space, reduction)
    for x, g in zip(INPUTS.split(batch_sizes), output_gradients().split(batch_sizes), strict=True):
        total.add(x, g)
    return total.mean(ANCHORS)


def scored(space: Space, reduction: Reduction, batch_sizes: tuple[int, ...] = (ANCHORS,)) -> tuple[Tensor, ...]:
    return saliency(space.parameters, summed(space, reduction, batch_sizes), reduction)


@EACH_SPACE
@EACH_REDUCTION
def test_saliency_is_its_definition_over_a_loop_of_anchors(name: SpaceName, reduction: Reduction) -> None:
    space = SPACES[name](LAYER)
    expected = tuple(REDUCTIONS[reduction](term) for term in taylor_terms(space))
    assert_close(scored(space, reduction), expected)


@EACH_SPACE
@EACH_REDUCTION
@pytest.mark.parametrize("batch_sizes", [(1,) * ANCHORS, (4, 3), (2, 5)])
def test_saliency_does_not_depend_on_how_the_anchors_are_batched(
    name: SpaceName, reduction: Reduction, batch_sizes: tuple[int, ...]
) -> None:
    space = SPACES[name](LAYER)
    assert_close(scored(space, reduction, batch_sizes), scored(space, reduction))


@EACH_SPACE
@EACH_REDUCTION
def test_scoring_leaves_the_parameters_and_the_sums_alone(name: SpaceName, reduction: Reduction) -> None:
    space = SPACES[name](LAYER)
    before = tuple(parameter.clone() for parameter in space.parameters)
    first, second = scored(space, reduction), scored(space, reduction)
    assert_close(space.parameters, before, atol=0, rtol=0)
    assert_close(first, second, atol=0, rtol=0)


@EACH_SPACE
def test_gradients_of_a_square_or_an_absolute_mean_are_never_negative(name: SpaceName) -> None:
    for reduction in ("abs_then_mean", "square"):
        assert all((gradient >= 0).all() for gradient in summed(SPACES[name](LAYER), reduction))


@EACH_SPACE
def test_the_loss_reduction_is_minus_the_mean_taylor_term(name: SpaceName) -> None:
    space = SPACES[name](LAYER)
    reduction = loss_reduction(space.parameters, summed(space, "mean_then_abs"))
    assert_close(reduction, tuple(-term.mean(0) for term in taylor_terms(space)))
    assert_close(tuple(r.abs() for r in reduction), scored(space, "mean_then_abs"))


@EACH_SPACE
def test_a_loss_reduction_above_zero_lowers_the_loss(name: SpaceName) -> None:
    space = SPACES[name](LAYER)
    reduction = loss_reduction(space.parameters, summed(space, "mean_then_abs"))

    def loss(share: float) -> float:
        """With this share less of every parameter that is said to lower the loss."""
        theta = tuple(p * (1 - share * (r > 0)) for p, r in zip(space.parameters, reduction, strict=True))
        return float(anchor_losses(linear(INPUTS, BASE + dense(space.update(theta)))).mean())

    assert loss(1e-4) > loss(0)


def test_a_parameter_that_is_zero_has_no_saliency() -> None:
    B = LAYER.B.clone()
    B[2, 1] = 0
    _, of_B = scored(SPACES["factor"](LAYER._replace(B=B)), "abs_then_mean")
    assert of_B[2, 1] == 0 and (of_B > 0).sum() == B.numel() - 1


def test_the_reductions_order_themselves_as_jensen_says() -> None:
    space = SPACES["delta"](LAYER)
    (mean_then_abs,), (abs_then_mean,), (square,) = (scored(space, reduction) for reduction in REDUCTIONS)
    assert (mean_then_abs <= abs_then_mean + 1e-15).all()
    assert (abs_then_mean <= square.sqrt() + 1e-15).all()


def test_alignment_loss_is_one_minus_the_cosine_of_every_pair() -> None:
    images, captions = randn64(8, ANCHORS, FEATURES), randn64(9, ANCHORS, FEATURES)
    expected = [1 - float(i @ c / (i.norm() * c.norm())) for i, c in zip(images, captions, strict=True)]
    assert_close(alignment_loss(images, captions).tolist(), expected)


@pytest.mark.parametrize(("factor", "loss"), [(3.0, 0.0), (-0.1, 2.0)])
def test_alignment_loss_runs_from_zero_to_two_whatever_the_length(factor: float, loss: float) -> None:
    features = randn64(8, ANCHORS, FEATURES)
    assert_close(alignment_loss(features, factor * features), torch.full((ANCHORS,), loss, dtype=torch.float64))


def test_contrastive_loss_is_minus_the_log_of_the_softmax_of_its_own_caption() -> None:
    images, captions = randn64(8, 3, FEATURES), randn64(9, ANCHORS, FEATURES)
    own, scale = [4, 0, 6], 2.5
    expected = []
    for image, index in zip(images, own, strict=True):
        similarities = [math.exp(scale * float(image @ caption)) for caption in captions]
        expected.append(-math.log(similarities[index] / sum(similarities)))
    assert_close(contrastive_loss(images, captions, torch.tensor(own), scale).tolist(), expected)


def test_contrastive_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    images, captions, own = randn64(8, ANCHORS, FEATURES), randn64(9, ANCHORS, FEATURES), torch.arange(ANCHORS)
    whole = contrastive_loss(images, captions, own, 2.5)
    alone = [contrastive_loss(images[i : i + 1], captions, own[i : i + 1], 2.5) for i in range(ANCHORS)]
    assert_close(torch.cat(alone), whole)


def test_contrastive_loss_of_captions_all_alike_is_the_log_of_their_number() -> None:
    images, captions = randn64(8, ANCHORS, FEATURES), randn64(9, 1, FEATURES).expand(ANCHORS, FEATURES)
    losses = contrastive_loss(images, captions, torch.arange(ANCHORS), 100.0)
    assert_close(losses, torch.full((ANCHORS,), math.log(ANCHORS), dtype=torch.float64))


def test_symmetric_contrastive_loss_is_the_mean_of_both_ways_within_the_batch() -> None:
    images, captions, scale = randn64(8, ANCHORS, FEATURES), randn64(9, ANCHORS, FEATURES), 2.5
    terms = []
    for i in range(ANCHORS):
        own = math.exp(scale * float(images[i] @ captions[i]))
        for others in (images[i] @ captions.T, images @ captions[i]):
            terms.append(-math.log(own / sum(math.exp(scale * float(x)) for x in others)))
    assert float(symmetric_contrastive_loss(images, captions, scale)) == pytest.approx(sum(terms) / (2 * ANCHORS))
    assert_close(
        symmetric_contrastive_loss(captions, images, scale), symmetric_contrastive_loss(images, captions, scale)
    )


def test_a_pair_alone_in_its_batch_has_nothing_to_tell_it_from() -> None:
    images, captions = randn64(8, 1, FEATURES), randn64(9, 1, FEATURES)
    assert float(symmetric_contrastive_loss(images, captions, 2.5)) == 0


def test_entropy_loss_is_that_of_the_softmax_over_all_captions() -> None:
    images, captions, scale = randn64(8, 3, FEATURES), randn64(9, ANCHORS, FEATURES), 2.5
    expected = []
    for image in images:
        similarities = [math.exp(scale * float(image @ caption)) for caption in captions]
        shares = [one / sum(similarities) for one in similarities]
        expected.append(-sum(p * math.log(p) for p in shares))
    assert_close(entropy_loss(images, captions, scale).tolist(), expected)


def test_entropy_loss_runs_from_nothing_to_the_log_of_the_number_of_captions() -> None:
    images, captions = randn64(8, ANCHORS, FEATURES), randn64(9, 1, FEATURES).expand(ANCHORS, FEATURES)
    alike = entropy_loss(images, captions, 100.0)
    assert_close(alike, torch.full((ANCHORS,), math.log(ANCHORS), dtype=torch.float64))
    certain = entropy_loss(images.float(), torch.cat([images, -images]).float(), 1e4)
    assert certain.isfinite().all() and (certain.abs() < 1e-6).all()
