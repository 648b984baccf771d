"""What a client of a vision–language model sends, and what is refused of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import sha256_of
from sap_lightning.io.instruction_upload import (
    InstructionUpload,
    connector_sha256,
    read_instruction_upload,
    write_instruction_upload,
)
from sap_lightning.io.manifest import Manifest

NAME = "model.layers.0.self_attn.q_proj"
SHAPES = {NAME: (6, 4)}
CONNECTOR = {"linear_1.weight": (4, 3), "linear_1.bias": (4,)}
FINGERPRINT = "0" * 64


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    layers = {NAME: LoRALayer(torch.randn(2, 4, generator=draw), torch.randn(6, 2, generator=draw), 2.0)}
    connector = {name: torch.randn(shape, generator=draw) for name, shape in CONNECTOR.items()}
    manifest = Manifest(
        base="base", base_fingerprint=FINGERPRINT, domain="vqa_a", class_names=(), num_samples=6, rank=2, alpha=4.0,
        targets=("q_proj",), seed=0, packages={}, tensors_sha256=sha256_of(layers), format_version=2, round=1,
        task="vqa", connector_sha256=connector_sha256(connector),
    )  # fmt: skip
    return write_instruction_upload(tmp_path / "vqa_a", InstructionUpload(layers, connector), "base", manifest)


def read(folder: Path, **changed: Any) -> Any:
    return read_instruction_upload(
        folder, **{"shapes": SHAPES, "base_fingerprint": FINGERPRINT, "connector": CONNECTOR, **changed}
    )


def test_what_is_written_is_read(upload):
    found = read(upload)
    stored = safetensors.torch.load_file(upload / "connector.safetensors")
    assert found.connector.keys() == CONNECTOR.keys()
    assert all(torch.equal(found.connector[name], value) for name, value in stored.items())
    assert found.adapter.manifest.task == "vqa" and found.adapter.num_samples == 6
    assert found.size == sum(file.stat().st_size for file in upload.iterdir())


def test_it_holds_nothing_else(upload):
    assert {file.name for file in upload.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "connector.safetensors", "manifest.json",
    }  # fmt: skip
    assert json.loads((upload / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_digest_is_of_both_parts(upload, tmp_path):
    found = read(upload)
    other = {name: tensor + 1 for name, tensor in found.connector.items()}
    manifest = replace(found.adapter.manifest, connector_sha256=connector_sha256(other))
    again = InstructionUpload(found.adapter.layers, other)
    assert read(write_instruction_upload(tmp_path / "other", again, "base", manifest)).sha256 != found.sha256


@pytest.mark.parametrize("change", [lambda tensor: 5 * tensor, lambda tensor: tensor.half()])
def test_a_connector_that_has_changed_since_is_refused(upload, change):
    tensors = safetensors.torch.load_file(upload / "connector.safetensors")
    tensors["linear_1.bias"] = change(tensors["linear_1.bias"])
    (upload / "connector.safetensors").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(
        InputError, match=r"vqa_a: connector_sha256 is \w{64}, that of the connector \w{64}; the files have changed"
    ):
        read(upload)


def test_a_manifest_that_says_nothing_of_the_connector_is_refused(upload, tmp_path):
    found = read(upload)
    again, silent = (
        InstructionUpload(found.adapter.layers, found.connector),
        replace(found.adapter.manifest, connector_sha256=""),
    )
    with pytest.raises(InputError, match="connector_sha256 is not said"):
        read(write_instruction_upload(tmp_path / "silent", again, "base", silent))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"own.0.weight": torch.zeros(2)}, "'own.0.weight' is no part of the connector"),
        ({"linear_1.bias": None}, "'linear_1.bias' is missing"),
        ({"linear_1.bias": torch.zeros(5)}, r"linear_1.bias has shape \(5,\), expected \(4,\)"),
        ({"linear_1.bias": torch.full((4,), torch.nan)}, "linear_1.bias has NaN or Inf"),
        ({"linear_1.bias": torch.full((4,), 3e38)}, "linear_1.bias overflows float32"),
        ({"linear_1.bias": torch.zeros(4, dtype=torch.int32)}, "linear_1.bias has dtype I32"),
    ],
)
def test_a_faulty_connector_is_refused(upload, changed, message):
    tensors: dict[str, Any] = {**safetensors.torch.load_file(upload / "connector.safetensors"), **changed}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (upload / "connector.safetensors").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(InputError, match=message):
        read(upload)


def test_a_connector_that_is_missing_or_too_many_is_refused(upload):
    with pytest.raises(InputError, match=r"has a connector.safetensors, unlike the base"):
        read(upload, connector={})
    (upload / "connector.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no connector.safetensors, unlike the base"):
        read(upload)
    with pytest.raises(InputError, match="that of the connector that is not there; the files have changed"):
        read(upload, connector={})


def test_a_manifest_is_needed(upload):
    (upload / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest.json"):
        read(upload)


def test_another_base_is_refused(upload):
    with pytest.raises(InputError, match="base_fingerprint"):
        read(upload, base_fingerprint="1" * 64)


def test_what_is_not_finite_is_not_written(tmp_path, upload):
    found = read(upload)
    bad = InstructionUpload(dict(found.adapter.layers), {"linear_1.bias": torch.full((4,), torch.inf)})
    with pytest.raises(InputError, match="NaN or Inf"):
        write_instruction_upload(tmp_path / "bad", bad, "base", found.adapter.manifest)
    assert not (tmp_path / "bad").exists()
