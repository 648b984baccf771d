"""What a client of a vision–language model sends: LoRA in PEFT's format, and a connector's parameters beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.files import new_folder, write_files
from sap_lightning.fingerprints import hash_tensor
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, adapter_files, read_adapter
from sap_lightning.io.factors import Shapes
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.rules import MAX_FLOAT32, errors_in, short
from sap_lightning.io.upload_files import CONNECTOR_FILE, FilesInFolder
from sap_lightning.io.weights import OpenWeights, readable

CAUSAL_LM = {"task_type": "CAUSAL_LM"}


class InstructionUpload(NamedTuple):
    """What one client has trained for others.

    Attributes:
        layers: of its LoRA, by name in the causal language model.
        connector: parameters by name; nothing of a language model alone.
    """

    layers: Mapping[str, LoRALayer]
    connector: Mapping[str, Tensor]


class ReadUpload(NamedTuple):
    """An upload, checked against the base.

    Attributes:
        adapter: its LoRA and its manifest.
        connector: float32 parameters by name.
        sha256: of both.
        size: bytes of its files.
    """

    adapter: Adapter
    connector: dict[str, Tensor]
    sha256: str
    size: int


def write_instruction_upload(
    folder: Path, upload: InstructionUpload, base: str, manifest: Manifest | None = None
) -> Path:
    """Writes an upload, or without a manifest a model that was tuned; equal ones give equal bytes.

    Raises:
        InputError: the folder exists or cannot be written, or a number is not finite.
    """
    with errors_in(folder):
        _require_finite(upload.connector)
    files = adapter_files(upload.layers, base, manifest, CAUSAL_LM)
    if upload.connector:
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in upload.connector.items()}
        files[CONNECTOR_FILE] = safetensors.torch.save(tensors)
    with new_folder(folder) as staging, errors_in(folder):
        write_files(staging, files)
    return folder


def read_instruction_upload(
    folder: Path, shapes: Shapes, base_fingerprint: str, connector: Mapping[str, Sequence[int]]
) -> ReadUpload:
    """Reads an upload, whole or not at all. Nothing is unpickled.

    Args:
        folder: the upload.
        shapes: of the language model's linear layers.
        base_fingerprint: the base's.
        connector: shapes of the connector's parameters by name; empty for a language model alone.

    Raises:
        InputError: as `read_adapter` does; or the connector is missing or not the manifest's, or a tensor of it is
            unknown, missing, not finite or of another shape or dtype.
    """
    adapter = read_adapter(folder, shapes, base_fingerprint)
    if adapter.manifest is None:
        raise InputError(f"{folder}: has no manifest.json, which says of what task and round it is; send it whole")
    tensors = _read_connector(folder, connector)
    _require_connector(folder, adapter.manifest, tensors)
    digest = sha256(f"{adapter.sha256}{adapter.manifest.connector_sha256}".encode()).hexdigest()
    return ReadUpload(adapter, tensors, digest, FilesInFolder(folder).size())


def connector_sha256(connector: Mapping[str, Tensor]) -> str:
    """A digest of a connector's parameters; nothing of none."""
    digest = sha256()
    for name, tensor in sorted(connector.items()):
        hash_tensor(digest, name, tensor)
    return digest.hexdigest() if connector else ""


def read_tuned(folder: Path, shapes: Shapes, connector: Mapping[str, Sequence[int]]) -> InstructionUpload:
    """Reads a model that was tuned, or an upload of whatever base; takes what `read_instruction_upload` does.

    Raises:
        InputError: as that does.
    """
    adapter, tensors = read_adapter(folder, shapes), _read_connector(folder, connector)
    if adapter.manifest:
        _require_connector(folder, adapter.manifest, tensors)
    return InstructionUpload(adapter.layers, tensors)


def _require_connector(folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError when the connector is not the manifest's."""
    if manifest.connector_sha256 != (own := connector_sha256(tensors)):
        raise InputError(
            f"{folder}: connector_sha256 is {manifest.connector_sha256 or 'not said'}, that of the connector"
            f" {own or 'that is not there'}; the files have changed since they were written, upload them again"
        )


def _read_connector(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    files = FilesInFolder(folder)
    if files.has(CONNECTOR_FILE) != bool(shapes):
        words = "has no" if shapes else "has a"
        raise InputError(f"{folder}: {words} {CONNECTOR_FILE}, unlike the base; train the client on this base")
    if not shapes:
        return {}
    with files.weights(CONNECTOR_FILE).opened() as stored:
        return _connector_in(stored, shapes)


def _connector_in(stored: OpenWeights, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    if stored.keys() != shapes.keys():
        (name,) = sorted(stored.keys() ^ shapes.keys())[:1]
        words = "is missing" if name in shapes else "is no part of the connector"
        raise InputError(f"{short(name)} {words}; a client sends the parameters of its task's connector and no others")
    for name, shape in shapes.items():
        found = readable(stored, name).shape
        if tuple(found) != tuple(shape):
            raise InputError(f"{name} has shape {tuple(found)}, expected {tuple(shape)}; train on this base")
    tensors = {name: stored.tensor(name).float() for name in shapes}
    _require_finite(tensors)
    return tensors


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"connector: {name} has NaN or Inf; train with a lower learning rate")
        if not tensor.double().norm() < MAX_FLOAT32:
            raise InputError(f"connector: {name} overflows float32; train with a lower learning rate")
