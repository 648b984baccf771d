"""``python -m sap_lightning.data.coco_instructions ANNOTATIONS FOLDER`` makes clients of captioned, boxed images."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.random import Generator

from sap_lightning.console import run_as_command
from sap_lightning.data.anchors import captioned_images, entries_in, image_file
from sap_lightning.data.questions import (
    ANCHORS_FILE,
    DESCRIBE,
    TASKS,
    box_answer,
    count,
    place,
    presence,
    sample,
    write_samples,
)
from sap_lightning.errors import InputError, check_at_least, short
from sap_lightning.files import new_folder, refuse_existing

SPLITS = {"train": "train", "val": "test", "test": "test"}
"""Splits of the annotations, and which of a client's files they go to."""
MOST = 10
"""What is counted up to."""
DECIMALS = 2

Box = tuple[float, float, float, float]
Asked = tuple[str, str]
"""A question and its answer."""


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


def make_clients(
    annotations: str | Path,
    folder: str | Path,
    clients: int = 2,
    samples: int = 200,
    seed: int = 0,
    anchors: str | Path | None = None,
) -> None:
    """Write clients of three tasks, each with images of its own; the same seed gives the same files.

    A caption client describes an image; a vqa client says yes, no or how many; a grounding client gives the box of
    what is there once. Of the yes/no questions half are answered with no: what they ask for is not in the image and
    drawn as often as it is in others (*popular* of POPE, Li et al. 2023, https://arxiv.org/abs/2305.10355).

    Args:
        annotations: JSONL file beside its images, a line an image: `file_name`, `split` (train, val or test),
            `captions`, and `objects`, each with `category`, `box` (x1, y1, x2, y2 in shares of width and height) and
            `crowd`.
        folder: where to; must not exist yet. Gets `<task>_<number>/train.jsonl`, `test.jsonl` and `images/`.
        clients: of each task; images are dealt among them, so that none is at two of a task.
        samples: of a client at most, in each of its two files.
        seed: of all random choices.
        anchors: JSONL file beside its images, `file_name` and `captions`; the first caption of each is one of the
            server's public conversations, `anchors.jsonl`, at which `sap` looks.

    Raises:
        InputError: the folder exists, a number is out of range, a line is faulty, or there are too few images.
    """
    refuse_existing(folder)
    for name, value, least in (("clients", clients, 1), ("samples", samples, 3), ("seed", seed, 0)):
        check_at_least(name, value, least)
    images = read_annotations(Path(annotations))
    with new_folder(folder) as draft:
        for number, task in enumerate(TASKS):
            rng = np.random.default_rng([seed, number])
            for split in ("train", "test"):
                chosen = [image for image in images if SPLITS[image.split] == split]
                dealt = [chosen[at] for at in rng.permutation(len(chosen))]
                hands = [dealt[client::clients] for client in range(clients)]
                for client, hand in enumerate(hands, start=1):
                    name = f"{task}_{client}"
                    drawn = questions_of(task, hand, split, samples, images, rng)
                    if not drawn:
                        raise InputError(
                            f"{annotations}: {len(chosen)} {split} images leave client {name} without a question; give"
                            " more images or fewer clients"
                        )
                    write(draft / name, task, split, drawn)
        if anchors is not None:
            write_anchors(draft, Path(anchors))


