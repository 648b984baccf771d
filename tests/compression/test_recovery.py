"""Recovery: compressed blocks are trained, and nothing else."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamas import weights_in
from torch.testing import assert_close

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.compression import recovery
from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import next_token_losses
from sap_lightning.compression.compression import Compression
from sap_lightning.compression.loading import opened
from sap_lightning.compression.recovery import batches_a_step, recover
from sap_lightning.data.texts import TokenRows
from sap_lightning.errors import InputError


@pytest.fixture
def recovered(speaker, texts, tmp_path):
    def recover(name: str = "out", **settings) -> Path:
        shown = {"texts": texts, "rows": 12, "tokens": 16, "layers": [1, 2], "recovery_epochs": 3} | settings
        return Compression(speaker, str(tmp_path / name), **shown).run()

    return recover


def test_the_compressed_blocks_learn_and_nothing_else_does(recovered, speaker) -> None:
    before, after = weights_in(Path(speaker)), weights_in(recovered())
    plain = weights_in(recovered("plain", recovery_epochs=None))
    assert plain.keys() == after.keys()
    for key, weight in after.items():
        trained = ".layers.1." in key or ".layers.2." in key
        assert torch.equal(weight, plain[key]) != trained
        assert trained or torch.equal(weight, before[key])


def test_the_loss_falls_from_what_compression_left(recovered) -> None:
    found = json.loads((recovered() / "compress.json").read_text())
    plain = json.loads((recovered("plain", recovery_epochs=None) / "compress.json").read_text())
    assert found["findings"]["loss before recovery"] == plain["findings"]["loss"][1]
    assert found["findings"]["loss"][1] < found["findings"]["loss before recovery"]
    assert found["settings"]["recovery_epochs"] == 3 and plain["settings"]["recovery_epochs"] == 0


def test_the_same_seed_gives_the_same_bytes_and_another_an_order_of_its_own(recovered) -> None:
    one, again, other = (recovered(str(index), seed=seed) for index, seed in enumerate((0, 0, 1)))
    file = "compressed.safetensors"
    assert (one / file).read_bytes() == (again / file).read_bytes() != (other / file).read_bytes()


def test_steps_on_texts_are_those_of_adamw_with_a_warm_up(speaker, texts, monkeypatch) -> None:
    monkeypatch.setattr(recovery, "BATCH", 8)
    monkeypatch.setattr(recovery, "WARMUP", 3)
    seen = []

    def losses(model, batch):
        seen.append(batch[0])
        return next_token_losses(model, batch)

    _, shown = opened(Checkpoint(speaker), TokenRows.of(texts, 64, 6, "texts"))
    assert shown is not None
    plain, blocks = copy.deepcopy(shown.tower), Blocks(shown.tower)
    recover(replace(shown, losses=losses), [blocks[1], blocks[2]], epochs=5, seed=7)
    orders = [seen[first : first + 16] for first in range(0, 80, 16)]
    assert len(seen) == 80 and not torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))
    assert all(torch.equal(torch.cat(one).unique(dim=0), torch.cat(seen).unique(dim=0)) for one in orders)

    trained = [weight.requires_grad_() for block in plain.model.layers[1:3] for weight in block.parameters()]
    optimizer, step = torch.optim.AdamW(trained, 3e-4), 0
    for batches in orders:
        for pair in zip(batches[::2], batches[1::2], strict=True):  # 8 rows a step, so 8 steps an epoch
            optimizer.param_groups[0]["lr"] = 3e-4 * min(1, (step + 1) / 3)
            rows = torch.cat(pair)
            plain(rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert step == 40
    for name, weight in plain.named_parameters():
        assert_close(shown.tower.get_parameter(name), weight.detach(), atol=1e-6, rtol=1e-4)
    assert not torch.equal(trained[0], weights_in(Path(speaker))["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("shown", "at_once", "batches"), [(8, 4, 1), (32, 4, 1), (512, 4, 4), (4096, 4, 8), (64, 16, 1), (1024, 16, 2)]
)
def test_a_step_has_up_to_32_rows_and_an_epoch_32_steps_before_that(shown, at_once, batches) -> None:
    assert batches_a_step(shown, at_once) == batches


def test_blocks_that_gradpruner_merged_into_are_trained_too(recovered, speaker) -> None:
    trained = weights_in(recovered(method="gradpruner", steps=3))
    plain = weights_in(recovered("plain", method="gradpruner", steps=3, recovery_epochs=None))
    changed = {key for key in plain if not torch.equal(plain[key], trained[key])}
    assert changed and all(".layers.0." in key for key in changed)


def test_what_has_no_changed_block_or_no_epochs_is_refused(recovered) -> None:
    with pytest.raises(
        InputError, match=r"compress.recovery_epochs: drop would ignore it; it is for grasp, gradpruner"
    ):
        recovered(method="drop")
    with pytest.raises(InputError, match=r"compress.recovery_epochs must be at least 0"):
        recovered(recovery_epochs=-1)
    with pytest.raises(InputError, match=r"compress.recovery_epochs: gradpruner has changed no block that is left"):
        recovered(method="gradpruner", steps=2, layers=[0])
    with pytest.raises(InputError, match=r"compress.texts is not set: grasp looks at"):
        recovered(texts=None, rows=None, tokens=None, score="sigma")
