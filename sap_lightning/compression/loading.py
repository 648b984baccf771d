"""Models that are compressed, and models that were, from their folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM, CLIPModel, CLIPVisionModelWithProjection, PreTrainedModel

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.keys import matched
from sap_lightning.compression.blocks import LINEAR
from sap_lightning.compression.calibration import Calibration, caption_losses, next_token_losses
from sap_lightning.compression.low_rank import empty_in_place_of, weight_of
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.texts import TokenRows, check_tokens
from sap_lightning.errors import InputError, first_line
from sap_lightning.io.rules import Rule, errors_in, is_integer, object_from, require
from sap_lightning.io.upload_files import regular_file
from sap_lightning.models.clip import load_base, vision_tower
from sap_lightning.models.language import language_config, load_language_model, tokenizer_of

COMPRESSED_FILE = "compressed.safetensors"
"""Not the name that transformers looks for, which would draw what it does not find at random."""
RANKS_FILE = "compression.json"
RANKS = Rule(lambda value: isinstance(value, dict), "ranks by layer")
ROWS = 4
IMAGES = 16
"""How many rows of tokens and images a model is shown at a time."""
SAMPLE = 16
"""Tokens of a text of no meaning."""

Data = TokenRows | AnchorDataModule


def is_clip(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a CLIPModel, of which the vision tower is compressed; else it is a language model."""
    return checkpoint.config.get("model_type") == "clip"


def opened(checkpoint: Checkpoint, data: Data | None) -> tuple[nn.Module, Calibration | None]:
    """What of a checkpoint is compressed, frozen in float32, and what it is shown.

    Raises:
        InputError: when the model cannot be loaded or has a weight that is not finite, or the data are none for it.
    """
    ids = _ids(checkpoint, data) if isinstance(data, TokenRows) else None
    if is_clip(checkpoint):
        base = load_base(str(checkpoint.folder))
        if not isinstance(data, AnchorDataModule):
            return base.tower, None
        shown = zip(data.images().split(IMAGES), base.texts(data.captions).split(IMAGES), strict=True)
        return base.tower, Calibration(base.tower, list(shown), caption_losses, answer=0)
    model = load_language_model(checkpoint.folder).requires_grad_(False)
    if ids is None:
        return model, None
    return model, Calibration(model, [(rows,) for rows in ids.split(ROWS)], next_token_losses)


def _ids(checkpoint: Checkpoint, data: TokenRows) -> Tensor:
    """The rows of tokens that a language model is shown, as far as it can be."""
    ids = data.ids(tokenizer_of(checkpoint.folder, "compress.texts"))
    config = language_config(checkpoint.folder)
    check_tokens([ids], config, checkpoint.name, data.place, "lower --compress.tokens")
    return ids


def reopened(folder: Path) -> nn.Module:
    """What of a compressed model in a folder `opened` would give.

    Raises:
        InputError: when it cannot be loaded.
    """
    if not (folder / RANKS_FILE).is_file():
        return opened(Checkpoint(str(folder)), None)[0]
    model = load_compressed(folder)
    return vision_tower(model) if isinstance(model, CLIPModel) else model


def sample(tower: nn.Module) -> Calibration:
    """A text or an image of no meaning, to tell one model from another by."""
    config = cast(PreTrainedModel, tower).config
    if not isinstance(tower, CLIPVisionModelWithProjection):
        inner = config.get_text_config()
        positions = getattr(inner, "max_position_embeddings", None) or 0  # as of ALiBi
        tokens = torch.arange(min(SAMPLE, positions) if positions > 0 else SAMPLE) % inner.vocab_size
        return Calibration(tower, [(tokens[None],)], next_token_losses)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=generator)
    caption = normalize(torch.randn(1, config.projection_dim, generator=generator), dim=-1)
    return Calibration(tower, [(image, caption)], caption_losses, answer=0)


def load_compressed(folder: str | Path) -> PreTrainedModel:
    """A model that ``compress`` wrote in factors, frozen in float32.

    Raises:
        InputError: when it is none, or a file of it is faulty.
    """
    folder = Path(folder)
    ranks = _ranks_in(folder)
    model = blank(folder)
    with errors_in(folder / RANKS_FILE):
        for name, rank in ranks.items():
            layer = dict(model.named_modules()).get(name)
            if type(layer) not in LINEAR or layer is None:
                raise InputError(f"{name} is no linear layer of the model; compress it again")
            require(f"the rank of {name}", rank, _rank_of(layer))
            model.set_submodule(name, empty_in_place_of(layer, rank))
    with errors_in(folder / COMPRESSED_FILE):
        _fill(model, _tensors_in(folder))
    return model.eval().requires_grad_(False)


def _ranks_in(folder: Path) -> dict[str, int]:
    if not (folder / RANKS_FILE).is_file():
        raise InputError(f"{folder}: has no {RANKS_FILE}; what is dense loads with from_pretrained")
    with errors_in(folder / RANKS_FILE):
        content = object_from(regular_file(folder, RANKS_FILE).read_bytes())
        require("ranks", content.get("ranks"), RANKS)
        return dict(content["ranks"])


def _rank_of(layer: nn.Module) -> Rule:
    most = min(weight_of(layer).shape)
    return Rule(lambda value: is_integer(value, 0, most), f"an integer from 0 to {most}")


def blank(folder: Path) -> PreTrainedModel:
    """A model of the folder's config, its weights not loaded."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        made = (
            CLIPModel(config)
            if config.model_type == "clip"
            else AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        )
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"{folder}: has no config of CLIP or a language model ({first_line(error)})") from error
    whole: PreTrainedModel = made
    return whole


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(regular_file(folder, COMPRESSED_FILE))
    except SafetensorError as error:
        raise InputError(f"not safetensors, {first_line(error)}; compress the model again") from error


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads all weights, none left out and none left over; tied ones are one."""
    weights = model.state_dict(keep_vars=True)
    keys = matched(list(weights), list(tensors))
    filled = {id(weights[name]) for name in keys}
    if missing := [name for name, weight in weights.items() if id(weight) not in filled]:
        raise InputError(f"{missing[0]} is not there; compress the model again")
    if left := sorted(tensors.keys() - set(keys.values())):
        raise InputError(f"{left[0]} is no weight of the model; compress it again")
    for name, key in keys.items():
        if not tensors[key].is_floating_point():
            raise InputError(f"{key} is of {tensors[key].dtype}, no floating point; compress the model again")
        if weights[name].shape != tensors[key].shape:
            raise InputError(
                f"{key} has the shape {tuple(tensors[key].shape)}, expected {tuple(weights[name].shape)}; compress the"
                " model again"
            )
        weights[name].copy_(tensors[key])