def questions_of(
    task: str, images: Sequence[Annotated], split: str, most: int, all_images: Sequence[Annotated], rng: Generator
) -> list[tuple[Annotated, Asked]]:
    """What a client is asked of its images, in random order; as many of each image as of another where there are."""
    if task == "vqa":
        third = most // 3
        yes_no = balanced(images, all_images, (most - third) // 2, rng)
        drawn = yes_no + in_turn(images, counts, most - len(yes_no), rng)
    else:
        drawn = in_turn(images, descriptions if task == "caption" else places, most, rng)
    if task == "caption" and split == "test":
        drawn = [(image, (DESCRIBE, image.captions[0])) for image in images][:most]
    return [drawn[at] for at in rng.permutation(len(drawn))]


def in_turn(
    images: Sequence[Annotated], ask: Callable[[Annotated], list[Asked]], most: int, rng: Generator
) -> list[tuple[Annotated, Asked]]:
    """One question of every image, then a second, until there are enough."""
    asked = [[(image, one) for one in ask(image)] for image in images]
    shuffled = [[of[at] for at in rng.permutation(len(of))] for of in asked]
    rounds = range(max(map(len, shuffled), default=0))
    return [of[number] for number in rounds for of in shuffled if number < len(of)][:most]


def descriptions(image: Annotated) -> list[Asked]:
    return [(DESCRIBE, caption) for caption in image.captions]


def counts(image: Annotated) -> list[Asked]:
    return [(count(name), str(len(of))) for name, of in image.told_apart.items() if len(of) <= MOST]


def places(image: Annotated) -> list[Asked]:
    """Of what is there once, and has an extent when written."""
    once = {name: of[0].box for name, of in image.told_apart.items() if len(of) == 1}
    rounded = {name: [round(value, DECIMALS) for value in box] for name, box in once.items()}
    return [
        (place(name), box_answer(once[name], DECIMALS))
        for name, (x1, y1, x2, y2) in rounded.items()
        if x1 < x2 and y1 < y2
    ]


def balanced(
    images: Sequence[Annotated], all_images: Sequence[Annotated], most: int, rng: Generator
) -> list[tuple[Annotated, Asked]]:
    """Pairs of a question that is answered with yes and one that is answered with no, of the same image."""
    often = Counter(category for image in all_images for category in image.categories)

    def absent(image: Annotated) -> str | None:
        names = sorted(often.keys() - image.categories)
        shares = np.array([often[name] for name in names], dtype=float)
        return str(rng.choice(names, p=shares / shares.sum())) if names else None

    present = in_turn(images, lambda image: [(name, "yes") for name in sorted(image.categories)], most, rng)
    pairs = [(image, name, other) for image, (name, _) in present if (other := absent(image))]
    yes: list[tuple[Annotated, Asked]] = [(image, (presence(name), "yes")) for image, name, _ in pairs]
    return yes + [(image, (presence(other), "no")) for image, _, other in pairs]


def write(folder: Path, task: str, split: str, drawn: Sequence[tuple[Annotated, Asked]]) -> None:
    """Writes one file of a client, and its images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for file in {image.file for image, _ in drawn}:
        shutil.copyfile(file, folder / "images" / file.name)
    lines = [sample(f"images/{image.file.name}", task, *asked) for image, asked in drawn]
    write_samples(folder / f"{split}.jsonl", lines)


def write_anchors(folder: Path, listing: Path) -> None:
    """Writes the server's public conversations, and their images."""
    (folder / "anchors").mkdir()
    lines = []
    for number, (file, (caption, *_)) in enumerate(captioned_images(listing)):
        name = f"anchors/{number:03}{file.suffix}"
        shutil.copyfile(file, folder / name)
        lines.append(sample(name, "caption", DESCRIBE, caption))
    write_samples(folder / ANCHORS_FILE, lines)


def read_annotations(file: Path) -> list[Annotated]:
    """The images of a file, in its order.

    Raises:
        InputError: a line is faulty, two images share a name, or the file has none.
    """
    images: dict[str, Annotated] = {}
    for where, entry in entries_in(file):
        image = annotated(file.parent, entry, where)
        if image.file.name in images:
            raise InputError(
                f"{where}: an image {short(image.file.name)} stands in an earlier line too; name each once"
            )
        images[image.file.name] = image
    if not images:
        raise InputError(f"{file}: has no image; give a JSON object a line, with file_name, split, captions, objects")
    return list(images.values())


def annotated(folder: Path, entry: dict[str, Any], where: str) -> Annotated:
    image = image_file(folder, entry, where)
    split, captions, objects = (entry.get(key) for key in ("split", "captions", "objects"))
    if split not in SPLITS:
        raise InputError(f"{where}: split must be one of {', '.join(SPLITS)}, got {short(split)}")
    if not is_list_of_names(captions):
        raise InputError(f"{where}: captions must be a list of strings, got {short(captions)}")
    if not isinstance(objects, list):
        raise InputError(f"{where}: objects must be a list, got {short(objects)}")
    return Annotated(image, split, captions, list(things_in(objects, where)))


def is_list_of_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one.strip() for one in value)


def things_in(objects: list[Any], where: str) -> Iterator[Thing]:
    for number, entry in enumerate(objects, start=1):
        what = f"{where}: object {number}"
        if not isinstance(entry, dict) or not is_list_of_names([entry.get("category")]):
            raise InputError(f"{what}: expected an object with category, box and crowd, got {short(entry)}")
        box: Any = entry.get("box")
        crowd = entry.get("crowd", False)
        if not is_box(box):
            raise InputError(f"{what}: box must be x1 < x2 and y1 < y2 in [0, 1] as [x1, y1, x2, y2], got {short(box)}")
        if not isinstance(crowd, bool):
            raise InputError(f"{what}: crowd must be true or false, got {short(crowd)}")
        x1, y1, x2, y2 = box
        yield Thing(entry["category"], (x1, y1, x2, y2), crowd)


def is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4 or not all(type(one) in (int, float) for one in value):
        return False
    x1, y1, x2, y2 = value
    return bool(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1)


if __name__ == "__main__":
    run_as_command(make_clients)
