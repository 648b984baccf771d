"""Images that people have captioned and boxed: COCO's own folder, or a JSONL file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sap_lightning.data.anchors import HALF_CHARACTER, entries_in, image_file
from sap_lightning.data.questions import IMAGE
from sap_lightning.errors import InputError, first_line, short

SPLITS = {"train": "train", "val": "test", "test": "test"}
"""Splits of annotations, and which of a client's files they go to."""
LARGEST = 10**6
"""Pixels that a side of an image may have."""
BEYOND = 1.0
"""Pixels by which a box of COCO's may reach beyond its image, as its corners are rounded."""

TEXTS = f"texts that are not empty and have no {IMAGE} in them"

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One object of an image.

    Attributes:
        category: what it is.
        box: x1, y1, x2, y2 in shares of width and height, y down.
        crowd: whether it stands for several that were not told apart.
    """

    category: str
    box: Box
    crowd: bool


@dataclass(frozen=True)
class Annotated:
    """What people said and saw of one image."""

    file: Path
    split: str
    captions: list[str]
    things: list[Thing]

    @property
    def categories(self) -> set[str]:
        """What is in the image, one by one or as a crowd."""
        return {thing.category for thing in self.things}

    @property
    def told_apart(self) -> dict[str, list[Thing]]:
        """Its things by category, without those categories of which there is a crowd."""
        crowds = {thing.category for thing in self.things if thing.crowd}
        return {
            category: [thing for thing in self.things if thing.category == category]
            for category in sorted(self.categories - crowds)
        }


def read_annotations(path: Path) -> list[Annotated]:
    """The images of a JSONL file, or of COCO's folder, in their order.

    Raises:
        InputError: an entry is faulty, two images share a name, or there is none.
    """
    images: dict[str, Annotated] = {}
    for where, image in _in_folder(path) if path.is_dir() else _in_listing(path):
        if image.file.name in images:
            raise InputError(f"{where}: an image {short(image.file.name)} was named before; name each once")
        images[image.file.name] = image
    if not images:
        raise InputError(f"{path}: has no image; give a JSON object a line, with file_name, split, captions, objects")
    return list(images.values())


# A JSONL file


def _in_listing(file: Path) -> Iterator[tuple[str, Annotated]]:
    for where, entry in entries_in(file):
        image = image_file(file.parent, entry, where)
        split, captions, objects = (entry.get(key) for key in ("split", "captions", "objects"))
        if not isinstance(split, str) or split not in SPLITS:
            raise InputError(f"{where}: split must be one of {', '.join(SPLITS)}, got {short(split)}")
        if not _are_names(captions):
            raise InputError(f"{where}: captions must be a list of {TEXTS}, got {short(captions)}")
        if not isinstance(objects, list):
            raise InputError(f"{where}: objects must be a list, got {short(objects)}")
        yield where, Annotated(image, split, captions, list(_things_in(objects, where)))


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(map(_is_name, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and IMAGE not in value and not HALF_CHARACTER.search(value)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _things_in(objects: list[Any], where: str) -> Iterator[Thing]:
    for number, entry in enumerate(objects, start=1):
        what = f"{where}: object {number}"
        if not isinstance(entry, dict) or not _are_names([entry.get("category")]):
            raise InputError(
                f"{what}: expected an object with category (of {TEXTS}), box and crowd, got {short(entry)}"
            )
        box: Any = entry.get("box")
        crowd = entry.get("crowd", False)
        if not _is_box(box):
            raise InputError(f"{what}: box must be x1 < x2 and y1 < y2 in [0, 1] as [x1, y1, x2, y2], got {short(box)}")
        if not isinstance(crowd, bool):
            raise InputError(f"{what}: crowd must be true or false, got {short(crowd)}")
        x1, y1, x2, y2 = box
        yield Thing(_in_one_line(entry["category"]), (x1, y1, x2, y2), crowd)


def _is_box(value: Any) -> bool:
    if not _are_four_numbers(value):
        return False
    x1, y1, x2, y2 = value
    return bool(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1)


def _are_four_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(one) in (int, float) for one in value)


# COCO's folder (Lin et al. 2014; https://cocodataset.org/#format-data)


def _in_folder(folder: Path) -> Iterator[tuple[str, Annotated]]:
    files = sorted(folder.glob("annotations/instances_*.json"))
    if not files:
        raise InputError(
            f"{folder}: has no annotations/instances_<images>.json; give COCO's folder as it is unpacked, or a JSONL"
            " file"
        )
    for file in files:
        yield from _in_instances(folder, file)


def _in_instances(folder: Path, file: Path) -> Iterator[tuple[str, Annotated]]:
    """The images of one file of COCO's, with their captions from the file beside it."""
    name = file.stem.removeprefix("instances_")
    split = next((split for split in SPLITS if name.startswith(split)), None)
    if split is None:
        raise InputError(f"{file}: what comes after instances_ must begin with {', '.join(SPLITS)}; rename the file")
    captions_file = file.with_name(f"captions_{name}.json")
    content, captions = _read(file), _captions_in(captions_file)
    images = _by_id(content, "images", file)
    things = _things_by_image(content, file, images)
    for number, (where, entry) in images.items():
        if number not in captions:
            raise InputError(f"{where}: {captions_file} has no caption of it; add one, or leave the image out")
        yield where, Annotated(image_file(folder / name, entry, where), split, captions[number], things[number])


