"""A folder of a user's own images, without labels, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from sap_lightning.data.cache import load_pixels, report_corrupt
from sap_lightning.data.images import FORMATS_IN_WORDS, file_picture, is_image
from sap_lightning.data.loaders import Batch, PixelDataset
from sap_lightning.data.names import check_names, spelling
from sap_lightning.data.pixels import PixelDataModule
from sap_lightning.errors import InputError, short


class ImageFolderDataModule(PixelDataModule):
    """All images below a folder in the order of their paths, for `trainer.predict`.

    Args:
        folder: where the images are, at any depth.
        class_names: what they may be, for the prompts.
        base: hub id or folder of the CLIP checkpoint whose preprocessing to apply.
        batch_size: images per batch.
        class_groups: classes of each of several tasks, by its name; an image then is of one class of each.

    Attributes:
        groups: by task the numbers of its classes, in order; none without class_groups.
        names: path below the folder of every image; known after `setup`.

    Raises:
        InputError: there are no class names, or one twice, or one is not in one group; on use, when the folder holds no
            images, or more than one in a hundred cannot be decoded (fewer are passed over and logged).
    """

    names: list[str]

    def __init__(
        self,
        folder: str | Path,
        class_names: Sequence[str],
        base: str = "openai/clip-vit-base-patch16",
        batch_size: int = 64,
        class_groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(base, batch_size)
        if isinstance(class_names, str):
            raise InputError(f"class_names {short(class_names)}: is one name; give a list of them")
        if len(class_names) < 2 or len(set(map(spelling, class_names))) < len(class_names):
            raise InputError(f"class_names must name at least two classes, each once, got {list(class_names)}")
        check_names("data.class_names", "class", class_names)
        self.folder = Path(folder)
        self.class_names = list(class_names)
        self.groups = {} if class_groups is None else _numbers(self.class_names, class_groups)

    def setup(self, stage: str | None = None) -> None:
        """Decodes the images."""
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder; give one with images, at any depth")
        files = sorted(filter(is_image, self.folder.rglob("*")))
        if not files:
            raise InputError(f"{self.folder}: no images; give a folder with files of {FORMATS_IN_WORDS}")
        pictures = [file_picture(file, self.folder) for file in files]
        pixels = load_pixels(pictures, "", self._preprocess, cache=False)
        report_corrupt(pictures, pixels, str(self.folder))
        rows = [row for row in range(len(pictures)) if row not in pixels.corrupt]
        self.names = [pictures[row].name for row in rows]
        unlabelled = torch.full((len(pictures),), -1)
        self._images = PixelDataset(pixels.images, unlabelled, torch.tensor(rows))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every image once, in order."""
        return self._in_order(self._images, str(self.folder))


def _numbers(class_names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The numbers of each group's classes, in order."""
    check_names("class_groups", "group", groups)
    for group, names in groups.items():
        if unknown := [name for name in names if name not in class_names]:
            raise InputError(f"class_groups: {short(unknown[0])} of {group} is none of the classes {list(class_names)}")
        if len(names) < 2:
            raise InputError(f"class_groups: {group} has fewer than two classes; name what to choose from")
    for name in class_names:
        within = [group for group, names in groups.items() for one in names if one == name]
        if len(within) != 1:
            place = f"in {' and in '.join(within)}" if within else "in no group"
            raise InputError(f"class_groups: class {name} is {place}; put each class into one group")
    return {group: sorted(map(class_names.index, names)) for group, names in groups.items()}
