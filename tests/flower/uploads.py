"""Small uploads of one base, and the question that they answer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from flwr.app import RecordDict

from sap_lightning import __version__
from sap_lightning.flower.wire import Question, upload_record
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import adapter_from_bytes, sha256_of, write_adapter
from sap_lightning.io.manifest import Manifest

SHAPES = {"encoder.q_proj": (6, 4), "encoder.fc1": (8, 4)}
BASE = "ab" * 32
CLASSES = ["cat", "dog"]
QUESTION = Question(BASE, CLASSES, __version__)
read = partial(adapter_from_bytes, shapes=SHAPES, base_fingerprint=BASE)
"""The strict reader of this base."""


def write_upload(folder: Path, domain: str, seed: int = 0, classes: list[str] = CLASSES, base: str = BASE) -> Path:
    """An upload whose adapter depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoRALayer(torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator), 4.0)
        for name, (d_out, d_in) in SHAPES.items()
    }
    targets = ("q_proj", "fc1")
    manifest = Manifest("base", base, domain, tuple(classes), 10, 2, 8.0, targets, 0, {}, sha256_of(layers))
    return write_adapter(folder, layers, "base", manifest)


def record_of(folder: Path, domain: str, seed: int = 0) -> RecordDict:
    """Such an upload as it is sent."""
    return upload_record(write_upload(folder / f"{domain} {seed}", domain, seed))
