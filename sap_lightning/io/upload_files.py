"""The files of an upload, in a folder or in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sap_lightning.errors import InputError
from sap_lightning.io.peft_config import CONFIG_FILE
from sap_lightning.io.rules import errors_in, object_from
from sap_lightning.io.weights import SafetensorsFile, Weights

WEIGHTS_FILE = "adapter_model.safetensors"
PROMPT_FILE = "prompt.safetensors"
CONNECTOR_FILE = "connector.safetensors"
MANIFEST_FILE = "manifest.json"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE)
UPLOAD_FILES = (*ADAPTER_FILES, PROMPT_FILE, CONNECTOR_FILE)
"""Of an upload of any kind, which has some of them."""

_MAX_JSON_BYTES = 2**20


class UploadFiles(Protocol):
    """The files of one upload."""

    def has(self, name: str) -> bool:
        """Whether a file is there."""

    def place(self, name: str) -> str:
        """How messages call a file."""

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file."""

    def weights(self, name: str = WEIGHTS_FILE) -> Weights:
        """The tensors of a weights file."""

    def size(self) -> int:
        """Bytes of all files of the upload, which is what it takes on the wire."""


class FilesInFolder:
    """Regular files of a folder, none of which leads out of it, but to the blobs of the hub's cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def json(self, name: str) -> dict[str, Any]:
        path = self._regular_file(name)
        with errors_in(path):
            _require_size(path.stat().st_size)
            return object_from(path.read_bytes())

    def weights(self, name: str = WEIGHTS_FILE) -> Weights:
        return SafetensorsFile.at(self._regular_file(name))

    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in UPLOAD_FILES if self.has(name))

    def _regular_file(self, name: str) -> Path:
        folder, path = self.folder, self.folder / name
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; expected one with {WEIGHTS_FILE} and {CONFIG_FILE}, or {PROMPT_FILE}"
            )
        if not os.path.lexists(path):
            if name == WEIGHTS_FILE and os.path.lexists(folder / "adapter_model.bin"):
                raise InputError(f"{folder}: adapter_model.bin is a pickle, never read; save as {WEIGHTS_FILE}")
            below = sorted(found.parent.name for found in folder.glob(f"*/{name}"))
            kept = "it holds no prompt" if name == PROMPT_FILE else "save the adapter with PEFT's save_pretrained"
            advice = f"there is one in {below[0]!r} below it" if below else kept
            raise InputError(f"{path}: no such file; {advice}")
        return regular_file(folder, name)


def regular_file(folder: Path, name: str) -> Path:
    """A file of a folder, or of the hub's cache that the folder is of.

    Raises:
        InputError: it is none, or leads out of the folder.
    """
    path = folder / name
    real = Path(os.path.realpath(path))
    if not any(map(real.is_relative_to, _own_folders(folder))):
        raise InputError(f"{path}: leads outside the folder; put the file itself there")
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; put it there")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; put the file itself there")
    return path


def _own_folders(folder: Path) -> list[Path]:
    """A folder, and for a snapshot in the Hugging Face cache the blobs beside it, to which its links lead."""
    real = Path(os.path.realpath(folder))
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]


class FilesInMemory:
    """Files by name, as they came over a network.

    Args:
        files: the bytes of each file.
        sender: how messages call whoever sent them.
    """

    def __init__(self, files: Mapping[str, bytes], sender: str) -> None:
        self.files = files
        self.sender = sender

    def has(self, name: str) -> bool:
        return name in self.files

    def place(self, name: str) -> str:
        return f"{self.sender}: {name}"

    def json(self, name: str) -> dict[str, Any]:
        with errors_in(self.place(name)):
            _require_size(len(self._content(name)))
            return object_from(self._content(name))

    def weights(self, name: str = WEIGHTS_FILE) -> Weights:
        place = self.place(name)
        with errors_in(place):
            return SafetensorsFile.of(self._content(name), place)

    def size(self) -> int:
        return sum(len(self.files[name]) for name in UPLOAD_FILES if self.has(name))

    def _content(self, name: str) -> bytes:
        if name not in self.files:
            raise InputError("is missing; send the whole upload")
        return self.files[name]


def _require_size(size: int) -> None:
    if size > _MAX_JSON_BYTES:
        raise InputError(f"larger than {_MAX_JSON_BYTES} bytes; save the adapter again")
