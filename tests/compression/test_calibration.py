"""What a model is shown says the same as autograd and transformers themselves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from places import SHAPES_CLIP
from torch import nn
from torch.testing import assert_close
from transformers import CLIPModel

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import Calibration
from sap_lightning.compression.loading import opened
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.texts import TokenRows
from sap_lightning.models.language import load_language_model


@pytest.fixture
def shown(speaker, texts) -> Calibration:
    calibration = opened(Checkpoint(speaker), TokenRows.of(texts, 10, 8, "texts"))[1]
    assert calibration is not None
    return calibration


def rows(shown: Calibration) -> torch.Tensor:
    return torch.cat([tokens for (tokens,) in shown.batches])


def test_the_loss_is_that_of_transformers_whose_labels_are_shifted_once(shown, speaker) -> None:
    model = load_language_model(Path(speaker))
    assert rows(shown).shape == (10, 8)
    assert shown.loss() == pytest.approx(float(model(rows(shown), labels=rows(shown)).loss.detach()), rel=1e-6)


def test_gradients_by_hooks_are_those_of_autograd(shown, speaker) -> None:
    blocks = Blocks(shown.tower)
    found = shown.gradients(blocks.linears(1))
    model = load_language_model(Path(speaker))
    model(rows(shown), labels=rows(shown)).loss.backward()
    assert len(found) == 7
    for name, gradient in found.items():
        weight = model.model.layers[1].get_submodule(name).weight
        assert_close(gradient, weight.grad, atol=1e-7, rtol=1e-4)
    assert all(weight.grad is None for weight in shown.tower.parameters())


def test_redundancy_is_of_what_comes_in_and_goes_out_before_the_last_norm(shown, speaker) -> None:
    found = shown.redundancy(Blocks(shown.tower))
    model = load_language_model(Path(speaker))
    model.model.norm = nn.Identity()
    states = [state.double() for state in model(rows(shown), output_hidden_states=True).hidden_states]
    expected = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(states)]
    assert found == pytest.approx(expected, abs=1e-6) and len(found) == 4
    assert not any(block._forward_hooks for block in Blocks(shown.tower))


def turned(states: list[torch.Tensor], length: int) -> list[float]:
    """Mean angle between a run's input and output in half turns, from tokens of shape (n, d)."""
    pairs = zip(states, states[length:], strict=False)
    return [float(torch.cosine_similarity(a, b, dim=-1).acos().mean() / torch.pi) for a, b in pairs]


def test_angular_distances_of_a_text_are_of_its_last_token(shown, speaker) -> None:
    model = load_language_model(Path(speaker))
    model.model.norm = nn.Identity()
    states = [state[:, -1].double() for state in model(rows(shown), output_hidden_states=True).hidden_states]
    for length in (1, 2, 4):
        found = shown.angular_distances(Blocks(shown.tower), length)
        assert found == pytest.approx(turned(states, length), abs=1e-6) and len(found) == 5 - length


def test_angular_distances_of_an_image_are_of_its_class_token(world) -> None:
    anchors = AnchorDataModule(str(world / "anchors"), 6, str(SHAPES_CLIP))
    _, shown = opened(Checkpoint(str(SHAPES_CLIP)), anchors)
    assert shown is not None
    tower = CLIPModel.from_pretrained(SHAPES_CLIP).vision_model
    states = [state[:, 0].double() for state in tower(anchors.images(), output_hidden_states=True).hidden_states]
    assert shown.angular_distances(Blocks(shown.tower), 2) == pytest.approx(turned(states, 2), abs=1e-6)
