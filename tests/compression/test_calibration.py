"""What a model is shown says the same as autograd and transformers themselves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import Calibration
from sap_lightning.compression.loading import opened
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
