"""Encoded pictures and how they become RGB."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from sap_lightning.errors import InputError

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WebP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
}
"""What is read, under PIL's names, and the suffixes that such files have."""
FORMATS_IN_WORDS = ", ".join(f"{name} ({', '.join(suffixes)})" for name, suffixes in FORMATS.items())
REFUSED = {
    "HEIC": ((".heic", ".heif"), rb".{4}ftyp(hei|hev|mif1|msf1)"),
    "AVIF": ((".avif",), rb".{4}ftypavi"),
    "SVG": ((".svg",), rb".{0,1000}<svg"),
    "EPS": ((".eps",), rb"%!PS"),
}
"""Images that are not read, with the suffixes and the first bytes by which they are named rather than passed over."""
SUFFIXES = {suffix for of in (*FORMATS.values(), *(of for of, _ in REFUSED.values())) for suffix in of}

MAX_PIXELS = 2**26
"""67 million, more than all but a few cameras take; decoding and resizing hold up to 17 bytes a pixel, so a GiB."""
MAX_BYTES = 8 * MAX_PIXELS
"""What so many pixels take when they are not compressed, in four channels of 16 bits."""
MAX_RATIO = 100
"""Longer side over shorter: the shorter one is resized to the tower's, and the longer one grows with it."""


class Picture(NamedTuple):
    """One encoded image of a dataset.

    Attributes:
        name: how messages call it, such as a path relative to the dataset's root.
        read: gives the encoded bytes.
    """

    name: str
    read: Callable[[], bytes]


def is_image(path: Path) -> bool:
    """Whether a path is a file with the suffix of an image.

    Raises:
        InputError: when it is a link that leads nowhere, as in a git-annex or DVC checkout without its content.
    """
    if path.suffix.lower() not in SUFFIXES:
        return False
    if path.is_symlink() and not os.path.exists(path):
        raise InputError(f"{path}: a link that leads to no file; fetch what it stands for, or take it away")
    return path.is_file()


def file_picture(file: Path, root: Path) -> Picture:
    """A picture in a file, called by its path below the root; bytes of it that are no UTF-8 are escaped."""
    name = os.fsencode(file.relative_to(root)).decode(errors="backslashreplace")
    return Picture(name, partial(read_encoded, file))


def read_encoded(file: Path) -> bytes:
    """An image file's bytes, of one that is too large no more than tell it."""
    with file.open("rb") as opened:
        return opened.read(MAX_BYTES + 1)


def decode(data: bytes) -> Image.Image:
    """Decode an image file to RGB, upright as its EXIF orientation says; animations give their first frame.

    Transparent pixels become white: dropping the alpha channel would show whatever colour hides below, mostly black.

    Raises:
        Exception: another format than `FORMATS`, too many pixels or too long; or whatever PIL raises on corrupt data,
            as its decoders share no base class.
    """
    image = _open(data)
    _check_size(*image.size)
    if image.mode == "F" or (isinstance(image, TiffImageFile) and image.mode == "I" and not _has_16_bits(image)):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(f"its pixels are {kind} of an unknown range; save it with 8 or 16 bits")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _has_16_bits(image: TiffImageFile) -> bool:
    return image.tag_v2.get(BITSPERSAMPLE) == (16,)


def _open(data: bytes) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise ValueError(f"the file is larger than {MAX_BYTES >> 20} MiB; save it compressed")
    try:
        # By what is in it: under any suffix, PIL would start Ghostscript for an EPS.
        return Image.open(io.BytesIO(data), formats=[name.upper() for name in FORMATS])
    except UnidentifiedImageError:
        found = next((name for name, (_, head) in REFUSED.items() if re.match(head, data, re.DOTALL)), "the file")
        raise ValueError(f"{found} is not one of {', '.join(FORMATS)}" if data else "the file is empty") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels are more than {MAX_PIXELS}; make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"of {width} × {height} pixels one side is over {MAX_RATIO} times the other; cut it")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey levels 0…65535 to 0…255; PIL's own conversion would clip at 255 and turn most of the image white."""
    levels = np.asarray(image).clip(0, 65535)
    return Image.fromarray((levels // 257).astype(np.uint8))
