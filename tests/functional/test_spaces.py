from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from references import ANCHORS, BASE, INPUTS, LAYER, RANK, TOKENS, anchor_losses, output_gradients, randn64
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.functional.spaces import SPACES, SpaceName, magnitudes

EACH_SPACE = pytest.mark.parametrize("name", list(SPACES))


def written_out(name: SpaceName) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """A space's parameters as autograd leaves, and ΔW as a function of them, from the dense update alone."""
    if name == "factor":
        theta, build = (LAYER.A.clone(), LAYER.B.clone()), lambda A, B: LAYER.scale * B @ A
    elif name == "delta":
        theta, build = (LAYER.delta(),), lambda delta: delta
    else:
        U, sigma, V = torch.linalg.svd(LAYER.delta())
        theta, build = (sigma[:RANK].clone(),), lambda sigma: U[:, :RANK] @ sigma.diag() @ V[:RANK]
    return tuple(parameter.requires_grad_() for parameter in theta), build


@EACH_SPACE
def test_parameters_are_the_elements_that_the_space_is_named_for(name: SpaceName) -> None:
    assert_close(SPACES[name](LAYER).parameters, tuple(theta.detach() for theta in written_out(name)[0]))


@EACH_SPACE
def test_gradients_of_the_summed_loss_are_autograds(name: SpaceName) -> None:
    theta, build = written_out(name)
    loss = anchor_losses(linear(INPUTS, BASE + build(*theta))).sum()
    gradients = SPACES[name](LAYER).gradients(INPUTS.flatten(0, 1), output_gradients().flatten(0, 1))
    assert_close(gradients, torch.autograd.grad(loss, theta))


@EACH_SPACE
@pytest.mark.parametrize("anchor", range(ANCHORS))
def test_gradients_of_one_anchors_loss_are_autograds(name: SpaceName, anchor: int) -> None:
    theta, build = written_out(name)
    loss = anchor_losses(linear(INPUTS, BASE + build(*theta)))[anchor]
    gradients = SPACES[name](LAYER).gradients(INPUTS[anchor], output_gradients()[anchor])
    assert_close(gradients, torch.autograd.grad(loss, theta))


@EACH_SPACE
def test_all_parameters_together_make_the_whole_update(name: SpaceName) -> None:
    space = SPACES[name](LAYER)
    assert_close(dense(space.update(space.parameters)), LAYER.delta())


@EACH_SPACE
def test_masked_parameters_make_the_pruned_update(name: SpaceName) -> None:
    space = SPACES[name](LAYER)
    theta, build = written_out(name)
    masks = [randn64(10 + i, *parameter.shape) > 0 for i, parameter in enumerate(theta)]
    pruned = space.update(tuple(p * mask for p, mask in zip(space.parameters, masks, strict=True)))
    assert_close(dense(pruned), build(*(p * mask for p, mask in zip(theta, masks, strict=True))).detach())


@EACH_SPACE
def test_no_parameters_left_make_no_update(name: SpaceName) -> None:
    space = SPACES[name](LAYER)
    assert not dense(space.update(tuple(torch.zeros_like(p) for p in space.parameters))).any()


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(9, 6, 8), (9, 8, 6)])
def test_the_singular_space_of_a_rank_above_the_width_still_makes_the_whole_update(
    rank: int, d_in: int, d_out: int
) -> None:
    layer = LoRALayer(randn64(6, rank, d_in), randn64(7, d_out, rank), 0.5)
    space = SPACES["singular"](layer)
    assert_close(dense(space.update(space.parameters)), layer.delta())
    assert space.gradients(randn64(8, TOKENS, d_in), randn64(9, TOKENS, d_out))[0].shape == space.parameters[0].shape


def test_the_singular_space_of_an_untrained_adapter_is_zero() -> None:
    space = SPACES["singular"](LAYER._replace(B=torch.zeros_like(LAYER.B)))
    assert not space.parameters[0].any()
    assert space.gradients(INPUTS[0], output_gradients()[0])[0].isfinite().all()


@EACH_SPACE
def test_magnitudes_are_those_of_every_parameter_of_every_layer(name: SpaceName) -> None:
    other = LAYER._replace(scale=-2.0)
    found = magnitudes({"q": SPACES[name](LAYER), "v": SPACES[name](other)})
    assert list(found) == ["q", "v"]
    for layer, of in ((LAYER, found["q"]), (other, found["v"])):
        assert_close(of, tuple(theta.abs() for theta in SPACES[name](layer).parameters), atol=0, rtol=0)
