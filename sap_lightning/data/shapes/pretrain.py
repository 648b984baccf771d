"""Pretrain the shapes world's own small CLIP, contrastively, on freshly drawn image–caption pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sap_lightning.console import run_as_command
from sap_lightning.data.shapes.world import COLOUR_TEMPLATES, TEMPLATES, hearsay, neutral_scene
from sap_lightning.errors import check_at_least
from sap_lightning.files import new_folder, refuse_existing, write_json

SIZE = 64
PATCH = 8
PROJECTION = 64
PAIRS = 8192
EPOCHS = 10
BATCH = 64
LEARNING_RATE = 1e-3
LONGEST_CAPTION = 32
POSITION_SCALE = 0.3
THREADS = 1


def pretrain(folder: str | Path, seed: int = 0) -> None:
    """Write a CLIP checkpoint with tokenizer and image processor: the same bytes for the same seed and machine.

    The loss is CLIP's symmetric InfoNCE (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

    Args:
        folder: where to; must not exist yet.
        seed: of drawing, initialisation and the order of batches.

    Raises:
        InputError: the folder exists, or the seed is negative.
    """
    refuse_existing(folder)
    check_at_least("seed", seed, 0)
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    images, captions = draw_pairs(seed)
    mean, std = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))
    images = (images - mean[:, None, None]) / std[:, None, None]
    tokenizer = train_tokenizer(captions)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    model = CLIPModel(small_config(tokenizer))
    place_patches(model)
    fit(model, images, tokens, torch.Generator().manual_seed(seed))
    with new_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_json(draft / "preprocessor_config.json", preprocessor(mean, std))


def draw_pairs(seed: int) -> tuple[Tensor, list[str]]:
    """Neutral images in [0, 1], shape (PAIRS, 3, SIZE, SIZE), and one caption of each."""
    rng = np.random.default_rng([seed, PAIRS])
    scenes = [neutral_scene(rng) for _ in range(PAIRS)]
    images = np.stack([np.asarray(scene.draw(SIZE, rng)) for scene in scenes])
    captions = [hearsay(scene, rng).caption(rng, TEMPLATES + COLOUR_TEMPLATES) for scene in scenes]
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255, captions


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learned from the captions.

    The letters that end a word are listed to the trainer as special: it would number them in a random order.
    """
    blank, letters = CLIPTokenizer(), sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        special_tokens=[blank.bos_token, blank.eos_token, *(f"{letter}</w>" for letter in letters)],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    blank.backend_tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(blank.backend_tokenizer.to_str())["model"]
    learned: dict[str, Any] = {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}
    return CLIPTokenizer(**learned, model_max_length=LONGEST_CAPTION)


def small_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """About 0.6 million parameters: 4 layers × 96 for images, 2 × 64 for text."""
    vision = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    }
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    towers = [
        tower | {"intermediate_size": 4 * tower["hidden_size"], "hidden_act": "gelu", "projection_dim": PROJECTION}
        for tower in (text, vision)
    ]
    return CLIPConfig(text_config=towers[0], vision_config=towers[1], projection_dim=PROJECTION)


def place_patches(model: CLIPModel) -> None:
    """Start the position embeddings from waves over rows and columns: a small model learns shapes much sooner."""
    embeddings = model.vision_model.embeddings
    steps = torch.arange(embeddings.image_size // embeddings.patch_size) / embeddings.num_patches**0.5
    frequencies = torch.pi * 2.0 ** torch.linspace(-1, 2, embeddings.embed_dim // 4)
    waves = torch.cat([torch.sin(steps[:, None] * frequencies), torch.cos(steps[:, None] * frequencies)], dim=1)
    rows, columns = torch.broadcast_tensors(waves[:, None], waves[None, :])
    grid = torch.cat([rows, columns], dim=2).flatten(0, 1)
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] = POSITION_SCALE * grid


def fit(model: CLIPModel, images: Tensor, tokens: Mapping[str, Tensor], generator: torch.Generator) -> None:
    steps = EPOCHS * (PAIRS // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(PAIRS, generator=generator).split(BATCH):
            words = {name: values[chosen] for name, values in tokens.items()}
            similarity = model(pixel_values=images[chosen], **words).logits_per_image
            pairs = torch.arange(len(chosen))
            loss = (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen) / PAIRS
        print(f"epoch {epoch + 1}/{EPOCHS}: contrastive loss {total:.3f}", flush=True)


def preprocessor(mean: Tensor, std: Tensor) -> dict[str, object]:
    """CLIPImageProcessor's configuration, with the drawn images' own statistics."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value, 4) for value in mean.tolist()],
        "image_std": [round(value, 4) for value in std.tolist()],
    }


if __name__ == "__main__":
    run_as_command(pretrain)
