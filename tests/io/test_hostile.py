"""Seeded mutations of an upload: none is wrongly accepted, ends in a traceback or takes the server's time.

make fuzz tries ten thousand.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, adapter_files, adapter_from_bytes, sha256_of
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.peft_config import CONFIG_FILE
from sap_lightning.io.upload_files import MANIFEST_FILE, WEIGHTS_FILE

MUTATIONS = int(os.environ.get("SAP_LIGHTNING_FUZZ", "500"))
MOST_SECONDS = 1.0
BASE = "ab" * 32
SHAPES = {f"vision_model.encoder.layers.{k}.{name}": (8, 8) for k in range(3) for name in ("q_proj", "v_proj")}
Files = dict[str, bytes]
VALUES: list[Any] = [
    None, True, 0, -1, 1, 7, 2**63, 10**400, 0.5, -0.0, 1e30, 1e308,
    "", "x", "../x", "a\nb", "\u202e", "\ud800", "x" * 10**5,
    [], [[]], [None] * 5000, {}, {"": ""}, {"a": {"b": {}}}, {"q_proj": 2}, {".*.*": 2}, {"(a|b)*": 2}, {"[": 1},
]  # fmt: skip


def upload() -> Files:
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoRALayer(torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator), 2.0)
        for name in SHAPES
    }
    manifest = Manifest(
        "base", BASE, "photo", ("cat", "dog"), 10, 2, 4.0, ("q_proj", "v_proj"), 0, {}, sha256_of(layers)
    )
    return adapter_files(layers, "org/base", manifest)


def bytes_changed(files: Files, dice: random.Random) -> None:
    name = dice.choice(list(files))
    content = bytearray(files[name])
    # Most bytes are tensors, whose hash is easily checked; the header and the JSON deserve most of the blows.
    start = dice.randrange(min(len(content), 600) if dice.random() < 0.8 else len(content))
    match dice.choice(["bit", "bytes", "end", "middle", "twice"]):
        case "bit":
            content[start] ^= 1 << dice.randrange(8)
        case "bytes":
            for _ in range(8):
                content[dice.randrange(len(content))] = dice.randrange(256)
        case "end":
            del content[start:]
        case "middle":
            del content[start : start + dice.randrange(1, 64)]
        case "twice":
            content[start:start] = content[start : start + dice.randrange(1, 200)]
    files[name] = bytes(content)


def field_changed(files: Files, dice: random.Random) -> None:
    name = dice.choice([CONFIG_FILE, MANIFEST_FILE])
    content = json.loads(files[name])
    key = dice.choice([*content, "new", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"])
    match dice.choice(["value", "gone", "twice", "swapped"]):
        case "value":
            content[key] = dice.choice(VALUES)
        case "gone":
            content.pop(key, None)
        case "twice":
            text = json.dumps(content)
            files[name] = (text[:-1] + f", {json.dumps(key)}: {json.dumps(dice.choice(VALUES))}}}").encode()
            return
        case "swapped":
            other = dice.choice(list(content))
            content[key], content[other] = content[other], content.get(key)
    files[name] = json.dumps(content).encode()


def tensors_changed(files: Files, dice: random.Random) -> None:
    tensors = load(files[WEIGHTS_FILE])
    key, other = dice.sample(sorted(tensors), 2)
    match dice.choice(["value", "scale", "gone", "swapped", "renamed", "dtype", "shape", "added", "metadata"]):
        case "value":
            tensors[key].view(-1)[dice.randrange(tensors[key].numel())] = dice.choice([0.0, 1e-40, 1e38, torch.nan])
        case "scale":
            tensors[key] = tensors[key] * dice.choice([0.0, -1.0, 1 + 2**-23, 1e20])
        case "gone":
            del tensors[key]
        case "swapped":
            tensors[key], tensors[other] = tensors[other], tensors[key]
        case "renamed":
            tensors[dice.choice([other + ".x", key.upper(), key.replace("lora_A", "lora_B"), "x"])] = tensors.pop(key)
        case "dtype":
            tensors[key] = tensors[key].to(dice.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8]))
        case "shape":
            tensors[key] = dice.choice([tensors[key].T.contiguous(), tensors[key].flatten(), tensors[key][:1]])
        case "added":
            tensors[dice.choice(["base_model.model.head.weight", "step", key + ".absmax"])] = torch.ones(2)
        case "metadata":
            files[WEIGHTS_FILE] = save(tensors, {str(k): "" for k in range(dice.choice([10, 20_000]))})
            return
    files[WEIGHTS_FILE] = save({name: tensor.clone() for name, tensor in tensors.items()})


def file_changed(files: Files, dice: random.Random) -> None:
    one, other = dice.sample(sorted(files), 2)
    match dice.choice(["gone", "swapped", "empty", "nested", "long"]):
        case "gone":
            del files[one]
        case "swapped":
            files[one], files[other] = files[other], files[one]
        case "empty":
            files[one] = b""
        case "nested":
            files[one] = b"[" * 200_000
        case "long":
            files[one] = b" " * 2**21 + files[one]


KINDS: list[Callable[[Files, random.Random], None]] = [bytes_changed, field_changed, tensors_changed, file_changed]


def read(files: Mapping[str, bytes]) -> Adapter:
    adapter = adapter_from_bytes(files, "photo", SHAPES, BASE)
    for layer in adapter.layers.values():
        assert layer.A.isfinite().all() and layer.B.isfinite().all()
    return adapter


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_mutated_upload_is_refused_in_one_line_or_read_as_the_original(kind) -> None:
    original, refused = read(upload()), 0
    number = MUTATIONS // len(KINDS)
    for seed in range(number):
        files = upload()
        kind(files, random.Random(seed))
        started = time.process_time()
        try:
            adapter = read(files)
            assert adapter == original or MANIFEST_FILE not in files, f"seed {seed}"
        except InputError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000, f"seed {seed}"
        assert time.process_time() - started < MOST_SECONDS, f"seed {seed}"
    assert number / 4 < refused


def test_what_is_read_without_a_manifest_is_what_its_files_say() -> None:
    """A changed scale is not damage where nothing says what it was."""
    files = upload()
    del files[MANIFEST_FILE]
    files[CONFIG_FILE] = json.dumps(json.loads(files[CONFIG_FILE]) | {"lora_alpha": 6}).encode()
    assert {layer.scale for layer in read(files).layers.values()} == {3.0}
