from __future__ import annotations

import io

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sap_lightning.callbacks.tensorboard import HISTOGRAM_SAMPLES, log_pruning, log_saliency, tensorboards

ATTENTION = "vision_model.encoder.layers.{}.self_attn.{}"
LAYERS = ["visual_projection", ATTENTION.format(10, "q_proj"), ATTENTION.format(2, "v_proj")]


def test_saliency_is_shown_as_log10_without_what_is_not_salient():
    scores = {"one": (torch.tensor([[1e-3, 0.0]]), torch.tensor([10.0])), "other": (torch.tensor([1.0]),)}
    assert log_saliency(scores).tolist() == pytest.approx([-3, 1, 0])


@pytest.mark.parametrize("size", [HISTOGRAM_SAMPLES, HISTOGRAM_SAMPLES + 1, 3 * HISTOGRAM_SAMPLES - 1])
def test_saliency_is_thinned_evenly_to_a_million(size):
    step = -(-size // HISTOGRAM_SAMPLES)
    scores = torch.arange(1, size + 1, dtype=torch.float64)
    shown = 10 ** log_saliency({"layer": (scores[: size // 2], scores[size // 2 :])})
    assert len(shown) <= HISTOGRAM_SAMPLES
    torch.testing.assert_close(shown, scores[::step])


def test_only_tensorboard_s_own_writers_are_written_to(tmp_path):
    board = TensorBoardLogger(tmp_path / "board")
    trainer = L.Trainer(accelerator="cpu", logger=[CSVLogger(tmp_path / "csv"), board])
    assert tensorboards(trainer) == [board.experiment]
    assert tensorboards(L.Trainer(accelerator="cpu", logger=False)) == []


def test_a_client_s_pruning_is_in_tensorboard(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path, name="", version="server"))
    masks = {name: (torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.5,) for name in LAYERS}
    log_pruning(trainer, "photo", 0.7, 0.8, masks, {name: (mask[0].float(),) for name, mask in masks.items()})
    tensorboards(trainer)[0].flush()
    events = EventAccumulator(str(tmp_path / "server")).Reload()
    assert events.Scalars("anchor_loss_before_pruning/photo")[0].value == pytest.approx(0.7)
    assert events.Scalars("anchor_loss_after_pruning/photo")[0].value == pytest.approx(0.8)
    drawn = Image.open(io.BytesIO(events.Images("share_kept/photo")[0].encoded_image_string))
    assert len(np.unique(np.asarray(drawn))) > 10
    kept = sum(int(mask.sum()) for (mask,) in masks.values())
    assert events.Histograms("log10_saliency/photo")[0].histogram_value.num == kept
