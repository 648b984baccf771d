"""LoRA adapters in and out of PEFT's format: what a client uploads, and what the server dares to merge.

An upload is a folder with `adapter_model.safetensors`, `adapter_config.json` and an optional `manifest.json`, or the
bytes of these files. PEFT loads it as it is, and any LoRA folder that PEFT saved for the same base is an upload.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from sap_lightning.errors import InputError
from sap_lightning.files import new_folder, write_files
from sap_lightning.fingerprints import hash_tensor
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.rescaling import length_of
from sap_lightning.io.context import class_position_of
from sap_lightning.io.factors import (
    NOTHING_BESIDE,
    Beside,
    Factors,
    Shapes,
    StoredLayers,
    factor_tensors,
    require_finite,
    weights_bytes,
)
from sap_lightning.io.manifest import (
    FACTORS,
    BaseFingerprint,
    Kind,
    Manifest,
    base_with,
    manifest_bytes,
    manifest_from,
    require_base,
)
from sap_lightning.io.peft_config import (
    CONFIG_FILE,
    MAX_PATTERNS,
    alpha_of,
    base_name,
    clip_fields,
    model_fields,
    peft_config,
    public_name,
    require_plain_lora,
    require_targets,
    scaling_from,
)
from sap_lightning.io.rules import RANK, errors_in, json_bytes, require, short
from sap_lightning.io.upload_files import MANIFEST_FILE, WEIGHTS_FILE, FilesInFolder, FilesInMemory, UploadFiles
from sap_lightning.io.weights import CompletedWeights, Weights


@dataclass(frozen=True)
class Adapter:
    """One client's LoRA, or its prompt, checked against the base. Two adapters are equal when their sha256 are.

    Attributes:
        name: the manifest's domain, else the folder's name.
        layers: float32 factors and scale by layer name, sorted by name; what comes from disk is read again whenever
            it is looked at, so that a thousand adapters take the memory of one layer.
        sha256: `sha256_of` the layers: the same for the same update, however its files are laid out.
        manifest: None for a plain PEFT folder.
        peft: what PEFT's config says of the model that the layers belong to.
        base: name of the base that it says it was trained on; empty where it does not.
        dropped: layers that were trained whole, and are left out.
        doubts: what speaks against it, in words.
        size: bytes of its files; 0 for a checkpoint, which is not sent.
    """

    name: str = field(compare=False)
    layers: Mapping[str, LoRALayer] = field(compare=False, repr=False)
    sha256: str
    manifest: Manifest | None = field(default=None, compare=False)
    peft: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    base: str = field(default="", compare=False)
    dropped: Sequence[str] = field(default=(), compare=False)
    doubts: Sequence[str] = field(default=(), compare=False)
    size: int = field(default=0, compare=False)

    @cached_property
    def length(self) -> float:
        """Frobenius norm of ΔW over all layers, for which they are read once."""
        return length_of(self.layers)

    @property
    def kind(self) -> Kind:
        """What was trained: a LoRA, or a prompt, whose one layer is its context."""
        return "prompt" if any(map(class_position_of, self.layers)) else "lora"

    @property
    def num_samples(self) -> int | None:
        """Number of training images, None if the upload does not say."""
        return self.manifest.num_samples if self.manifest else None


class Expected(NamedTuple):
    """What an upload is expected to be, beside an adapter of the base.

    Attributes:
        sent: which of A and B are in it.
        known: the adapter whose other factor both sides have.
        folded: digests of the updates that the base had been given before it was trained.
    """

    sent: Factors = "AB"
    known: Mapping[str, LoRALayer] = {}
    folded: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What the manifest calls that which is sent."""
        return tuple(part for part in FACTORS if part[-1] in self.sent)

    def completed(self, weights: Weights) -> Weights:
        """The weights of a whole adapter."""
        if self.sent == "AB":
            return weights
        return CompletedWeights(weights, factor_tensors(self.known, "B" if self.sent == "A" else "A"))


WHOLE = Expected()
"""A whole adapter of the base as it is."""


def sha256_of(layers: Mapping[str, LoRALayer]) -> str:
    """sha256 over the sorted names, scales and float32 factors of an adapter."""
    digest = sha256()
    for name, layer in sorted(layers.items()):
        # A file states α, not s, and α / r may differ from s in the last bit.
        digest.update(f"{name}\0{(alpha_of(layer) / layer.rank).hex()}\0".encode())
        hash_tensor(digest, "A", layer.A)
        hash_tensor(digest, "B", layer.B)
    return digest.hexdigest()


