"""Where labelled images come from: a folder `domain/class/image`, or the table of a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import datasets

from sap_lightning.data.images import FORMATS_IN_WORDS, Picture, file_picture, is_image
from sap_lightning.data.names import check_names, refuse_look_alikes
from sap_lightning.data.tables import image_column, is_table, load_table, table_fingerprint, table_pictures
from sap_lightning.errors import InputError, short
from sap_lightning.fingerprints import digest, file_fingerprint

MOST_DIGITS = 1000
"""Names of so many are sorted as texts, as Python reads no number of any length."""


class Samples(NamedTuple):
    """The labelled images of one domain.

    Attributes:
        pictures: encoded images, in an order that does not depend on the machine.
        classes: class name of each picture.
        fingerprint: digest that changes when any file behind the pictures does.
    """

    pictures: list[Picture]
    classes: list[str]
    fingerprint: str


class Source(Protocol):
    """A dataset of several domains.

    Attributes:
        domains: domain names, sorted.
        classes: class names over all domains, in label order.
    """

    domains: list[str]
    classes: list[str]

    def samples(self, domain: str) -> Samples:
        """The images of one domain, looked up anew at every call."""


def open_source(root: str, domain_column: str, label_column: str) -> Source:
    """Open what `root` names.

    Args:
        root: folder `domain/class/image`, folder of a saved or parquet dataset, or id of a dataset on the hub.
        domain_column: column of a dataset that names the domain.
        label_column: column of a dataset that holds the class.

    Raises:
        InputError: nothing usable there.
    """
    folder = Path(root).expanduser()
    source: Source
    if folder.is_dir() and not is_table(folder):
        source = ImageFolder(folder)
    else:
        source = ImageTable(load_table(root), root, domain_column, label_column)
    check_names(root, "domain", source.domains)
    check_names(root, "class", source.classes)
    # Spellings of a class are one class; of a domain they would be two clients, who share a folder on some disks.
    refuse_look_alikes(root, "domain", source.domains)
    return source


class ImageFolder:
    """A folder `domain/class/image`; hidden files, other files and folders without images are passed over.

    Classes are in alphabetical order, or by value where all are numbers.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        per_domain = {
            domain.name: [name.name for name in subfolders(domain) if next(images_in(name), None)]
            for domain in subfolders(root)
        }
        self.domains = sorted(domain for domain, classes in per_domain.items() if classes)
        self.classes = in_order(set().union(*per_domain.values()))
        if not self.domains:
            raise InputError(
                f"{root}: no images; expected domain/class/image, each {FORMATS_IN_WORDS}, or a saved dataset"
            )

    def samples(self, domain: str) -> Samples:
        """The images of one domain sorted by class, then by file name."""
        files = [file for folder in subfolders(self._root / domain) for file in images_in(folder)]
        return Samples(
            [file_picture(file, self._root) for file in files],
            [file.parent.name for file in files],
            file_fingerprint(files),
        )


class ImageTable:
    """A table with an image, a domain and a label column."""

    def __init__(self, table: datasets.Dataset, root: str, domain_column: str, label_column: str) -> None:
        for key, column in (("domain_column", domain_column), ("label_column", label_column)):
            if column not in table.features:
                raise InputError(f"{root}: no column {column!r}; set {key} to one of {', '.join(table.column_names)}")
        self._table, self._root = table, root
        self._image_column = image_column(table, root)
        self._domains = _names(table, domain_column, root)
        self._labels = _names(table, label_column, root)
        self.domains = sorted(set(self._domains))
        label = table.features[label_column]
        self.classes = list(label.names) if isinstance(label, datasets.ClassLabel) else in_order(set(self._labels))
        if not self.domains:
            raise InputError(f"{root}: the dataset has no rows")

    def samples(self, domain: str) -> Samples:
        """The images of one domain in the table's order."""
        rows = [row for row, name in enumerate(self._domains) if name == domain]
        pictures = table_pictures(self._table, self._image_column, rows)
        fingerprint = table_fingerprint(self._table, self._image_column)
        return Samples(pictures, [self._labels[row] for row in rows], digest(fingerprint, rows))


def _names(table: datasets.Dataset, column: str, root: str) -> list[str]:
    """A column of strings or class labels as strings."""
    feature = table.features[column]
    values = table.select_columns(column).with_format(None)[:][column]
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value is None or value < 0 else feature.names[value] for value in values]
    elif not (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")):
        raise InputError(f"{root}: column {column!r} must hold strings or class labels, got {short(feature)}")
    if None in values:
        raise InputError(f"{root}: row {values.index(None)} has no {column!r}")
    return values


def in_order(names: Collection[str]) -> list[str]:
    """Names sorted: 2 before 10 where all are numbers."""
    if all(name.isdecimal() and len(name) < MOST_DIGITS for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return [path for path in _visible(folder) if path.is_dir()]


def images_in(folder: Path) -> Iterator[Path]:
    """The image files in a folder, sorted, without hidden ones."""
    return filter(is_image, _visible(folder))


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from error
