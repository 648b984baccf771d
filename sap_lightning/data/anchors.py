"""The server's public image–caption pairs, as a Lightning data module."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sap_lightning.data.cache import load_pixels
from sap_lightning.data.images import FORMATS_IN_WORDS, Picture, file_picture
from sap_lightning.data.pixels import PixelDataModule
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.data.sources import images_in, subfolders
from sap_lightning.data.tables import image_column, is_table, load_table, table_fingerprint, table_pictures
from sap_lightning.errors import InputError, check_at_least, first_line, short
from sap_lightning.fingerprints import digest, file_fingerprint

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
CLASS_CAPTION = "a photo of a {}."
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""What UTF-16 writes a character in two of, and no text holds."""
LISTINGS = ("captions.jsonl", "metadata.jsonl")
"""Files that list a folder's images with captions; the second is what Hugging Face's ``imagefolder`` reads."""
MAX_CAPTION = 10_000
"""Characters of a caption, of which CLIP reads the first 77 tokens."""


class AnchorBatch(NamedTuple):
    """Anchor images; image i belongs to caption `indices[i]`.

    Attributes:
        images: (B, 3, H, W), uint8 from the loader, normalised float once on the device.
        indices: (B,) int64, positions in the captions.
    """

    images: Tensor
    indices: Tensor


