"""Learned prompts in and out of files: what a prompt client uploads, and what the server dares to average.

An upload is a folder with `prompt.safetensors`, which holds the context alone, and an optional `manifest.json`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.files import new_folder, write_files
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, manifest_in, require_agreement, sha256_of
from sap_lightning.io.context import as_layer, class_position_of
from sap_lightning.io.manifest import BaseFingerprint, Manifest, manifest_bytes, require_base
from sap_lightning.io.peft_config import public_name
from sap_lightning.io.rules import MAX_FLOAT32, RANK, errors_in, require, short
from sap_lightning.io.upload_files import MANIFEST_FILE, PROMPT_FILE, FilesInFolder
from sap_lightning.io.weights import OpenWeights, readable

PARTS = ("context",)
"""What a prompt's manifest says was sent."""


class Room(NamedTuple):
    """What a text tower has room for.

    Attributes:
        width: numbers in a token's embedding.
        longest: the most tokens that a context may have.
    """

    width: int
    longest: int


def read_prompt(
    folder: str | os.PathLike[str], room: Room | None = None, base_fingerprint: BaseFingerprint = None
) -> Adapter:
    """Read an upload of a prompt from its folder, whole or not at all. Nothing is unpickled.

    Args:
        folder: the upload.
        room: of the base's text tower; a prompt may be for any if not given.
        base_fingerprint: of both towers of the base; compared with the manifest's, if there is one.

    Returns:
        The prompt as an adapter of one layer, the context in factor form, so that it is merged as adapters are.

    Raises:
        InputError: a file is missing, malformed or outside the folder; the prompt is for another base; there is a
            tensor beside the context, or the context is not finite or of a wrong shape or dtype; the manifest's hash is
            not that of the context, or the two contradict each other.
    """
    folder = Path(folder)
    try:
        return _read(FilesInFolder(folder), folder.absolute().name, room, base_fingerprint)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check the files") from None


def _read(files: FilesInFolder, name: str, room: Room | None, base_fingerprint: BaseFingerprint) -> Adapter:
    manifest = manifest_in(files)
    with files.weights(PROMPT_FILE).opened() as tensors:
        layers = _context_in(tensors, room)
    adapter = Adapter(
        manifest.domain if manifest else name,
        layers,
        sha256_of(layers),
        manifest,
        base=public_name(manifest.base) if manifest else "",
        size=files.size(),
    )
    if manifest:
        expected = base_fingerprint(layers) if callable(base_fingerprint) else base_fingerprint
        with errors_in(files.place(MANIFEST_FILE)):
            require_base(manifest.base_fingerprint, expected, manifest.base)
            _require_kind(manifest)
            require_agreement(manifest, adapter)
    return adapter


def _require_kind(manifest: Manifest) -> None:
    """Raises InputError when a client says that it has sent something else."""
    for name, expected in (("kind", "prompt"), ("parts", PARTS)):
        if (said := getattr(manifest, name)) != expected:
            raise InputError(f"{name} is {short(said)}, expected {short(expected)}; upload the prompt again")


def _context_in(tensors: OpenWeights, room: Room | None) -> dict[str, LoRALayer]:
    """The one layer that a weights file of a prompt holds."""
    keys = sorted(tensors.keys())
    if others := [key for key in keys if class_position_of(key) is None]:
        raise InputError(f"{short(others[0])} is no context of class prompts; send that alone")
    if len(keys) != 1:
        raise InputError(f"holds {len(keys)} contexts, expected one; send one prompt a folder")
    key = keys[0]
    shape = readable(tensors, key).shape
    if len(shape) == 3:
        raise InputError(
            f"{key} has shape {shape}, a context for each class; those say nothing of other classes, and are not"
            " averaged: train one context for all"
        )
    _require_shape(key, shape, room)
    context = tensors.tensor(key).to(torch.float32, copy=True)
    _require_finite(key, context)
    return {key: as_layer(context)}


def _require_shape(key: str, shape: tuple[int, ...], room: Room | None) -> None:
    if len(shape) != 2 or 0 in shape or (room and shape[1] != room.width):
        width = room.width if room else "width"
        raise InputError(f"{key} has shape {shape}, expected (tokens, {width}); train the prompt on this base")
    require(f"tokens of {key}", shape[0], RANK)
    if room and shape[0] > room.longest:
        raise InputError(
            f"{key} has {shape[0]} tokens, beside which the text tower has room for a class's name up to"
            f" {room.longest}; train a shorter one"
        )


def _require_finite(key: str, context: Tensor) -> None:
    if not context.isfinite().all():
        raise InputError(f"{key} has NaN or Inf; train with a lower learning rate")
    if not context.double().norm() < MAX_FLOAT32:
        raise InputError(f"{key} overflows float32; train with a lower learning rate")


def write_prompt(
    folder: str | os.PathLike[str], layers: Mapping[str, LoRALayer], manifest: Manifest | None = None
) -> Path:
    """Write a prompt; equal ones give equal bytes.

    Args:
        folder: must not exist; it appears complete or not at all.
        layers: the context in factor form, by its layer's name.
        manifest: makes the folder an upload.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists or cannot be written, or `prompt_files` refuses these.
    """
    folder = Path(folder)
    with new_folder(folder) as staging, errors_in(folder):
        write_files(staging, prompt_files(layers, manifest))
    return folder


def prompt_files(layers: Mapping[str, LoRALayer], manifest: Manifest | None = None) -> dict[str, bytes]:
    """The files of a prompt's folder by name, see `write_prompt`.

    Raises:
        InputError: the context is not finite, or the manifest is for another.
    """
    contexts = {name: layer.delta().contiguous() for name, layer in layers.items()}
    for name, context in contexts.items():
        _require_finite(name, context)
    files = {PROMPT_FILE: safetensors.torch.save(contexts)}
    if manifest:
        if manifest.tensors_sha256 != sha256_of(layers):
            raise InputError("the manifest's tensors_sha256 is for another context; use sha256_of(layers)")
        files[MANIFEST_FILE] = manifest_bytes(manifest)
    return files
