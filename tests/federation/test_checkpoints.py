"""Checkpoints that are whole or not there, and what becomes of one that was damaged all the same."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from damage import cut, empty, flip
from references import contents

from sap_lightning.errors import InputError
from sap_lightning.federation.checkpoints import LAST, PREVIOUS, WholeCheckpoints, last_checkpoint


def save(folder: Path, epoch: int, numbers: int = 1000) -> None:
    WholeCheckpoints().save_checkpoint({"epoch": epoch, "weights": torch.full((numbers,), float(epoch))}, folder / LAST)


def epoch_of(file: Path | None) -> int:
    assert file is not None
    return torch.load(file, weights_only=True)["epoch"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of three epochs, of which two are kept."""
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    return tmp_path


def test_the_last_two_are_kept_and_the_last_is_taken(saved):
    assert {path.name for path in saved.iterdir()} == {LAST, PREVIOUS}
    assert (epoch_of(saved / PREVIOUS), epoch_of(last_checkpoint(saved))) == (2, 3)


def test_without_any_training_starts_anew(tmp_path):
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_a_damaged_one_is_named_and_the_one_before_it_is_taken(saved, damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    damage(saved / LAST)
    assert epoch_of(last_checkpoint(saved)) == 2
    assert f"{saved / LAST} is damaged" in caplog.text
    save(saved, 3)
    assert epoch_of(saved / PREVIOUS) == 2, "a damaged one does not take the place of one that can be read"


def test_where_both_are_damaged_training_starts_anew_and_nothing_is_deleted(saved):
    flip(saved / LAST)
    cut(saved / PREVIOUS)
    assert last_checkpoint(saved) is None
    assert len(list(saved.iterdir())) == 2


def test_killed_between_two_checkpoints_the_earlier_one_is_taken(saved):
    (saved / LAST).unlink()
    assert epoch_of(last_checkpoint(saved)) == 2


def test_a_full_disk_costs_no_checkpoint_and_says_so_in_one_line(small_disk):
    save(small_disk, 1)
    with pytest.raises(InputError, match=rf"{LAST}: cannot be written \(No space left on device\)"):
        save(small_disk, 2, numbers=2_000_000)
    assert epoch_of(last_checkpoint(small_disk)) == 1
    assert [path.name for path in small_disk.iterdir()] == [PREVIOUS]


def test_a_client_whose_last_checkpoint_is_damaged_ends_with_the_same_bits(run, tmp_path):
    line = ["client", "--data.domain=photo", "--trainer.max_epochs=2", f"--federation.run_dir={tmp_path}"]
    run(*line)
    whole = contents(tmp_path / "uploads")
    shutil.rmtree(tmp_path / "uploads")
    flip(tmp_path / "clients" / "photo" / LAST)
    run(*line)
    assert contents(tmp_path / "uploads") == whole
