"""``python -m sap_lightning.data.coco_instructions ANNOTATIONS FOLDER`` makes clients of captioned, boxed images."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator

from sap_lightning.console import run_as_command
from sap_lightning.data.anchors import captioned_images
from sap_lightning.data.annotations import SPLITS, Annotated, read_annotations
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
from sap_lightning.errors import InputError, check_at_least
from sap_lightning.files import new_folder, refuse_existing

MOST = 10
"""What is counted up to."""
DECIMALS = 2

Asked = tuple[str, str]
"""A question and its answer."""


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
        annotations: COCO's folder as it is unpacked, with `annotations/instances_<images>.json` and
            `captions_<images>.json` beside folders `<images>`, such as train2017 and val2017: clients train on those
            whose name begins with train, and are tested with those of val or test. Or a JSONL file beside its images, a
            line an image: `file_name`, `split` (train, val or test), `captions`, and `objects`, each with `category`,
            `box` (x1, y1, x2, y2 in shares of width and height) and `crowd`.
        folder: where to; must not exist yet. Gets `<task>_<number>/train.jsonl`, `test.jsonl` and `images/`.
        clients: of each task; images are dealt among them, so that none is at two of a task.
        samples: of a client at most, in each of its two files.
        seed: of all random choices.
        anchors: JSONL file beside its images, `file_name` and `captions`; the first caption of each is one of the
            server's public conversations, `anchors.jsonl`, at which `sap` looks.

    Raises:
        InputError: the folder exists, a number is out of range, an entry is faulty, or there are too few images.
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


if __name__ == "__main__":
    run_as_command(make_clients)