class AnchorSet(Dataset[AnchorBatch]):
    """All anchor images, by position or a whole batch of positions at once.

    Args:
        images: uint8 (N, 3, H, W).
    """

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.indices = images, torch.arange(len(images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: int | list[int]) -> AnchorBatch:
        return AnchorBatch(torch.from_numpy(self.images[positions]), self.indices[positions])

    __getitems__ = __getitem__


class Pairs(NamedTuple):
    """Image–caption pairs, and a digest that changes when any file behind the images does."""

    pictures: list[Picture]
    captions: list[str]
    fingerprint: str


class AnchorDataModule(PixelDataModule):
    """The first image–caption pairs of a public collection, for `trainer.validate`.

    For ablations, a folder of labelled images is a collection too, and noise can stand in for the images.

    Args:
        root: Folder with images and a `captions.jsonl` or `metadata.jsonl` (`file_name`, and `captions`, `caption` or
            `text`), folder of a saved or parquet dataset, or id of a dataset on the hub; the first caption of each
            image is used. Or a folder `class/image` without these: an image's caption is then `a photo of a <class>.`,
            and the order is the first image of every class, then the second of every class, and so on.
        num_pairs: How many pairs to use, from the first on.
        base: Hub id or folder of the CLIP checkpoint whose preprocessing to apply.
        batch_size: Images per batch over all processes.
        cache: Whether to keep decoded images on disk, see `sap_lightning.data.cache`.
        noise: Replace the images by random noise, as a control: pixels uniform in 0…255 after resizing, the same at
            every use. The captions stay, and the images are not decoded.

    Raises:
        InputError: on use, for anything wrong with these arguments or with the data.
    """

    group = "anchors"

    def __init__(
        self,
        root: str = "sayakpaul/coco-30-val-2014",
        num_pairs: int = 32,
        base: str = "openai/clip-vit-base-patch16",
        batch_size: int = 32,
        cache: bool = True,
        noise: bool = False,
    ) -> None:
        super().__init__(base, batch_size)
        check_at_least("anchors.num_pairs", num_pairs, 2)
        self.root = root
        self.num_pairs = num_pairs
        self.cache = cache
        self.noise = noise

    @property
    def captions(self) -> list[str]:
        """One caption per pair, in order."""
        return self._pairs.captions

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image or a caption does."""
        return digest(self._pairs.fingerprint, self.captions, self.noise)

    def images(self, base: str | None = None) -> Tensor:
        """All anchor images at once, normalised float (num_pairs, 3, H, W).

        Args:
            base: another checkpoint, whose preprocessing to apply instead.
        """
        preprocess = self._preprocess if base is None else Preprocess(base)
        return preprocess.normalise(torch.from_numpy(self._load(preprocess).images))

    def prepare_data(self) -> None:
        """Decode the anchors into the cache, in one process."""
        if self.cache:
            self._load(self._preprocess)

    def setup(self, stage: str | None = None) -> None:
        """Open the images, in every process.

        Args:
            stage: unused.
        """
        self._anchors = self._load(self._preprocess)

    def val_dataloader(self) -> DataLoader[AnchorBatch]:
        """The anchors in order, each once over all processes."""
        return self._in_order(self._anchors, f"{self.root}: anchors")

    @cached_property
    def _pairs(self) -> Pairs:
        folder = Path(self.root).expanduser()
        if folder.is_dir() and not is_table(folder):
            return pairs_in_folder(folder, self.num_pairs)
        return pairs_in_table(load_table(self.root, self.num_pairs), self.root, self.num_pairs)

    def _load(self, preprocess: Preprocess) -> AnchorSet:
        pictures, _, fingerprint = self._pairs
        if self.noise:
            return AnchorSet(noise_images((len(pictures), *preprocess.shape)))
        pixels = load_pixels(pictures, fingerprint, preprocess, self.cache)
        for position, reason in pixels.corrupt.items():
            raise InputError(f"{self.root}: anchor {pictures[position].name} cannot be decoded: {reason}")
        return AnchorSet(pixels.images)


def noise_images(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 pixels drawn uniformly, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).numpy()


def pairs_in_folder(folder: Path, num_pairs: int) -> Pairs:
    """The first pairs of a folder: those that a listing in it names, or without one those of its class folders.

    Raises:
        InputError: neither is there, a bad line, a missing image, or too few pairs.
    """
    listing = next((folder / name for name in LISTINGS if (folder / name).is_file()), None)
    files, captions = _listed(listing, num_pairs) if listing else _by_class(folder, num_pairs)
    return Pairs([file_picture(file, folder) for file in files], captions, file_fingerprint(files))


def _listed(listing: Path, num_pairs: int) -> tuple[list[Path], list[str]]:
    """Images and captions of a listing's first lines."""
    files, captions = [], []
    for where, entry in entries_in(listing):
        files.append(image_file(listing.parent, entry, where))
        captions.append(_caption(next((entry[key] for key in CAPTION_COLUMNS if key in entry), None), where))
        if len(files) == num_pairs:
            return files, captions
    raise InputError(f"{listing}: anchors.num_pairs is {num_pairs}, but the file has {len(files)}")


def _by_class(folder: Path, num_pairs: int) -> tuple[list[Path], list[str]]:
    """Images of `class/image`, one of every class in turn, with captions that name the class."""
    rounds = itertools.zip_longest(*(images_in(label) for label in subfolders(folder)))
    files = [file for one_of_each in rounds for file in one_of_each if file is not None][:num_pairs]
    if not files:
        raise InputError(
            f"{folder}: neither a {' or '.join(LISTINGS)} (one JSON object per line: file_name, captions)"
            f" nor images class/image, each {FORMATS_IN_WORDS}; anchors need one of them"
        )
    if len(files) < num_pairs:
        raise InputError(f"{folder}: anchors.num_pairs is {num_pairs}, but the class folders have {len(files)} images")
    return files, [CLASS_CAPTION.format(file.parent.name.replace("_", " ")) for file in files]


def pairs_in_table(table: datasets.Dataset, root: str, num_pairs: int) -> Pairs:
    """The first pairs of a table with an image and a caption column.

    Raises:
        InputError: no such columns, an empty caption, or too few rows.
    """
    image = image_column(table, root)
    column = next((name for name in CAPTION_COLUMNS if name in table.column_names), None)
    if column is None:
        raise InputError(f"{root}: no column {' or '.join(CAPTION_COLUMNS)} among {', '.join(table.column_names)}")
    if len(table) < num_pairs:
        raise InputError(f"{root}: anchors.num_pairs is {num_pairs}, but the dataset has {len(table)}")
    values = table.select_columns(column)[:num_pairs][column]
    captions = [_caption(value, f"{root}: row {row}") for row, value in enumerate(values)]
    return Pairs(table_pictures(table, image, range(num_pairs)), captions, table_fingerprint(table, image))


def captioned_images(listing: Path) -> list[tuple[Path, list[str]]]:
    """Each image that a `captions.jsonl` names, with all of its captions.

    Raises:
        InputError: a bad line, a missing image, or no line at all.
    """
    found = []
    for where, entry in entries_in(listing):
        value = next((entry[key] for key in CAPTION_COLUMNS if key in entry), None)
        captions = [_caption(one, where) for one in (value if isinstance(value, list) and value else [value])]
        found.append((image_file(listing.parent, entry, where), captions))
    if not found:
        raise InputError(f"{listing}: has no image; give a JSON object a line, with file_name and captions")
    return found


def entries_in(listing: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Each JSON object of a JSONL file with the words for where it stands; blank lines are passed over.

    Raises:
        InputError: it cannot be read, or a line is no JSON object.
    """
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{listing}: cannot be read ({error.strerror}); check that the file is there") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{listing}: is no text in UTF-8 ({error}); save it in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{listing}: line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {first_line(error)}") from error
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(entry).__name__}")
        yield where, entry


def image_file(folder: Path, entry: dict[str, object], where: str, key: str = "file_name") -> Path:
    """The image that an entry names under a key, below the folder.

    Raises:
        InputError: it names none, or one that is missing or outside.
    """
    name = entry.get(key)
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: {key} must be the name of an image, got {short(name)}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {key} {short(name)} points out of the folder")
    if not os.path.isfile(folder / name):  # which also takes a name that no file can have
        raise InputError(f"{where}: image {short(name)} is missing")
    return folder / name


def _caption(value: object, where: str) -> str:
    """The caption, or the first of several."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str) or not first.strip():
        raise InputError(f"{where}: needs a caption, or captions as a list of strings, got {short(value)}")
    if len(first) > MAX_CAPTION:
        raise InputError(f"{where}: the caption has {len(first)} characters; shorten it to at most {MAX_CAPTION}")
    if HALF_CHARACTER.search(first):
        raise InputError(
            f"{where}: the caption {short(first)} holds half a surrogate pair, no character; write it anew"
        )
    return first
