"""A client's checkpoints: each is whole or not there, and the one before it is kept in case the last is damaged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sap_lightning.files import set_aside, write_bytes

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints in one step on any file system; Lightning's own copies there what it wrote elsewhere."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        if file.name == LAST and file.exists():
            file.replace(file.with_name(PREVIOUS))
        write_bytes(file, content.getvalue())


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Writes a client's last checkpoint after every epoch."""
    return ModelCheckpoint(
        folder, filename=Path(LAST).stem, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a client's folder that can be read; one that cannot is set aside."""
    for file in (folder / LAST, folder / PREVIOUS):
        if not file.exists():
            continue
        if _is_whole(file.read_bytes()):
            return file
        set_aside(file)
    return None


def optimizer_state(checkpoint: Path) -> dict[int, Any]:
    """What the optimizer of a checkpoint has gathered of each parameter."""
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    return dict(optimizer["state"])


def _is_whole(content: bytes) -> bool:
    try:
        with ZipFile(io.BytesIO(content)) as archive:  # torch writes checksums, but does not look at them
            return archive.testzip() is None
    except Exception:  # whatever a damaged file leads zipfile to
        return False