def read_adapter(
    folder: str | os.PathLike[str],
    shapes: Shapes | None = None,
    base_fingerprint: BaseFingerprint = None,
    beside: Beside = NOTHING_BESIDE,
    expected: Expected = WHOLE,
) -> Adapter:
    """Read an upload from its folder, whole or not at all. Nothing is unpickled.

    Args:
        folder: the upload.
        shapes: `layer_shapes` of the base's vision tower, or of both towers; if not given, the adapter may be of any
            model, and its layers keep the names that PEFT gave them.
        base_fingerprint: the base's; compared with the manifest's, if there is one.
        beside: what may stand beside the LoRA factors.
        expected: what else it must be.

    Raises:
        InputError: a file is missing, malformed or outside the folder; the adapter is for another base or of
            a kind other than ΔW = s·B·A; a tensor is unknown, missing, not finite or of a wrong shape or
            dtype; the manifest's hash is not that of the tensors, or manifest, config and tensors contradict
            each other.
    """
    folder = Path(folder)
    try:
        return _read(FilesInFolder(folder), folder.absolute().name, shapes, base_fingerprint, beside, expected)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check the files") from None


def adapter_from_bytes(
    files: Mapping[str, bytes],
    sender: str,
    shapes: Shapes | None = None,
    base_fingerprint: BaseFingerprint = None,
    expected: Expected = WHOLE,
) -> Adapter:
    """Read an upload from the bytes of its files, as `adapter_files` gives them. Nothing is unpickled.

    Args:
        files: by name; others than the three of an upload are not looked at.
        sender: names the adapter where no manifest does, and is what messages call it.
        shapes: as for `read_adapter`.
        base_fingerprint: as for `read_adapter`.
        expected: as for `read_adapter`.

    Raises:
        InputError: as `read_adapter` does.
    """
    return _read(FilesInMemory(files, sender), sender, shapes, base_fingerprint, expected=expected)


def _read(
    files: UploadFiles,
    name: str,
    shapes: Shapes | None,
    base_fingerprint: BaseFingerprint,
    beside: Beside = NOTHING_BESIDE,
    expected: Expected = WHOLE,
) -> Adapter:
    manifest = manifest_in(files)
    if manifest:
        base = expected_base(base_fingerprint, files.weights)
        with errors_in(files.place(MANIFEST_FILE)):
            require_base(manifest.base_fingerprint, base and base_with(base, expected.folded), manifest.base)
            _require_parts(manifest, expected)
    config = PeftConfig(files.json(CONFIG_FILE), files.place(CONFIG_FILE))
    weights = expected.completed(files.weights())
    adapter = adapter_from(weights, config, name, manifest, shapes, beside, files.size())
    if manifest:
        with errors_in(files.place(MANIFEST_FILE)):
            require_agreement(manifest, adapter)
    return adapter


def _require_parts(manifest: Manifest, expected: Expected) -> None:
    """Raises InputError when a client says that it has sent something else."""
    if manifest.kind != "lora":
        raise InputError(f"kind is {manifest.kind!r}, expected 'lora'; an adapter is needed here")
    if manifest.parts != expected.parts:
        raise InputError(
            f"parts are {short(manifest.parts)}, expected {short(expected.parts)}; upload what is asked for"
        )


def require_agreement(manifest: Manifest, adapter: Adapter) -> None:
    """Raises InputError when a manifest says what is not so."""
    if manifest.tensors_sha256 != adapter.sha256:
        raise InputError(
            f"tensors_sha256 is {manifest.tensors_sha256}, the tensors and scales give {adapter.sha256}; the files have"
            " changed since they were written, upload them again"
        )
    if manifest.layers and sorted(manifest.layers) != list(adapter.layers):
        raise InputError("layers are not those of which there are weights; upload the adapter again")
    layers = adapter.layers.values()
    if (manifest.rank, manifest.alpha) not in {(layer.rank, alpha_of(layer)) for layer in layers}:
        raise InputError(f"no layer is of rank {manifest.rank} and alpha {manifest.alpha:g}; upload the adapter again")
    missing = require_targets({"target_modules": list(manifest.targets)}, adapter.layers)
    if missing and not manifest.layers:
        raise InputError(f"targets name {missing[0]!r}, of which there are no weights; upload the whole adapter again")


