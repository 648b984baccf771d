"""The frozen CLIP checkpoint that everybody starts from, as a vision tower and a text encoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.pytorch_utils import Conv1D

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


def model_type(base: str) -> str:
    """What a checkpoint's config says it is: clip, bert, …

    Raises:
        InputError: when there is no config.
    """
    try:
        return str(AutoConfig.from_pretrained(base).model_type)
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"model.base {base!r}: no checkpoint could be loaded: {first_line(error)}") from error


def linear_shapes(base: str) -> dict[str, tuple[int, int]]:
    """Shape (d_out, d_in) of every linear layer of any checkpoint's base model by name, from its config alone.

    Empty for a model of which transformers has no base model.
    """
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(base))
    except ValueError:
        return {}
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


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


def linear_weight(model: nn.Module, layer: str) -> Tensor:
    """The weight of a linear layer by its module name, shape (d_out, d_in), to be changed in place."""
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.data


def first_changed(tower: nn.Module, layers: Iterable[str]) -> int:
    """Number of the first encoder layer that these linear layers are in; the depth of the tower when in none."""
    found = [re.search(r"\.encoder\.layers\.(\d+)\.", name) for name in layers]
    return min((int(number[1]) for number in found if number), default=len(encoder_layers(tower)))


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The encoder layers of a vision tower."""
    vision: Any = tower.vision_model
    return cast(nn.ModuleList, vision.encoder.layers)


class StemCache:
    """Features of batches whose way through the tower before one encoder layer is gone once only.

    Both ways share the tower's modules, so weights that change from that layer on count.

    Args:
        tower: a vision tower whose weights before the layer stay as they are.
        first: number of that encoder layer.
    """

    def __init__(self, tower: nn.Module, first: int) -> None:
        self.tower = tower
        self.first = first
        self.hidden: dict[int, Tensor] = {}
        self._rest = _without_stem(tower, first)

    def embed(self, batch: int, images: Tensor) -> Tensor:
        """The tower's output features, shape (n, d), of batch number ``batch``; its images (n, 3, h, w)."""
        if batch in self.hidden:
            return self._rest(self.hidden[batch]).image_embeds

        def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.hidden[batch] = inputs[0]

        with encoder_layers(self.tower)[self.first].register_forward_pre_hook(remember):
            return self.tower(images).image_embeds


class _AsTheyAre(nn.Module):
    """Stands where the embeddings were: hidden states come in and go out."""

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return hidden


def _without_stem(tower: nn.Module, first: int) -> nn.Module:
    vision: Any = tower.vision_model
    encoder = _with_modules(vision.encoder, layers=encoder_layers(tower)[first:])
    vision = _with_modules(vision, embeddings=_AsTheyAre(), pre_layrnorm=nn.Identity(), encoder=encoder)
    return _with_modules(tower, vision_model=vision)


def _with_modules(module: nn.Module, **others: nn.Module) -> nn.Module:
    """The same module with some of its parts exchanged; the given one keeps its own."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **others}
    return changed


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
