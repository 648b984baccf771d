"""``python -m sap_lightning.data.shapes.instructions FOLDER`` draws the world's clients of instruction tuning."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from sap_lightning.console import run_as_command
from sap_lightning.data import questions
from sap_lightning.data.questions import (
    ANCHORS_FILE,
    DESCRIBE,
    box_answer,
    count,
    place,
    presence,
    sample,
    write_samples,
)
from sap_lightning.data.shapes import arrangement, world
from sap_lightning.data.shapes.arrangement import MOST, Arrangement, arranged, several_of, some_things
from sap_lightning.data.shapes.world import CLASSES, COLOUR_TEMPLATES, MEDIA, STYLES
from sap_lightning.errors import check_at_least
from sap_lightning.files import cache_folder, new_folder

CLIENTS = (
    "caption_photo", "caption_sketch", "vqa_cartoon", "vqa_painting", "grounding_photo", "grounding_cartoon",
)  # fmt: skip
"""A task and the style of the client's pictures."""
DESCRIPTION = COLOUR_TEMPLATES[1]
"""The sentence that every caption client says, with the first of its style's media: what differs is what it sees."""
ANCHORS = 32
"""Pictures of all styles with captions, which the server has."""
DECIMALS = 1
"""Of boxes: a tiny model sees patches of an eighth."""


class Asked(NamedTuple):
    """A picture, what is asked of it, and the answer."""

    image: Image.Image
    question: str
    answer: str


def draw_clients(folder: str | Path, train: int = 240, test: int = 40, size: int = 64, seed: int = 0) -> None:
    """Draw two clients of each task, of different styles; the same seed gives the same files, bit for bit.

    A caption client names colours, things and background; a vqa client says in turn yes, no and how many; a grounding
    client gives the box of a thing, to one decimal.

    Args:
        folder: where to; must not exist yet. Gets `<task>_<style>/train.jsonl`, `test.jsonl` and `images/`, and the
            server's captions in `anchors.jsonl` beside `anchors/`.
        train: samples to train on, of each client.
        test: samples to test with, of each client.
        size: side of the square images, in pixels.
        seed: of all random choices.

    Raises:
        InputError: the folder exists, or a number is out of range.
    """
    for name, value, least in (("train", train, 1), ("test", test, 1), ("size", size, 16), ("seed", seed, 0)):
        check_at_least(name, value, least)
    with new_folder(folder) as draft:
        for number, client in enumerate(CLIENTS):
            (draft / client / "images").mkdir(parents=True)
            for part, (split, samples) in enumerate({"train": train, "test": test}.items()):
                rngs = (np.random.default_rng([seed, number, part, at]) for at in range(samples))
                write_samples(draft / client / f"{split}.jsonl", drawn(draft / client, split, size, rngs))
        (draft / "anchors").mkdir()
        rngs = (np.random.default_rng([seed, len(CLIENTS), at]) for at in range(ANCHORS))
        write_samples(draft / ANCHORS_FILE, anchors(draft, size, rngs))


def drawn_once() -> Path:
    """The clients as they are by default, drawn into the cache where they are not yet."""
    code = (
        Path(module.__file__ or "").read_bytes() for module in (world, arrangement, questions, sys.modules[__name__])
    )
    folder = cache_folder() / f"shapes_instructions-{sha256(b''.join(code)).hexdigest()[:12]}"
    if not folder.exists():
        draw_clients(folder)
    return folder


def drawn(folder: Path, split: str, size: int, rngs: Iterator[Generator]) -> Iterator[dict[str, object]]:
    """Samples of a client, their images saved."""
    task, style = folder.name.split("_")
    for at, rng in enumerate(rngs):
        name = f"images/{split}_{at:03}.png"
        image, question, answer = ASK[task](style, at, size, rng)
        image.save(folder / name)
        yield sample(name, task, question, answer)


def anchors(folder: Path, size: int, rngs: Iterator[Generator]) -> Iterator[dict[str, object]]:
    """The server's captions, of pictures in any style, their images saved."""
    for at, rng in enumerate(rngs):
        name = f"anchors/{at:03}.png"
        image, question, answer = caption(str(rng.choice(list(STYLES))), at, size, rng)
        image.save(folder / name)
        yield sample(name, "caption", question, answer)


def caption(style: str, number: int, size: int, rng: Generator) -> Asked:
    scene = arranged(style, some_things(rng), rng)
    return Asked(scene.draw(size, rng)[0], DESCRIBE, description(scene))


def description(scene: Arrangement) -> str:
    return scene.said(MEDIA[scene.style][0], DESCRIPTION)


def vqa(style: str, number: int, size: int, rng: Generator) -> Asked:
    """Yes, no and how many in turn."""
    if number % 3 == 2:
        thing, often = str(rng.choice(CLASSES)), int(rng.integers(1, MOST + 1))
        scene = arranged(style, several_of(thing, often, rng), rng)
        return Asked(scene.draw(size, rng)[0], count(thing), str(often))
    things = some_things(rng)
    scene = arranged(style, things, rng)
    absent = [name for name in CLASSES if name not in things]
    answer, asked = ("no", absent) if number % 3 else ("yes", things)
    return Asked(scene.draw(size, rng)[0], presence(str(rng.choice(asked))), answer)


def grounding(style: str, number: int, size: int, rng: Generator) -> Asked:
    scene = arranged(style, some_things(rng), rng)
    image, boxes = scene.draw(size, rng)
    at = rng.integers(len(boxes))
    return Asked(image, place(scene.items[at].thing), box_answer(boxes[at], DECIMALS))


ASK = {"caption": caption, "vqa": vqa, "grounding": grounding}


if __name__ == "__main__":
    run_as_command(draw_clients)
