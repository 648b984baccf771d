"""The frozen CLIP checkpoint that everybody starts from, as a vision tower and a text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sap_lightning.errors import InputError, first_line, short
from sap_lightning.fingerprints import fingerprint
from sap_lightning.io.peft_config import in_text_tower
from sap_lightning.models.base import load_whole


class TextEncoder:
    """Text tower and tokenizer of a CLIP checkpoint, on the CPU unless a client trains the tower.

    Attributes:
        tower: the text tower and its projection, under their names in CLIPModel.

    Raises:
        InputError: when the checkpoint has no tokenizer, or that of another text tower.
    """

    def __init__(self, clip: CLIPModel, base: str) -> None:
        config = cast(CLIPTextConfig, clip.config.text_config)
        self.model = clip.text_model
        self.projection = clip.text_projection
        self.tower = nn.ModuleDict({"text_model": clip.text_model, "text_projection": clip.text_projection}).eval()
        self.tokenizer = _load_tokenizer(base, config.vocab_size)
        self.max_length = config.max_position_embeddings

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Normalised text features, shape (n, d)."""
        return self.features(texts)

    def features(self, texts: Sequence[str]) -> Tensor:
        """The same, with gradients where they are enabled and the tower has any."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        return self.features_of(**tokens)

    def features_of(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Normalised features, shape (n, d), of token ids (n, length) from their start to their end, and padding."""
        pooled = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return normalize(self.projection(pooled), dim=-1)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text's tokens, without those of its start and end."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of token embeddings, of as many columns as the tower is wide."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def class_features(
        self, class_names: Sequence[str], templates: Sequence[str], with_gradients: bool = False
    ) -> Tensor:
        """One feature for each class, shape (classes, d): its prompts averaged after normalisation.

        Args:
            class_names: in label order.
            templates: prompts with {} for the class name.
            with_gradients: whether the tower is trained through them.

        Raises:
            InputError: when there is no template, one has no place for the class name, or two classes are one to the
                tower.
        """
        if isinstance(templates, str):
            raise InputError(f"model.templates {templates!r}: is one prompt; give a list of them")
        if not templates or any("{}" not in template for template in templates):
            raise InputError(f"model.templates must be prompts with {{}} for the class name, got {list(templates)}")
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        if not with_gradients:  # at every step of which the classes are the same
            read = self.tokenizer(prompts, truncation=True, max_length=self.max_length).input_ids
            each = len(templates)
            require_told_apart(class_names, [read[at : at + each] for at in range(0, len(read), each)])
        features = self.features(prompts) if with_gradients else self(prompts)
        return normalize(features.view(len(class_names), len(templates), -1).mean(1), dim=-1)


def require_told_apart(class_names: Sequence[str], read: Sequence[object]) -> None:
    """Raises InputError when the text tower reads the same of two classes, and every image would be of the first.

    Args:
        class_names: in label order.
        read: of each class, the ids of its prompts, up to the last that the tower reads.
    """
    found: dict[str, str] = {}
    for name, ids in zip(class_names, map(str, read), strict=True):
        if ids in found:
            raise InputError(
                f"classes {short(found[ids])} and {short(name)} are one to the text tower, whose tokenizer gives the"
                " same for both, or which does not read so far; name them otherwise in data.class_names"
            )
        found[ids] = name


class Base(NamedTuple):
    """A CLIP checkpoint, and taken apart into a vision tower and a text encoder that share its weights."""

    tower: CLIPVisionModelWithProjection
    texts: TextEncoder
    logit_scale: float
    clip: CLIPModel

    def fingerprint(self, layers: Iterable[str] = ()) -> str:
        """`fingerprint` of the vision tower, or of both towers for an adapter that has layers of the text tower too."""
        if any(map(in_text_tower, layers)):
            return fingerprint(nn.ModuleList([self.tower, self.texts.tower]))
        return fingerprint(self.tower)


def load_clip(base: str, setting: str = "model.base") -> CLIPModel:
    """The frozen checkpoint in float32 from a hub id or a folder.

    Args:
        base: the checkpoint.
        setting: what names it, for the error.

    Raises:
        InputError: when it is not there or is no CLIP model.
    """
    return load_whole(CLIPModel, base, f"{setting} {base!r}", "CLIP checkpoint").requires_grad_(False)


def load_base(base: str) -> Base:
    """The checkpoint as a plain ``CLIPVisionModelWithProjection`` and a text encoder.

    Raises:
        InputError: when it is not there or is no CLIP model.
    """
    clip = load_clip(base)
    return Base(vision_tower(clip), TextEncoder(clip, base), float(clip.logit_scale.exp()), clip)


def vision_tower(clip: CLIPModel) -> CLIPVisionModelWithProjection:
    """The model's vision tower and projection, sharing its weights."""
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(cast(CLIPVisionConfig, clip.config.vision_config))
    tower.vision_model = clip.vision_model
    tower.visual_projection = clip.visual_projection
    return tower.eval()


def _load_tokenizer(base: str, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"model.base {base!r}: no tokenizer could be loaded: {first_line(error)}") from error
    # Without its files a tokenizer is loaded all the same, knowing nothing but the special tokens.
    if not len(tokenizer.all_special_tokens) < len(tokenizer) <= vocab_size:
        raise InputError(
            f"model.base {base!r}: its tokenizer knows {len(tokenizer)} tokens, its text tower {vocab_size};"
            " tokenizer files are missing or of another model"
        )
    return tokenizer
