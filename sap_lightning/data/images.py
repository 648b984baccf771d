"""Encoded pictures and how they become RGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Picture(NamedTuple):
    """One encoded image of a dataset.

    Attributes:
        name: how messages call it, such as a path relative to the dataset's root.
        read: gives the encoded bytes.
    """

    name: str
    read: Callable[[], bytes]


def file_picture(file: Path, root: Path) -> Picture:
    """A picture in a file, called by its path below the root."""
    return Picture(str(file.relative_to(root)), file.read_bytes)


def decode(data: bytes) -> Image.Image:
    """Decode an image file to RGB, upright as its EXIF orientation says; animations give their first frame.

    Transparent pixels become white: dropping the alpha channel would show whatever colour hides below, mostly black.

    Raises:
        Exception: whatever PIL raises on corrupt data; its decoders share no base class.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey levels 0…65535 to 0…255; PIL's own conversion would clip at 255 and turn most of the image white."""
    levels = np.asarray(image).clip(0, 65535)
    return Image.fromarray((levels // 257).astype(np.uint8))
