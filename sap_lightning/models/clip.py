"""The frozen CLIP checkpoint that everybody starts from, as a vision tower and a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sap_lightning.errors import InputError, first_line


class TextEncoder:
    """Text tower and tokenizer of a CLIP checkpoint, kept on the CPU.

    Raises:
        InputError: when the checkpoint has no tokenizer, or that of another text tower.
    """

    def __init__(self, clip: CLIPModel, base: str) -> None:
        config = cast(CLIPTextConfig, clip.config.text_config)
        self.model = clip.text_model
        self.projection = clip.text_projection
        self.tokenizer = _load_tokenizer(base, config.vocab_size)
        self.max_length = config.max_position_embeddings

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Normalised text features, shape (n, d)."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return normalize(self.projection(self.model(**tokens).pooler_output), dim=-1)

    def class_features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One feature for each class, shape (classes, d): its prompts averaged after normalisation.

        Raises:
            InputError: when there is no template or one has no place for the class name.
        """
        if not templates or any("{}" not in template for template in templates):
            raise InputError(f"model.templates must be prompts with {{}} for the class name, got {list(templates)}")
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        return normalize(self(prompts).view(len(class_names), len(templates), -1).mean(1), dim=-1)


class Base(NamedTuple):
    """A CLIP checkpoint taken apart: text features are computed once, the vision tower is what clients train."""

    tower: CLIPVisionModelWithProjection
    texts: TextEncoder
    logit_scale: float


def load_clip(base: str) -> CLIPModel:
    """The frozen checkpoint in float32 from a hub id or a folder.

    Raises:
        InputError: when it is not there or is no CLIP model.
    """
    try:
        # Weights of another shape are reported like missing ones, not logged in a table.
        # On the CPU, also where Lightning builds models on the device: the text tower stays there.
        with torch.device("cpu"):
            loaded: Any = CLIPModel.from_pretrained(
                base, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        clip, report = cast(tuple[CLIPModel, dict[str, Any]], loaded)
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"model.base {base!r}: no CLIP checkpoint could be loaded: {first_line(error)}") from error
    faulty = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if faulty:
        raise InputError(
            f"model.base {base!r}: no whole CLIP checkpoint: {len(faulty)} weights are missing or of another shape than"
            f" config.json says, the first is {faulty[0]}"
        )
    return clip.eval().requires_grad_(False)


def load_base(base: str) -> Base:
    """The checkpoint as a plain ``CLIPVisionModelWithProjection`` and a text encoder.

    Raises:
        InputError: when it is not there or is no CLIP model.
    """
    clip = load_clip(base)
    return Base(vision_tower(clip), TextEncoder(clip, base), float(clip.logit_scale.exp()))


def vision_tower(clip: CLIPModel) -> CLIPVisionModelWithProjection:
    """The model's vision tower and projection, sharing its weights."""
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(cast(CLIPVisionConfig, clip.config.vision_config))
    tower.vision_model = clip.vision_model
    tower.visual_projection = clip.visual_projection
    return tower.eval()


def _load_tokenizer(base: str, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"model.base {base!r}: no tokenizer could be loaded: {first_line(error)}") from error
    # Without its files a tokenizer is loaded all the same, knowing nothing but the special tokens.
    if not len(tokenizer.all_special_tokens) < len(tokenizer) <= vocab_size:
        raise InputError(
            f"model.base {base!r}: its tokenizer knows {len(tokenizer)} tokens, its text tower {vocab_size};"
            " tokenizer files are missing or of another model"
        )
    return tokenizer