def manifest_in(files: UploadFiles) -> Manifest | None:
    """What a client says of its upload, if it does.

    Raises:
        InputError: the manifest is malformed.
    """
    if not files.has(MANIFEST_FILE):
        return None
    content = files.json(MANIFEST_FILE)
    with errors_in(files.place(MANIFEST_FILE)):
        return manifest_from(content)


def expected_base(base_fingerprint: BaseFingerprint, weights: Callable[[], Weights]) -> str | None:
    """The base's fingerprint for what these weights adapt; None where any base is right."""
    if not callable(base_fingerprint):
        return base_fingerprint
    with weights().opened() as tensors:
        return base_fingerprint(tensors.keys())


class PeftConfig(NamedTuple):
    """The object in adapter_config.json, or what stands for it, and what messages call its place."""

    content: dict[str, Any]
    place: str


def adapter_from(
    weights: Weights,
    config: PeftConfig,
    name: str,
    manifest: Manifest | None,
    shapes: Shapes | None,
    beside: Beside = NOTHING_BESIDE,
    size: int = 0,
) -> Adapter:
    """The adapter that tensors and PEFT's config make: every check on them, wherever they come from.

    Args:
        weights: the factors under PEFT's keys.
        config: rank, α and whatever else PEFT says.
        name: of the adapter where there is no manifest.
        manifest: what the client says of it.
        shapes: as for `read_adapter`.
        beside: as for `read_adapter`.
        size: bytes of its files.

    Raises:
        InputError: as `read_adapter` does.
    """
    with errors_in(config.place):
        require_plain_lora(config.content, beside.heads)
        scaling = scaling_from(config.content, MAX_PATTERNS if shapes is None else len(shapes))
    layers = StoredLayers(weights, scaling, shapes, beside)
    with errors_in(config.place):
        missing = require_targets(config.content, layers)
    return Adapter(
        manifest.domain if manifest else name,
        layers,
        sha256_of(layers),
        manifest,
        model_fields(config.content),
        base=public_name(manifest.base) if manifest else base_name(config.content),
        dropped=layers.dropped,
        doubts=[f"its config names {short(target)}, of which it has no layer" for target in missing],
        size=size,
    )


def write_adapter(
    folder: str | os.PathLike[str],
    layers: Mapping[str, LoRALayer],
    base: str,
    manifest: Manifest | None = None,
    peft: Mapping[str, Any] | None = None,
    sent: Factors = "AB",
) -> Path:
    """Write an adapter that `PeftModel.from_pretrained(CLIPVisionModelWithProjection, folder)` loads.

    One that changes the text tower too is for a `CLIPModel`.

    Equal adapters give equal bytes. Factors become float32; ranks and scales may differ between layers.

    Args:
        folder: must not exist; it appears complete or not at all.
        layers: factors by the layer's name in `CLIPModel`, of which `CLIPVisionModelWithProjection` has a part.
        base: name or path of the base checkpoint, for PEFT's `base_model_name_or_path`.
        manifest: makes the folder an upload.
        peft: what PEFT's config is to say of the model; one of these two if not given.
        sent: which of A and B are written; PEFT loads both together alone.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists or cannot be written, the adapter is empty or not finite, or the
            manifest is for other layers.
    """
    folder = Path(folder)
    with new_folder(folder) as staging, errors_in(folder):
        write_files(staging, adapter_files(layers, base, manifest, peft, sent))
    return folder


def adapter_files(
    layers: Mapping[str, LoRALayer],
    base: str,
    manifest: Manifest | None = None,
    peft: Mapping[str, Any] | None = None,
    sent: Factors = "AB",
) -> dict[str, bytes]:
    """The files of an adapter folder by name, see `write_adapter`.

    Raises:
        InputError: the adapter is empty or not finite, or the manifest is for other layers.
    """
    if not layers:
        raise InputError("the adapter has no layers; nothing to write")
    for name, layer in layers.items():
        require(f"rank of {name}", layer.rank, RANK)
        require_finite(name, layer)
    if manifest and manifest.tensors_sha256 != sha256_of(layers):
        raise InputError("the manifest's tensors_sha256 is for other layers; use sha256_of(layers)")
    files = {
        WEIGHTS_FILE: weights_bytes(layers, sent),
        CONFIG_FILE: json_bytes(peft_config(layers, base) | dict(clip_fields(layers) if peft is None else peft)),
    }
    if manifest:
        files[MANIFEST_FILE] = manifest_bytes(manifest)
    return files
