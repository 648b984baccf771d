"""Recovery: compressed blocks are trained, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llamas import weights_in

from sap_lightning.compression.compression import Compression
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
    with pytest.raises(InputError, match=r"compress.texts is not set: grasp looks at"):
        recovered(texts=None, rows=None, tokens=None, score="sigma")
