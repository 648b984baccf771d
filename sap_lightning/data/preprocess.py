"""The image preprocessing that a CLIP checkpoint asks for, split where the cache sits: pixels, then normalise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from sap_lightning.errors import InputError, first_line

_NORMALISATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_DECIDE = ("do_resize", "size", "resample", "do_center_crop", "crop_size", *_NORMALISATION)


class Preprocess:
    """Turns a picture into the checkpoint's uint8 pixels, and a batch of those into the vision tower's input.

    Size, crop, interpolation, mean and std are those of the checkpoint's own preprocessor config.

    Args:
        base: hub id or folder of a CLIP checkpoint.

    Attributes:
        shape: (3, H, W) of every preprocessed image.
        settings: all that the config says, plain enough for JSON.
        geometry: those of the settings that decide the pixels.

    Raises:
        InputError: the checkpoint has no readable preprocessor config, or one that gives images of differing size.
    """

    def __init__(self, base: str) -> None:
        try:
            # Always PIL: whether torchvision is installed must not change a pixel.
            self._processor = AutoImageProcessor.from_pretrained(base, backend="pil", trust_remote_code=False)
        except Exception as error:  # a malformed config can fail anywhere in transformers
            raise InputError(
                f"{base}: cannot load the checkpoint's preprocessor config: {first_line(error)}"
            ) from error
        self.settings = settings = self._processor.to_dict()
        self.geometry = {key: value for key, value in settings.items() if key not in _NORMALISATION}
        self.shape = self._one_shape(base)
        self._scale = settings["rescale_factor"] if settings["do_rescale"] else 1.0
        normalises = settings.get("do_normalize", False)
        self._mean = torch.tensor(settings["image_mean"] if normalises else [0.0]).view(-1, 1, 1)
        self._std = torch.tensor(settings["image_std"] if normalises else [1.0]).view(-1, 1, 1)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an RGB image as the checkpoint's processor does before it rescales; uint8 (3, H, W)."""
        output = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        return output["pixel_values"][0]

    def normalise(self, images: Tensor) -> Tensor:
        """Scale and normalise pixels (B, 3, H, W) in 0…255, uint8 or float, to the vision tower's float input."""
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        return (images.float() * self._scale - mean) / std

    def _one_shape(self, base: str) -> tuple[int, ...]:
        try:
            tall, wide = (self.pixels(Image.new("RGB", size)).shape for size in ((48, 64), (64, 48)))
        except Exception as error:  # as above
            raise InputError(
                f"{base}: by its preprocessor config no image can be made: {first_line(error)}; see its size"
            ) from error
        if tall != wide:
            raise InputError(
                f"{base}: its preprocessor config gives images of differing size (size {self.geometry['size']}, no"
                " crop); batches need one size: set do_center_crop, or size with height and width"
            )
        return tall


def same_input(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the settings of two checkpoints make the same of an image, whatever else they say."""
    return all(one.get(name) == other.get(name) for name in _DECIDE)
