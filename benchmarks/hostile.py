"""What uploads made to waste the server's time cost it, against an honest one of 100 MB.

python benchmarks/hostile.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from safetensors.torch import save

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import adapter_files, adapter_from_bytes
from sap_lightning.io.peft_config import CONFIG_FILE
from sap_lightning.io.upload_files import WEIGHTS_FILE

Files = dict[str, bytes]


def honest(layers: int = 200, width: int = 1024, rank: int = 64) -> Files:
    return adapter_files(
        {
            f"model.layers.{k}.q_proj": LoRALayer(torch.randn(rank, width), torch.randn(width, rank), 1.0)
            for k in range(layers)
        },
        "org/base",
    )


def with_metadata(files: Files) -> Files:
    tensors = {f"base_model.model.layers.{k}.q_proj.lora_{f}.weight": torch.ones(2, 2) for k in range(99) for f in "AB"}
    config = json.loads(files[CONFIG_FILE]) | {"target_modules": ["q_proj"], "r": 2}
    metadata = {f"{k:06d}": "" for k in range(400_000)}
    return {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors, metadata)}


def with_pattern(files: Files, name: str, keys: list[str]) -> Files:
    config = json.loads(files[CONFIG_FILE]) | {name: dict.fromkeys(keys, 64)}
    return files | {CONFIG_FILE: json.dumps(config).encode()}


def many_layers(count: int) -> Files:
    return honest(count, width=2, rank=1)


CASES: dict[str, Callable[[], Files]] = {
    "honest, 100 MB": honest,
    "400,000 metadata entries": lambda: with_metadata(honest(1, 2, 1)),
    "4,000 names as rank patterns, 4,000 layers": lambda: with_pattern(
        many_layers(4000), "rank_pattern", [f"layers.{k}.q_proj" for k in range(4000)]
    ),
    "4,000 patterns that match nothing": lambda: with_pattern(
        many_layers(4000), "alpha_pattern", [f".*x{k}.*" for k in range(4000)]
    ),
    "a pattern in three nested repeats": lambda: with_pattern(many_layers(4000), "alpha_pattern", ["a*a*a*b"]),
    "a pattern with groups": lambda: with_pattern(many_layers(4000), "rank_pattern", ["(a|a)*" * 20]),
    "a hundred thousand layers": lambda: many_layers(100_000),
    "JSON nested 400,000 deep": lambda: honest(1, 2, 1) | {CONFIG_FILE: b"[" * 400_000},
}


def main() -> None:
    for name, made in CASES.items():
        files = made()
        size = sum(map(len, files.values())) / 1e6
        started = time.process_time()
        try:
            outcome = f"read, {len(adapter_from_bytes(files, 'client').layers)} layers"
        except InputError as error:
            outcome = f"refused: {error}"
        print(f"{name:44} {size:7.1f} MB  {time.process_time() - started:6.2f} s CPU  {outcome[:110]}")


if __name__ == "__main__":
    main()
