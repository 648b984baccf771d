"""Decode every image once and keep the pixels in a memory-mapped file.

One `.npy` of uint8 (N, 3, H, W) per domain and, written after it, a `.json` with its checksum and the images that
could not be decoded. The name of both is a digest of the inputs' stats and of the preprocessing, so a changed input
finds no file; a file that fails its checksum is made anew.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from sap_lightning.data.images import Picture, decode
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.errors import InputError, first_line
from sap_lightning.files import cache_folder, replacing
from sap_lightning.fingerprints import digest

log = logging.getLogger(__name__)

FORMAT = 3
"""Part of every cache key: raise it when the same inputs are to give other pixels."""

MAX_CORRUPT = 0.01
"""Share of the images of a domain that may be passed over."""

_BLOCK = 256
_THREADS = min(8, os.cpu_count() or 1)


class Pixels(NamedTuple):
    """The preprocessed images of one dataset.

    Attributes:
        images: uint8 (N, 3, H, W) in the order of the pictures; zeros where one could not be decoded.
        corrupt: position of each image that could not be decoded → why.
    """

    images: np.ndarray
    corrupt: dict[int, str]


def load_pixels(pictures: Sequence[Picture], fingerprint: str, preprocess: Preprocess, cache: bool) -> Pixels:
    """The pixels of all pictures, from the cache where it has them.

    Args:
        pictures: encoded images.
        fingerprint: digest of the files behind the pictures; must change when any of them does.
        preprocess: gives each image's pixels.
        cache: False decodes to memory and touches no file.

    Raises:
        InputError: a picture cannot be read at all, or not in the memory there is (a corrupt one is reported in
            `Pixels.corrupt`).
    """
    if not cache:
        return _decode_to_memory(pictures, preprocess)
    path = cache_folder() / "images" / digest(FORMAT, fingerprint, preprocess.geometry)
    shape = (len(pictures), *preprocess.shape)
    try:
        return _open(path, shape) or _build(path, shape, pictures, preprocess)
    except OSError as error:
        log.warning("cannot keep decoded images in %s (%s): decoding to memory", path.parent, error)
        return _decode_to_memory(pictures, preprocess)


def report_corrupt(pictures: Sequence[Picture], pixels: Pixels, where: str) -> None:
    """Log the images that are passed over because they cannot be decoded.

    Raises:
        InputError: more than one in a hundred.
    """
    if not pixels.corrupt:
        return
    listed = [f"{pictures[position].name} ({reason})" for position, reason in list(pixels.corrupt.items())[:5]]
    listed += ["…"] * (len(pixels.corrupt) > 5)
    message = f"{where}: {len(pixels.corrupt)} of {len(pictures)} images cannot be decoded: {', '.join(listed)}"
    if len(pixels.corrupt) > MAX_CORRUPT * len(pictures):
        raise InputError(f"{message}; more than {MAX_CORRUPT:.0%}: replace or remove them")
    _log_skipped(message)


@rank_zero_only
def _log_skipped(message: str) -> None:
    log.warning("%s; skipped", message)


def _decode_to_memory(pictures: Sequence[Picture], preprocess: Preprocess) -> Pixels:
    images = np.empty((len(pictures), *preprocess.shape), np.uint8)
    corrupt = {}
    for position, (row, reason) in enumerate(_decode_all(pictures, preprocess)):
        images[position] = row
        if reason:
            corrupt[position] = reason
    return Pixels(images, corrupt)


def _open(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """The cached pixels, or None when there are none or they are damaged."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        images = np.load(path.with_suffix(".npy"), mmap_mode="c", allow_pickle=False)
        corrupt = {int(position): reason for position, reason in record["corrupt"].items()}
        intact = images.shape == shape and images.dtype == np.uint8 and zlib.crc32(images.data) == record["crc32"]
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        log.warning("%s is damaged: decoding its images again", path.with_suffix(".npy"))
        return None
    return Pixels(images, corrupt)


def _build(path: Path, shape: tuple[int, ...], pictures: Sequence[Picture], preprocess: Preprocess) -> Pixels:
    path.parent.mkdir(parents=True, exist_ok=True)
    corrupt = {}
    checksum = 0
    with replacing(path.with_suffix(".npy")) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for position, (row, reason) in enumerate(_decode_all(pictures, preprocess)):
            data = row.tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
            if reason:
                corrupt[position] = reason
    with replacing(path.with_suffix(".json")) as file:
        file.write(json.dumps({"crc32": checksum, "corrupt": corrupt}).encode())
    return Pixels(np.load(path.with_suffix(".npy"), mmap_mode="c", allow_pickle=False), corrupt)


def _decode_all(pictures: Sequence[Picture], preprocess: Preprocess) -> Iterator[tuple[np.ndarray, str]]:
    """Each picture's pixels in order and an empty string, or zeros and why it could not be decoded."""
    with ThreadPoolExecutor(_THREADS) as pool, warnings.catch_warnings():
        # `decode` says what is too large; here, as the filters of warnings are those of all threads.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for block in _blocks(pictures):
            yield from pool.map(partial(_decode_one, preprocess=preprocess), block)


def _blocks(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Bounds what the pool holds: a whole domain may not fit in memory."""
    remaining = iter(pictures)
    while block := list(itertools.islice(remaining, _BLOCK)):
        yield block


def _decode_one(picture: Picture, preprocess: Preprocess) -> tuple[np.ndarray, str]:
    try:
        data = picture.read()
    except OSError as error:
        raise InputError(f"{picture.name}: cannot be read: {error.strerror or error}") from error
    try:
        return preprocess.pixels(decode(data)), ""
    except MemoryError as error:  # which says nothing of the picture, so that it must not be kept as a corrupt one
        raise InputError(
            f"{picture.name}: too little memory to decode it; end other programs, or make it smaller"
        ) from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, …
        return np.zeros(preprocess.shape, np.uint8), first_line(error)
