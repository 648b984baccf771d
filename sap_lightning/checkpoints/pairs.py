"""Anchors that whole CLIP models are shown."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from sap_lightning.checkpoints.checkpoint import PREPROCESSOR_FILE
from sap_lightning.checkpoints.examples import Anchors, Examples
from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.fingerprints import digest
from sap_lightning.functional.saliency import alignment_loss
from sap_lightning.models.clip import TextEncoder, load_clip, vision_tower


class Pairs(Examples):
    """Image–caption pairs, for CLIP models, each of which encodes both by itself.

    A model is shown images as its own preprocessor config says, or as the first model's where it has none.

    Args:
        anchors: the pairs.
        tokenizer: folder of the model whose tokenizer all models go by.
    """

    def __init__(self, anchors: Anchors, tokenizer: Path) -> None:
        self.anchors = anchors
        self.images = anchors.images()
        self.captions = anchors.captions
        self.tokenizer = str(tokenizer)
        self.fingerprint = digest(anchors.fingerprint, anchors.preprocessing)
        self._shown: MutableMapping[CLIPModel, Tensor] = WeakKeyDictionary()

    def load(self, folder: Path) -> CLIPModel:
        model = load_clip(str(folder), "fuse.models").requires_grad_()
        size, given = vision_tower(model).config.image_size, self.images.shape[-1]
        if size != given:
            raise InputError(
                f"fuse.models: one takes images of {size} pixels, the first of {given}; give models that take the same"
            )
        if (folder / PREPROCESSOR_FILE).is_file() and str(folder) != self.tokenizer:
            own = self.anchors.images(str(folder))
            if own.shape != self.images.shape:
                raise InputError(
                    f"{folder / PREPROCESSOR_FILE}: makes images of {own.shape[-1]} pixels, the model takes {size}"
                )
            self._shown[model] = own
        return model

    def _images(self, model: CLIPModel) -> Tensor:
        return self._shown.get(model, self.images)

    @torch.inference_mode()
    def show(self, model: CLIPModel) -> None:
        vision, texts = vision_tower(model), TextEncoder(model, self.tokenizer)
        for image, caption in track(list(zip(self._images(model), self.captions, strict=True)), "anchors"):
            vision(image[None])
            texts.features([caption])

    def losses(self, model: CLIPModel) -> Iterator[Tensor]:
        """1 − cos(image, caption), pair after pair."""
        vision, texts = vision_tower(model), TextEncoder(model, self.tokenizer)
        for image, caption in zip(self._images(model), self.captions, strict=True):
            (loss,) = alignment_loss(vision(image[None]).image_embeds, texts.features([caption]))
            yield loss

    @torch.inference_mode()
    def predictions(self, model: CLIPModel) -> list[Tensor]:
        """Of every image the probabilities of all captions; its own is not told."""
        vision, texts = vision_tower(model), TextEncoder(model, self.tokenizer)
        images = torch.cat([normalize(vision(image[None]).image_embeds, dim=-1) for image in self._images(model)])
        return [(model.logit_scale.exp() * images @ texts.features(self.captions).T).softmax(-1)]

    def __len__(self) -> int:
        return len(self.captions)

    def logits(self, model: CLIPModel, number: int) -> Tensor:
        """Of all captions for one image."""
        image = normalize(vision_tower(model)(self._images(model)[number, None]).image_embeds, dim=-1)
        captions = TextEncoder(model, self.tokenizer).features(self.captions)
        return model.logit_scale.exp() * image @ captions.T

    def answers(self, model: CLIPModel) -> list[Hashable]:
        """Of every image the number of the caption that fits it best."""
        (found,) = self.predictions(model)
        return list(found.argmax(1).tolist())
