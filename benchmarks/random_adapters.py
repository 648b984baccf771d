"""Random LoRA adapters on all linear layers of a vision tower of CLIP's, for the merge benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import write_adapter
from sap_lightning.models.layers import layer_shapes

VIT_B_16 = CLIPVisionConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    patch_size=16,
)


SMALL = CLIPVisionConfig(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=12,
    num_attention_heads=3,
    patch_size=16,
)
"""As deep as ViT-B/16 and an eighth as wide."""


def vision_tower() -> CLIPVisionModelWithProjection:
    """ViT-B/16 with random weights, which no merge looks at."""
    return CLIPVisionModelWithProjection(VIT_B_16).eval().requires_grad_(False)


def write_random_adapters(folder: Path, number: int, rank: int, tower: CLIPVisionConfig = VIT_B_16) -> list[Path]:
    """Writes that many adapters, the same ones every time, and returns their folders."""
    with torch.device("meta"):
        shapes = layer_shapes(CLIPVisionModelWithProjection(tower))
    shapes = {name: shape for name, shape in shapes.items() if ".layers." in name}
    return [
        write_adapter(folder / f"client{seed}", _random_layers(shapes, rank, seed), "a tower") for seed in range(number)
    ]


def _random_layers(shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int) -> dict[str, LoRALayer]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoRALayer(
            torch.randn(rank, d_in, generator=generator) / d_in**0.5,
            torch.randn(d_out, rank, generator=generator) * 0.01,
            2.0,
        )
        for name, (d_out, d_in) in shapes.items()
    }
