"""Where uploads come from: folders, the Hugging Face hub, and Lightning checkpoints of our own clients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.files import cache_folder
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import (
    WHOLE,
    Adapter,
    Expected,
    PeftConfig,
    adapter_files,
    adapter_from,
    expected_base,
    read_adapter,
)
from sap_lightning.io.context import class_position_of
from sap_lightning.io.factors import NOTHING_BESIDE, Beside, Factors, Shapes
from sap_lightning.io.hub import from_hub, is_hub_id
from sap_lightning.io.manifest import BaseFingerprint, require_base
from sap_lightning.io.prompt import Room, prompt_files, read_prompt
from sap_lightning.io.rules import errors_in
from sap_lightning.io.upload_files import PROMPT_FILE, UPLOAD_FILES, WEIGHTS_FILE, FilesInFolder
from sap_lightning.io.weights import WeightsInMemory


def read_uploads(
    uploads: Sequence[str | Path],
    shapes: Shapes | None = None,
    base_fingerprint: BaseFingerprint = None,
    base_shapes: Shapes | None = None,
    beside: Beside = NOTHING_BESIDE,
    expected: Expected = WHOLE,
    room: Room | None = None,
) -> list[Adapter]:
    """Reads and validates uploads.

    Args:
        uploads: PEFT folders, folders of prompts, hub ids (user/name) of either, or checkpoints (.ckpt) of this
            package's clients.
        shapes: as for `read_adapter`.
        base_fingerprint: as for `read_adapter`.
        base_shapes: without `shapes`: of a base whose layers the adapters may name with a prefix more or less, as PEFT
            does for models with a head; layers that it lacks are left alone if it has others of the same adapter.
        beside: as for `read_adapter`.
        expected: as for `read_adapter`.
        room: of the base's text tower for prompts; where there is none, a prompt is refused.

    Returns:
        The adapters in the order of the uploads.

    Raises:
        InputError: when one is faulty, two are the same, or they are of different bases or kinds.
    """
    found: dict[str, str] = {}
    adapters = []
    for upload in track(uploads, "reading uploads"):
        adapter = _read(upload, shapes, base_fingerprint, beside, expected, room)
        # A alone stays as the common seed drew it until B has moved.
        if adapter.sha256 in found and expected.sent != "A":
            raise InputError(f"{upload}: the same adapter as {found[adapter.sha256]}; give each upload once")
        found[adapter.sha256] = str(upload)
        adapters.append(adapter)
    _require_one_kind(adapters)
    if shapes is None:
        found_shapes = [(one.name, {name: layer.shape for name, layer in one.layers.items()}) for one in adapters]
        _require_one_base(found_shapes)
        for client, layers in found_shapes:
            _require_base(client, layers, base_shapes or {})
    return adapters


def read_folder(folder: Path, expected: Expected = WHOLE) -> Adapter:
    """Reads what `files_of` gave, of whatever base.

    Raises:
        InputError: as `read_adapter` and `read_prompt` do.
    """
    if FilesInFolder(folder).has(PROMPT_FILE):
        return read_prompt(folder)
    return read_adapter(folder, expected=expected)


def files_of(layers: Mapping[str, LoRALayer], base: str, sent: Factors = "AB") -> dict[str, bytes]:
    """The files of an adapter, or of the prompt whose context is the one layer, by name.

    Raises:
        InputError: as `adapter_files` and `prompt_files` do.
    """
    if any(map(class_position_of, layers)):
        return prompt_files(layers)
    return adapter_files(layers, base, sent=sent)


def _read(
    upload: str | Path,
    shapes: Shapes | None,
    base_fingerprint: BaseFingerprint,
    beside: Beside,
    expected: Expected,
    room: Room | None,
) -> Adapter:
    path = Path(upload)
    if path.suffix == ".ckpt" and path.is_file():
        return _read_checkpoint(path, shapes, base_fingerprint)
    if is_hub_id(str(upload)):
        # Into a folder of its own: the hub's cache is made of links, and an upload may not lead outside its folder.
        path = from_hub(str(upload), UPLOAD_FILES, cache_folder() / "uploads" / str(upload).replace("/", "--"))
    if FilesInFolder(path).has(PROMPT_FILE):
        return _read_prompt(path, base_fingerprint, room)
    return read_adapter(path, shapes, base_fingerprint, beside, expected)


def _read_prompt(path: Path, base_fingerprint: BaseFingerprint, room: Room | None) -> Adapter:
    if room is None:
        raise InputError(f"{path}: holds a prompt, which only a CLIP base reads; set --model.base to the one it is for")
    if FilesInFolder(path).has(WEIGHTS_FILE):
        raise InputError(f"{path}: holds {PROMPT_FILE} and {WEIGHTS_FILE}; send one upload a folder")
    return read_prompt(path, room, base_fingerprint)


def _require_one_kind(adapters: Sequence[Adapter]) -> None:
    """Adapters and prompts change different parts of the base; so do prompts with the class's name elsewhere.

    Nor do prompts of more tokens and fewer go together.
    """
    for adapter in adapters:
        first = adapters[0]
        if "prompt" not in (adapter.kind, first.kind):
            continue
        if {*adapter.layers} != {*first.layers}:
            said = ", ".join(f"{one.name!r} of {min(one.layers)}" for one in (first, adapter))
            raise InputError(f"uploads are {said}; merge adapters alone, or prompts with the class's name at one place")
        (length,), (other,) = ([layer.shape[0] for layer in one.layers.values()] for one in (first, adapter))
        if length != other:
            raise InputError(
                f"uploads are prompts of {length} tokens ({first.name!r}) and of {other} ({adapter.name!r}); merge"
                " prompts of one length"
            )


def _read_checkpoint(path: Path, shapes: Shapes | None, base_fingerprint: BaseFingerprint) -> Adapter:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        trained_on = checkpoint["base_fingerprint"]
        settings = checkpoint["hyper_parameters"]
        config = {"peft_type": "LORA", "r": settings["rank"], "lora_alpha": settings["alpha"]}
        tensors = {_peft_key(key): value.detach() for key, value in checkpoint["state_dict"].items() if "lora_" in key}
    except Exception as error:  # torch raises whatever a faulty file leads it to
        raise InputError(f"{path}: no checkpoint of a client of this package; give its upload folder") from error
    if not tensors:
        raise InputError(f"{path}: holds no LoRA factors; give a checkpoint of a client")
    weights, name = WeightsInMemory(tensors, str(path)), path.absolute().parent.name
    with errors_in(path):
        require_base(trained_on, expected_base(base_fingerprint, lambda: weights))
    return adapter_from(weights, PeftConfig(config, str(path)), name, None, shapes)


def _peft_key(key: str) -> str:
    """The key of a checkpoint's tensor as PEFT's adapter files have it."""
    return key.removeprefix("tower.").replace(".default.weight", ".weight")


def _require_base(client: str, layers: Shapes, shapes: Shapes) -> None:
    found = {name: shape for name in layers for layer, shape in shapes.items() if _same_layer(name, layer)}
    if shapes and not found:
        first = next(iter(layers))
        raise InputError(
            f"upload {client!r}: the base has no layer {first}, nor any other of its layers; "
            + (
                f"it has {other}, as another version of transformers calls it: load and save the adapter with PEFT once"
                if (other := _renamed(first, layers[first], shapes))
                else "set --model.base to the base it was trained on"
            )
        )
    for name, shape in found.items():
        if layers[name] != shape:
            raise InputError(
                f"upload {client!r}: {name} is for a weight of shape {layers[name]}, the base has"
                f" {shape}; set --model.base to the base it was trained on"
            )


_BLOCK = re.compile(r"\.\d+\..+")


def _renamed(name: str, shape: tuple[int, ...], shapes: Shapes) -> str | None:
    """A layer of the same block, name in it and shape, which is called otherwise before that."""
    block = _BLOCK.search(name)
    alike = (other for other in shapes if block and other.endswith(block[0]) and shapes[other] == shape)
    return next(alike, None)


def _same_layer(name: str, other: str) -> bool:
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")


def _require_one_base(clients: Iterable[tuple[str, Shapes]]) -> None:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for client, layers in clients:
        for name, own in layers.items():
            shape, first = shapes.setdefault(name, (own, client))
            if shape != own:
                raise InputError(
                    f"upload {client!r}: {name} is for a weight of shape {own}, in {first!r} it is"
                    f" {shape}; they were trained on different bases"
                )
    for name, (_, first) in shapes.items():
        if longer := [other for other in shapes if other.endswith(f".{name}")]:
            raise InputError(
                f"uploads {first!r} and {shapes[longer[0]][1]!r} call one layer {name} and {longer[0]}; save both from"
                " the same class of model, with one version of transformers"
            )