def _captions_in(file: Path) -> dict[int, list[str]]:
    """The captions of each image, by its id, on one line each."""
    found: dict[int, list[str]] = defaultdict(list)
    for where, entry in _entries(_read(file), "annotations", file):
        caption: Any = entry.get("caption")
        if not _are_names([caption]):
            raise InputError(f"{where}: caption must be of {TEXTS}, got {short(caption)}")
        found[_whole(entry, "image_id", where)].append(_in_one_line(caption))
    return found


def _things_by_image(
    content: dict[str, Any], file: Path, images: Mapping[int, tuple[str, dict[str, Any]]]
) -> dict[int, list[Thing]]:
    categories = _by_id(content, "categories", file)
    things: dict[int, list[Thing]] = defaultdict(list)
    for where, entry in _entries(content, "annotations", file):
        image, category = (_whole(entry, key, where) for key in ("image_id", "category_id"))
        if image not in images or category not in categories:
            what = "image_id" if image not in images else "category_id"
            raise InputError(f"{where}: {what} {entry[what]} is none of the file's; add what it means, or leave it out")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise InputError(f"{where}: iscrowd must be 0 or 1, got {short(crowd)}")
        place, named = categories[category]
        if not _are_names([named.get("name")]):
            raise InputError(f"{place}: name must be of {TEXTS}, got {short(named.get('name'))}")
        things[image].append(
            Thing(_in_one_line(named["name"]), _shares(entry.get("bbox"), *images[image], where), bool(crowd))
        )
    return things


def _shares(bbox: Any, of: str, image: dict[str, Any], where: str) -> Box:
    """x, y, width, height in pixels as x1, y1, x2, y2 in shares of the image; COCO has a few without an extent."""
    width, height = (_whole(image, key, of) for key in ("width", "height"))
    if not 1 <= min(width, height) <= max(width, height) <= LARGEST:
        raise InputError(f"{of}: width and height must be from 1 to {LARGEST}, got {short(width)} and {short(height)}")
    if _are_four_numbers(bbox):
        x, y, w, h = bbox
        inside = min(x, y) >= -BEYOND and x + w <= width + BEYOND and y + h <= height + BEYOND
        if inside and w >= 0 and h >= 0:
            corners = x / width, y / height, (x + w) / width, (y + h) / height
            x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in corners)
            return x1, y1, x2, y2
    raise InputError(
        f"{where}: bbox must be x, y, width, height in pixels of an image of {width} × {height}, got {short(bbox)}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); COCO's annotations have such a file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _by_id(content: dict[str, Any], key: str, file: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """The entries of a list by their id, each with the words for where it stands."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for where, entry in _entries(content, key, file):
        number = _whole(entry, "id", where)
        if number in found:
            raise InputError(f"{where}: id {number} stands in an earlier one too; give each its own")
        found[number] = where, entry
    return found


def _entries(content: dict[str, Any], key: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise InputError(f"{file}: {key} must be a list, got {short(entries)}")
    for number, entry in enumerate(entries):
        where = f"{file}: {key}[{number}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected a JSON object, got {short(entry)}")
        yield where, entry


def _whole(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise InputError(f"{where}: {key} must be a whole number, got {short(value)}")
    return value
