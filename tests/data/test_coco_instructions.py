"""Clients made of images that people have captioned and boxed."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from references import contents

from sap_lightning.data import coco_instructions
from sap_lightning.data.coco_instructions import make_clients
from sap_lightning.data.instructions import InstructionDataModule, read_samples
from sap_lightning.data.questions import TASKS
from sap_lightning.errors import InputError

CATEGORIES = ("person", "dog", "apple", "bus", "knife", "sheep")


def thing(category: str, box: tuple[float, ...], crowd: bool = False) -> dict[str, Any]:
    return {"category": category, "box": list(box), "crowd": crowd}


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """24 images of random things, in turn to train on and to test with."""
    rng, folder = np.random.default_rng(0), tmp_path / "coco"
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(24):
        name = f"images/{number:03}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)
        things = []
        for category in rng.choice(CATEGORIES, 4):
            (x1, y1), (x2, y2) = rng.uniform(0, 0.4, 2), rng.uniform(0.5, 1.0, 2)
            things.append(thing(str(category), (x1, y1, x2, y2), crowd=bool(rng.random() < 0.15)))
        split = ("train", "val")[number % 2]
        captions = [f"Caption {n} of {number}." for n in range(5)]
        entries.append({"file_name": name, "split": split, "captions": captions, "objects": things})
    return written(folder / "annotations.jsonl", entries)


def written(file: Path, entries: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def changed(annotations: Path, **fields: Any) -> Path:
    """The annotations with some fields of the third image replaced."""
    entries = read(annotations)
    entries[2] |= fields
    return written(annotations, entries)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def asked(file: Path) -> list[tuple[str, str, str]]:
    """The name of the image, the question and the answer of every sample."""
    return [
        (Path(one["image"]).name, one["conversations"][0]["value"].removeprefix("<image>\n"), turn["value"])
        for one in read(file)
        for turn in one["conversations"][1:]
    ]


def test_same_seed_gives_same_files(annotations, tmp_path):
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        make_clients(annotations, tmp_path / name, seed=seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


@pytest.mark.parametrize("clients", [1, 3])
def test_every_client_has_its_files_and_no_image_is_at_two_of_a_task(annotations, tmp_path, clients):
    make_clients(annotations, tmp_path / "clients", clients=clients)
    names = [path.name for path in sorted((tmp_path / "clients").iterdir())]
    assert names == sorted(f"{task}_{number}" for task in TASKS for number in range(1, clients + 1))
    seen: Counter[tuple[str, str]] = Counter()
    for name in names:
        folder = tmp_path / "clients" / name
        samples = [*read(folder / "train.jsonl"), *read(folder / "test.jsonl")]
        assert {one["task"] for one in samples} == {name.split("_")[0]}
        assert {one["image"] for one in samples} == {f"images/{path.name}" for path in (folder / "images").iterdir()}
        seen.update((name.split("_")[0], image) for image in {one["image"] for one in samples})
    assert set(seen.values()) == {1}


def test_images_to_train_on_are_not_those_to_test_with(annotations, tmp_path):
    make_clients(annotations, tmp_path / "clients")
    splits = {Path(entry["file_name"]).name: entry["split"] for entry in read(annotations)}
    for file, split in (("train.jsonl", "train"), ("test.jsonl", "val")):
        images = [image for path in (tmp_path / "clients").glob(f"*/{file}") for image, _, _ in asked(path)]
        assert {splits[image] for image in images} == {split}


def test_answers_are_what_the_annotations_say(annotations, tmp_path):
    make_clients(annotations, tmp_path / "clients")
    entries = {Path(entry["file_name"]).name: entry for entry in read(annotations)}
    singular = {
        "people": "person",
        "dogs": "dog",
        "apples": "apple",
        "buses": "bus",
        "knives": "knife",
        "sheep": "sheep",
    }
    kinds: Counter[str] = Counter()
    for image, question, answer in [one for file in (tmp_path / "clients").glob("*/*.jsonl") for one in asked(file)]:
        entry = entries[image]
        of = {name: [one for one in entry["objects"] if one["category"] == name] for name in CATEGORIES}
        if found := re.fullmatch(r"Is there an? (\w+) in the image\?", question):
            assert ("an " in question) == (found[1] == "apple")
            assert answer == ("yes" if of[found[1]] else "no")
        elif found := re.fullmatch(r"How many (\w+) are there in the image\?", question):
            things = of[singular[found[1]]]
            assert answer == str(len(things)) and things
            assert not any(one["crowd"] for one in things)
        elif found := re.fullmatch(r"Where is the (\w+)\?", question):
            (one,) = of[found[1]]
            assert not one["crowd"]
            assert answer == "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*one["box"])
        else:
            assert question == "Describe the image." and answer in entry["captions"]
        kinds[question.split()[0]] += 1
    assert min(kinds[word] for word in ("Is", "How", "Where", "Describe")) > 10


def test_yes_and_no_are_as_common_and_samples_are_at_most_so_many(annotations, tmp_path):
    make_clients(annotations, tmp_path / "clients", samples=12)
    for file in (tmp_path / "clients").glob("*/*.jsonl"):
        assert len(read(file)) <= 12
    for file in (tmp_path / "clients").glob("vqa_*/*.jsonl"):
        answers = [answer for _, _, answer in asked(file)]
        assert answers.count("yes") == answers.count("no") == 4


def test_more_than_ten_are_not_counted(annotations, tmp_path):
    many = [thing("dog", (0.0, 0.0, 1.0, 1.0)) for _ in range(11)]
    entries = [entry | {"objects": [*many, thing("bus", (0, 0, 1, 1))]} for entry in read(annotations)]
    make_clients(written(annotations, entries), tmp_path / "clients", samples=300)
    counted = [one for file in (tmp_path / "clients").glob("vqa_*/*.jsonl") for one in asked(file) if "How" in one[1]]
    assert {(question, answer) for _, question, answer in counted} == {("How many buses are there in the image?", "1")}


def test_a_box_that_has_no_extent_when_written_is_not_asked_for(annotations, tmp_path):
    tiny = thing("apple", (0.501, 0.2, 0.503, 0.6))
    entries = [entry | {"objects": [tiny, thing("bus", (0, 0, 1, 1))]} for entry in read(annotations)]
    make_clients(written(annotations, entries), tmp_path / "clients")
    places = [one for file in (tmp_path / "clients").glob("grounding_*/*.jsonl") for one in asked(file)]
    assert {question for _, question, _ in places} == {"Where is the bus?"}


def test_a_test_sample_of_captions_is_one_an_image(annotations, tmp_path):
    make_clients(annotations, tmp_path / "clients")
    for name in ("caption_1", "caption_2"):
        images = [image for image, _, _ in asked(tmp_path / "clients" / name / "test.jsonl")]
        assert len(images) == len(set(images)) == 6
        assert len(asked(tmp_path / "clients" / name / "train.jsonl")) == 6 * 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "dev"}, "split must be one of train, val, test, got 'dev'"),
        ({"captions": []}, "captions must be a list of texts that are not empty"),
        ({"captions": "A dog."}, "captions must be a list of texts that are not empty"),
        ({"captions": ["An <image>."]}, "captions must be a list of texts that are not empty and have no <image> in"),
        ({"captions": ["Half of \ud83d."]}, "captions must be a list of texts"),
        ({"split": ["train"]}, "split must be one of train, val, test, got ['train']"),
        ({"objects": [thing("<image>", (0, 0, 1, 1))]}, "object 1: expected an object with category (of texts that"),
        ({"objects": None}, "objects must be a list"),
        ({"objects": [3]}, "object 1: expected an object"),
        ({"objects": [thing("", (0, 0, 1, 1))]}, "object 1: expected an object"),
        ({"objects": [thing("dog", (0, 0, 1, 1)), thing("dog", (0.5, 0, 0.4, 1))]}, "object 2: box must be"),
        ({"objects": [thing("dog", (10, 10, 200, 200))]}, "object 1: box must be"),
        ({"objects": [thing("dog", (0, 0, float("nan"), 1))]}, "object 1: box must be"),
        ({"objects": [{"category": "dog", "box": "here"}]}, "object 1: box must be"),
        ({"objects": [{"category": "dog", "box": [0, 0, 1, 1], "crowd": "no"}]}, "object 1: crowd must be"),
        ({"file_name": "images/none.png"}, "image 'images/none.png' is missing"),
        ({"file_name": "../secret.png"}, "points out of the folder"),
        ({"file_name": "images/000.png"}, "an image '000.png' was named before"),
    ],
)
def test_a_faulty_line_is_named(annotations, tmp_path, fields, said):
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        make_clients(changed(annotations, **fields), tmp_path / "clients")
    assert str(refused.value).startswith(f"{annotations}: line 3: ")
    assert not (tmp_path / "clients").exists()


def test_too_few_images_are_said_and_nothing_is_left(annotations, tmp_path):
    with pytest.raises(InputError, match=r"12 train images leave client caption_13 without a question"):
        make_clients(annotations, tmp_path / "clients", clients=13)
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"samples": 2}, {"seed": -1}])
def test_a_number_out_of_range_is_refused_by_name(annotations, tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_clients(annotations, tmp_path / "clients", **wrong)


def test_the_server_s_conversations_are_the_first_captions_of_public_images(annotations, tmp_path):
    make_clients(annotations, tmp_path / "clients", anchors=annotations)
    found = read_samples(tmp_path / "clients" / "anchors.jsonl")
    expected = [json.loads(line) for line in annotations.read_text().splitlines()]
    assert [one.answer for one in found] == [one["captions"][0] for one in expected]
    for one, entry in zip(found, expected, strict=True):
        assert one.image.read_bytes() == (annotations.parent / entry["file_name"]).read_bytes()
    assert InstructionDataModule(str(tmp_path / "clients")).clients == tuple(
        f"{task}_{number}" for task in ("caption", "grounding", "vqa") for number in (1, 2)
    )


def test_an_empty_file_and_an_existing_folder_are_refused(annotations, tmp_path):
    with pytest.raises(InputError, match="already exists"):
        make_clients(annotations, tmp_path)
    with pytest.raises(InputError, match="has no image"):
        make_clients(written(tmp_path / "empty.jsonl", []), tmp_path / "clients")


def test_an_interrupted_command_leaves_nothing_behind(annotations, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(coco_instructions, "write_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_clients(annotations, tmp_path / "clients")
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


def test_the_command_tells_a_bad_file_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "none.jsonl"
    monkeypatch.setattr(sys, "argv", ["coco_instructions", str(file), str(tmp_path / "to")])
    # In this process, as another one takes seconds to import what this one has.
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(coco_instructions.__file__), run_name="__main__")
    (line,) = str(ended.value.code).splitlines()
    assert line.startswith(f"error: {file}: cannot be read")
