"""Which rows training goes on with, and that no other moves, by real short runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from places import SHAPES_CLIP
from references import quiet_trainer
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from sap_lightning.callbacks.sent_blocks import SentBlocks
from sap_lightning.callbacks.sparse_update import BATCHES, MOMENTUM, SparseUpdate
from sap_lightning.data import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.models.layers import block_of
from sap_lightning.modules import CLIPLoRAModule


class Watch(L.Callback):
    """The parameters after every step, and what single images say of one of them before it."""

    WATCHED = "tower.base_model.model.vision_model.encoder.layers.1.self_attn.q_proj.lora_B.default.weight"

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []
        self.squares: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, index: int) -> None:
        if len(self.squares) < BATCHES:
            watched = pl_module.get_parameter(self.WATCHED)
            losses = cross_entropy(pl_module(batch.images), batch.labels, reduction="none")
            gradients = [torch.autograd.grad(loss, watched, retain_graph=True)[0] for loss in losses]
            self.squares.append(torch.stack(gradients).square().mean(0))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.after.append({name: value.detach().clone() for name, value in pl_module.trained_parameters().items()})


def trained(world: Path, share: float, sent: SentBlocks | None = None, steps: int = BATCHES + 3) -> Any:
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=2, cache=False)
    sent = sent or SentBlocks()
    sparse, watch = SparseUpdate(share, sent), Watch()
    module = CLIPLoRAModule(SHAPES_CLIP, rank=4, weight_decay=0.1, schedule="constant", warmup=0.0)
    quiet_trainer(sent, sparse, watch, max_steps=steps, limit_val_batches=0).fit(module, datamodule=data)
    return module, sparse, watch


@pytest.fixture(scope="module")
def half(world) -> Any:
    return trained(world, 0.5)


def test_after_the_first_batches_half_of_the_rows_move_and_the_others_do_not_by_a_bit(half):
    module, sparse, watch = half
    chosen, last = watch.after[BATCHES - 1], watch.after[-1]
    assert sparse.kept.keys() == module.trained_parameters().keys()
    for name, kept in sparse.kept.items():
        rows = kept.flatten()
        assert int(rows.sum()) == len(rows) // 2
        assert torch.equal(last[name][~rows], chosen[name][~rows])
        assert (last[name][rows] != chosen[name][rows]).any(1).all()


def test_in_the_first_batches_all_rows_move(half):
    _, _, watch = half
    for name, before in watch.after[0].items():
        assert (watch.after[BATCHES - 1][name] != before).any(1).all()


def test_rows_are_chosen_by_the_squares_of_single_images_gradients(half):
    _, sparse, watch = half
    information = torch.zeros_like(watch.squares[0])
    for squares in watch.squares:
        information = MOMENTUM * information + (1 - MOMENTUM) * squares
    highest = information.sum(1).argsort(descending=True)[: len(information) // 2].sort().values
    assert torch.equal(sparse.kept[Watch.WATCHED].flatten().nonzero().flatten(), highest)


def test_adam_would_have_moved_rows_without_gradient(half):
    """What is put back after a step is not what a mask on the gradient alone would have kept."""
    module, sparse, _ = half
    parameter = module.get_parameter(Watch.WATCHED)
    rows = sparse.kept[Watch.WATCHED].flatten()
    optimizer = module.optimizers().optimizer
    before = parameter.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    for other in module.trained_parameters().values():
        other.grad = torch.zeros_like(other)
    optimizer.step()
    assert (parameter[~rows] != before[~rows]).any()


def test_a_share_that_leaves_no_row_out_trains_the_same_bits_as_all(world):
    all_rows, _, _ = trained(world, 1.0)
    nearly, sparse, _ = trained(world, 0.999)
    assert sparse.kept and all(kept.all() for kept in sparse.kept.values())
    assert_close(nearly.layers(), all_rows.layers(), rtol=0, atol=0)


def test_where_blocks_are_sent_it_is_for_those_that_stay_at_home(world):
    module, sparse, watch = trained(world, 0.25, SentBlocks([0, 2]))
    assert {block_of(name) for name in sparse.kept} == {1, 3}
    sent = [name for name in module.trained_parameters() if block_of(name) in (0, 2)]
    assert all((watch.after[-1][name] != watch.after[BATCHES - 1][name]).any(1).all() for name in sent)


def test_a_training_that_ends_too_early_is_told_that_nothing_was_left_out(world, caplog):
    caplog.set_level(logging.WARNING, logger="sap_lightning")
    _, sparse, _ = trained(world, 0.5, steps=2)
    assert sparse.kept == {}
    (said,) = [record.getMessage() for record in caplog.records if "trained_rows" in record.getMessage()]
    assert said == f"model.trained_rows had no effect: training ended within its first {BATCHES} batches"


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(InputError, match=r"model\.trained_rows must lie in \(0, 1\]"):
        CLIPLoRAModule(SHAPES_CLIP, trained_rows=share)
