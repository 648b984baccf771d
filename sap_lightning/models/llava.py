"""The frozen parts of a vision–language model: a LLaVA checkpoint taken apart, or a language model alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from sap_lightning.data.images import decode, read_encoded
from sap_lightning.data.instructions import IMAGE, Encoder
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.errors import InputError, first_line
from sap_lightning.fingerprints import fingerprint
from sap_lightning.io.instruction_upload import read_tuned
from sap_lightning.models.base import load_whole
from sap_lightning.models.language import load_language_model, tokenizer_of
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.patched import Patched

MAX_REMEMBERED = 2**30
"""Bytes of image features that are kept in memory; those of further images are computed anew."""


class FrozenVision:
    """What a LLaVA's frozen tower makes of images; what it has seen it remembers, as far as there is room.

    Args:
        tower: the vision tower.
        preprocess: of its images.
        layer: whose hidden states are taken, counted from the end.
        keeps_class: whether that of the class token is among them.
    """

    def __init__(self, tower: nn.Module, preprocess: Preprocess, layer: int, keeps_class: bool) -> None:
        self._tower = tower.eval().requires_grad_(False)
        self._preprocess = preprocess
        self._layer = layer
        self._first = 0 if keeps_class else 1
        self._seen: dict[Path, Tensor] = {}
        self._bytes = 0

    @cached_property
    def features(self) -> int:
        """How many an image has."""
        return int(self._look([np.zeros(self._preprocess.shape, np.uint8)]).shape[1])

    def __call__(self, images: Sequence[Path], device: torch.device) -> Tensor:
        """H_v of images, shape (n, N, D), float32.

        Raises:
            InputError: a file is no image.
        """
        self._tower.to(device)
        new = [image for image in dict.fromkeys(images) if image not in self._seen]
        found = dict(zip(new, self._look([self.pixels(image) for image in new]).cpu(), strict=True)) if new else {}
        of = [self._seen.get(image, found.get(image)) for image in images]
        for image, features in found.items():
            if (size := features.numel() * features.element_size()) + self._bytes <= MAX_REMEMBERED:
                self._seen[image] = features.clone()
                self._bytes += size
        return torch.stack(cast(list[Tensor], of)).to(device)

    # Outside inference mode, as what is remembered is trained on later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _look(self, pixels: Sequence[np.ndarray]) -> Tensor:
        device = next(self._tower.parameters()).device
        images = self._preprocess.normalise(torch.from_numpy(np.stack(pixels)).to(device))
        hidden = self._tower(images, output_hidden_states=True).hidden_states[self._layer]
        return cast(Tensor, hidden[:, self._first :].float())

    def pixels(self, image: Path) -> np.ndarray:
        """An image as the tower's checkpoint preprocesses it, uint8 (3, H, W).

        Raises:
            InputError: the file is no image.
        """
        try:
            return self._preprocess.pixels(decode(read_encoded(image)))
        except Exception as error:  # PIL's decoders share no base class
            raise InputError(f"{image}: cannot be read as an image ({first_line(error)}); replace it") from error


class LanguageBase(NamedTuple):
    """What every client of a federation of language models starts from.

    Attributes:
        language: the causal language model, under the names that it has without an image's part.
        image_token: id that stands for a feature of an image; None of a language model alone.
        connector: from image features to its embeddings; None of a language model alone.
        vision: what its tower makes of images.
        fingerprint: sha256 over the weights of the language model, of the connector and of the tower.
    """

    language: PreTrainedModel
    image_token: int | None
    connector: nn.Module | None
    vision: FrozenVision | None
    fingerprint: str


def load_language_base(base: str) -> LanguageBase:
    """A LLaVA checkpoint, or a causal language model, in float32, from a folder or the hub.

    Raises:
        InputError: it is neither.
    """
    if not sees(base):
        language = load_language_model(Path(base))
        return LanguageBase(language, None, None, None, fingerprint(language))
    vision = frozen_vision(base)  # first, so that two whole checkpoints are never in memory at a time
    llava = _load_llava(base)
    language, connector = _language_of(llava), llava.model.multi_modal_projector
    whole = nn.ModuleDict({"language": language, "connector": connector, "vision": llava.model.vision_tower})
    return LanguageBase(language, llava.config.image_token_id, connector, vision, fingerprint(whole))


def tuned_llava(base: str, folder: str | Path) -> LlavaForConditionalGeneration:
    """A LLaVA checkpoint with the LoRA and the connector that instruction tuning left in a folder, merged into it.

    Args:
        base: hub id or folder of the checkpoint that was tuned.
        folder: of the run's ``<system>/models/<task>``, or a client's upload.

    Raises:
        InputError: the base is no LLaVA checkpoint, or the folder holds no model tuned on it.
    """
    llava = _load_llava(base)
    language, connector = _language_of(llava), llava.model.multi_modal_projector
    shapes = {name: tuple(value.shape) for name, value in connector.state_dict().items()}
    found = read_tuned(Path(folder), layer_shapes(language), shapes)
    Patched(language.requires_grad_(False)).set_update(found.layers)
    connector.load_state_dict(dict(found.connector))
    return cast(LlavaForConditionalGeneration, llava)


def encoder_of(base: str, longest: int) -> Encoder:
    """Conversations to a base's tokens.

    Args:
        base: as of ``load_language_base``.
        longest: tokens of a conversation.

    Raises:
        InputError: it is none, or its tokenizer is of another model.
    """
    tokenizer = tokenizer_of(Path(base), "model.base")
    if not sees(base):
        return Encoder(tokenizer, None, 0, longest)
    said, known = _config(base).image_token_id, tokenizer.convert_tokens_to_ids(IMAGE)
    if said != known:
        raise InputError(
            f"model.base {base!r}: its tokenizer's id of {IMAGE} is {known}, its config's {said}; they are of different"
            " models"
        )
    return Encoder(tokenizer, said, frozen_vision(base).features, longest)


def sees(base: str) -> bool:
    """Whether a base is a LLaVA checkpoint, or else a language model."""
    return bool(_config(base).model_type == "llava")


def embedded(language: nn.Module, ids: Tensor, image_token: int, images: Tensor) -> Tensor:
    """Embeddings of tokens, shape (n, length, C), with those of images in the place of the image tokens.

    Args:
        language: the causal language model.
        ids: shape (n, length).
        image_token: the id that stands for a feature of an image.
        images: their embeddings, shape (n, N, C).
    """
    of_tokens: Tensor = cast(Any, language).get_input_embeddings()(ids)
    return of_tokens.masked_scatter((ids == image_token)[..., None], images.to(of_tokens.dtype))


@lru_cache(maxsize=1)
def frozen_vision(base: str) -> FrozenVision:
    """The vision tower of a LLaVA checkpoint, and its memory, which all clients in a process share.

    Raises:
        InputError: the checkpoint takes several layers of it.
    """
    config = _config(base)
    if not isinstance(config.vision_feature_layer, int):
        raise InputError(f"model.base {base!r}: takes features of several layers; one is needed here")
    keeps_class = config.vision_feature_select_strategy == "full"
    tower = _load_llava(base).model.vision_tower
    return FrozenVision(tower, Preprocess(base), config.vision_feature_layer, keeps_class)


def _load_llava(base: str) -> Any:
    return load_whole(
        LlavaForConditionalGeneration, base, f"model.base {base!r}", "LLaVA checkpoint", use_safetensors=True
    )


def _config(base: str) -> Any:
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"model.base {base!r}: no checkpoint could be loaded: {first_line(error)}; give a LLaVA's or a language"
            " model's"
        ) from error


def _language_of(llava: Any) -> PreTrainedModel:
    """A LLaVA's language model as the causal language model that it was, sharing its weights."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(llava.config.text_config)
    setattr(language, language.base_model_prefix, llava.model.language_model)
    language.set_output_embeddings(llava.lm_head)
    language.generation_config = llava.generation_config
    return cast(PreTrainedModel, language.eval())
