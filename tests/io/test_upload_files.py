"""An upload read from the bytes of its files is the one read from its folder, and is refused for the same reasons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import adapter_files, adapter_from_bytes, read_adapter, sha256_of
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.peft_config import CONFIG_FILE
from sap_lightning.io.upload_files import MANIFEST_FILE, WEIGHTS_FILE

SHAPES = {"encoder.q_proj": (6, 4), "encoder.fc1": (8, 4)}
BASE = "ab" * 32
Q_A = "base_model.model.encoder.q_proj.lora_A.weight"
Files = dict[str, bytes]


@pytest.fixture
def files() -> Files:
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoRALayer(torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator), 4.0)
        for name, (d_out, d_in) in SHAPES.items()
    }
    sha256 = sha256_of(layers)
    manifest = Manifest("base", BASE, "photo", ("cat", "dog"), 10, 2, 8.0, ("q_proj", "fc1"), 0, {}, sha256)
    return adapter_files(layers, "base", manifest)


def in_folder(files: Files, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Files], Files]:
    def changed(files: Files) -> Files:
        tensors = load(files[WEIGHTS_FILE])
        change(tensors)
        return files | {WEIGHTS_FILE: save(tensors)}

    return changed


def with_json(file: str, **fields: Any) -> Callable[[Files], Files]:
    return lambda files: files | {file: json.dumps(json.loads(files[file]) | fields).encode()}


def test_bytes_and_folder_give_the_same_adapter(files, tmp_path):
    sent = adapter_from_bytes(files, "client 7", SHAPES, BASE)
    kept = read_adapter(in_folder(files, tmp_path / "upload"), SHAPES, BASE)
    assert sent == kept and (sent.name, sent.manifest, sent.peft) == (kept.name, kept.manifest, kept.peft)
    for name in SHAPES:
        assert torch.equal(sent.layers[name].delta(), kept.layers[name].delta())
    assert sent.name == "photo"


def test_without_a_manifest_the_sender_names_the_adapter(files):
    del files[MANIFEST_FILE]
    assert adapter_from_bytes(files, "client 7", SHAPES).name == "client 7"


def test_files_that_are_no_part_of_an_upload_are_not_looked_at(files):
    more = files | {"training_args.bin": b"a pickle", "README.md": b"\xff"}
    assert adapter_from_bytes(more, "client 7") == adapter_from_bytes(files, "client 7")


@pytest.mark.parametrize(
    ("change", "file", "reason"),
    [
        (with_tensors(lambda t: t.update({Q_A: t[Q_A] * torch.nan})), WEIGHTS_FILE, "lora_A has NaN or Inf"),
        (with_tensors(lambda t: t.pop(Q_A)), WEIGHTS_FILE, "encoder.q_proj has no lora_A"),
        (with_tensors(lambda t: t.update({Q_A: t[Q_A][:, :3].clone()})), WEIGHTS_FILE, r"has shape \(2, 3\), expected"),
        (with_tensors(lambda t: t.update({Q_A: t[Q_A].double()})), WEIGHTS_FILE, "has dtype"),
        (with_tensors(lambda t: t.update({"head.weight": t[Q_A].clone()})), WEIGHTS_FILE, "'head.weight' is no LoRA"),
        (with_tensors(dict.clear), WEIGHTS_FILE, "no tensors"),
        (with_tensors(lambda t: t.update({Q_A: 2 * t[Q_A]})), MANIFEST_FILE, "tensors_sha256 is"),
        (lambda files: files | {WEIGHTS_FILE: b"junk"}, WEIGHTS_FILE, "not safetensors"),
        (lambda files: files | {WEIGHTS_FILE: files[WEIGHTS_FILE][:-9]}, WEIGHTS_FILE, "not safetensors"),
        (lambda files: files | {CONFIG_FILE: b"{"}, CONFIG_FILE, "not valid JSON"),
        (lambda files: files | {CONFIG_FILE: b"[]"}, CONFIG_FILE, "the file is .*, expected an object"),
        (lambda files: files | {CONFIG_FILE: b" " * (2**20 + 1)}, CONFIG_FILE, "larger than 1048576 bytes"),
        (with_json(CONFIG_FILE, r=5000), CONFIG_FILE, "r is 5000, expected an integer from 1 to 4096"),
        (with_json(CONFIG_FILE, use_dora=True), CONFIG_FILE, "only plain LoRA"),
        (with_json(MANIFEST_FILE, domain="../out"), MANIFEST_FILE, "domain is"),
        (with_json(MANIFEST_FILE, num_samples=11), MANIFEST_FILE, "fields_sha256 is not that of the other fields"),
        (with_json(MANIFEST_FILE, domain="sketch", fields_sha256=None), MANIFEST_FILE, "fields_sha256 is not"),
    ],
)
def test_bytes_and_folder_are_refused_for_the_same_reason(files, tmp_path, change, file, reason):
    faulty = change(files)
    with pytest.raises(InputError, match=reason) as of_bytes:
        adapter_from_bytes(faulty, "client 7", SHAPES, BASE)
    folder = in_folder(faulty, tmp_path / "upload")
    with pytest.raises(InputError, match=reason) as of_folder:
        read_adapter(folder, SHAPES, BASE)
    assert str(of_bytes.value).startswith(f"client 7: {file}: ")
    assert str(of_folder.value).startswith(f"{folder / file}: ")


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_file_that_was_not_sent_is_named(files, file):
    del files[file]
    with pytest.raises(InputError, match=f"client 7: {file}: is missing; send the whole upload"):
        adapter_from_bytes(files, "client 7")
