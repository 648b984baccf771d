"""What is seen of a real short training, with and without a terminal."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
from lightning.pytorch.callbacks import ProgressBar
from places import SHAPES_CLIP
from references import quiet_trainer

from sap_lightning.callbacks.progress import EpochLog, Row, RowBar, Rows, TitledProgressBar, training_progress
from sap_lightning.data import DomainDataModule
from sap_lightning.modules import CLIPLoRAModule


def fit(
    world: Path, epochs: int, val_fraction: float = 0.2, progress: L.Callback | None = None, **options: Any
) -> None:
    shown = progress or training_progress("client 1 of 4 (photo)")
    trainer = quiet_trainer(
        shown,
        max_epochs=epochs,
        enable_progress_bar=isinstance(shown, ProgressBar),
        num_sanity_val_steps=2,
        **options,
    )
    data = DomainDataModule(
        str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=16, val_fraction=val_fraction, cache=False
    )
    trainer.fit(CLIPLoRAModule(SHAPES_CLIP), datamodule=data)


def test_without_a_terminal_every_epoch_is_one_line(world, caplog):
    caplog.set_level(logging.INFO, logger="sap_lightning")
    fit(world, epochs=3)
    lines = [record.getMessage() for record in caplog.records if record.name == "sap_lightning.callbacks.progress"]
    number = r"\d\.\d{3}"
    assert len(lines) == 3
    for epoch, line in enumerate(lines, start=1):
        start = rf"client 1 of 4 \(photo\): epoch {epoch} of 3, loss {number}, val accuracy {number}"
        assert re.fullmatch(rf"{start}, about \d+ s left", line), line
    assert lines[-1].endswith("about 0 s left")


@pytest.mark.filterwarnings("ignore:.*across ranks is zero")
def test_without_validation_every_epoch_is_still_one_line(world, caplog):
    caplog.set_level(logging.INFO, logger="sap_lightning")
    fit(world, epochs=2, val_fraction=0)
    lines = [record.getMessage() for record in caplog.records if record.name == "sap_lightning.callbacks.progress"]
    assert len(lines) == 2
    assert all("loss" in line and "accuracy" not in line for line in lines)


def test_the_time_left_is_right_when_steps_end_the_training(world, caplog):
    caplog.set_level(logging.INFO, logger="sap_lightning")
    fit(world, epochs=-1, max_steps=4)
    lines = [record.getMessage() for record in caplog.records if record.name == "sap_lightning.callbacks.progress"]
    assert len(lines) == 2
    assert "epoch 2, loss" in lines[1] and lines[1].endswith("about 0 s left")


def test_on_a_terminal_a_bar_on_one_line_has_title_epoch_loss_and_accuracy(world, terminal, capsys):
    fit(world, epochs=2)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
    last = re.split(r"[\r\n]", shown.strip())[-1]
    assert re.search(r"client 1 of 4 \(photo\) · epoch 2 of 2 ━+ 2/2 .*loss: \d\.\d{3} val accuracy: \d\.\d{3}", last)
    assert "v_num" not in shown


def test_a_bar_on_a_terminal_and_a_log_elsewhere(terminal):
    assert isinstance(training_progress("client"), TitledProgressBar)
    rich.reconfigure(force_terminal=False)
    assert isinstance(training_progress("client"), EpochLog)


def test_a_client_among_others_says_every_step_that_it_has_trained(world):
    rows: list[Row] = []
    fit(world, epochs=2, progress=RowBar("client 1 of 4 (photo)", rows.append))
    assert [(row.steps, row.all_steps) for row in rows] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {row.title for row in rows} == {"client 1 of 4 (photo)"}
    assert re.fullmatch(
        r"client 1 of 4 \(photo\) · epoch 2 of 2, loss \d\.\d{3}, val accuracy \d\.\d{3}", rows[-1].text
    )


def test_on_a_terminal_each_client_has_a_row_until_it_is_done(terminal, capsys):
    with Rows() as rows:
        rows.show(Row("a", "a · epoch 1 of 2", 3, 8))
        rows.show(Row("b", "b · epoch 1", 5, 8))
        rows.show(Row("a", "a · epoch 2 of 2", 7, 8))
        rows._bars.refresh()
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
        rows.remove("a")
        rows.remove("one without a row")
        rows._bars.refresh()
        later = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"a · epoch 2 of 2 [━╸╺]+ 7/8 .*\nb · epoch 1 +[━╸╺]+ 5/8", shown)
    assert "b · epoch 1" in later and "a · " not in later


def test_elsewhere_rows_show_nothing(capsys):
    with Rows() as rows:
        rows.show(Row("a", "a · epoch 1 of 2", 3, 8))
        rows.remove("a")
    assert capsys.readouterr().out == ""
