"""What several tests compare with and build on: definitions, random tensors, a folder's files, a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, linear
from transformers import CLIPVisionConfig

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.saliency import Reduction

REDUCTIONS: dict[Reduction, Callable[[Tensor], Tensor]] = {
    "mean_then_abs": lambda taylor: taylor.mean(0).abs(),
    "abs_then_mean": lambda taylor: taylor.abs().mean(0),
    "square": lambda taylor: taylor.square().mean(0),
}
"""Saliency from the Taylor terms θ·g_i of all anchors, first dimension."""

TINY_VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    projection_dim=16,
)

reproducibly = settings(deadline=None, derandomize=True, database=None)
"""Hypothesis draws the same examples in every run."""


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """Every file by its path in the folder, but for TensorBoard's events, which hold the time."""
    files = (path for path in folder.glob(pattern) if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def whitened(X: Tensor) -> Tensor:
    """X·(XᵀX)^(−1/2) by the eigenvalues of XᵀX."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    return X @ vectors / values.sqrt() @ vectors.T


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randn64(seed: int, *shape: int) -> Tensor:
    return randn(seed, *shape, dtype=torch.float64)


def quiet_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A trainer on the CPU that shows and writes nothing, but for what the options say."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **quiet | options)


# One adapted layer, gelu, the mean over tokens and a linear head, in float64

ANCHORS, TOKENS, D_IN, D_OUT, RANK, FEATURES = 7, 3, 6, 8, 4, 4
BASE = randn64(0, D_OUT, D_IN)
LAYER = LoRALayer(randn64(1, RANK, D_IN), randn64(2, D_OUT, RANK), 0.3)
INPUTS = randn64(3, ANCHORS, TOKENS, D_IN)
CAPTIONS = randn64(4, ANCHORS, FEATURES)
HEAD = randn64(5, FEATURES, D_OUT)


def anchor_losses(outputs: Tensor, captions: Tensor = CAPTIONS) -> Tensor:
    """Alignment loss of every anchor, shape (n,), from the adapted layer's outputs (n, TOKENS, D_OUT)."""
    return 1 - cosine_similarity(linear(gelu(outputs).mean(1), HEAD), captions)


def output_gradients() -> Tensor:
    """What backpropagation leaves at the adapted layer's output, shape (ANCHORS, TOKENS, D_OUT)."""
    outputs = linear(INPUTS, BASE + LAYER.delta()).requires_grad_()
    return torch.autograd.grad(anchor_losses(outputs).sum(), outputs)[0]
