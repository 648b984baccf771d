"""COCO's own folder is read as the JSONL of the same images is, and a fault in it is named by file and entry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sap_lightning.data.annotations import Annotated, Thing, read_annotations
from sap_lightning.data.coco_instructions import make_clients
from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError

CATEGORIES = {1: "person", 18: "dog", 53: "apple"}
WIDTH, HEIGHT = 8, 4


def instances(first: int, count: int) -> dict[str, Any]:
    """Images of a dog in one corner, and by turns a person, a crowd of people or none of them."""
    images, annotations = [], []
    for number in range(first, first + count):
        images.append({"id": number, "file_name": f"{number:03}.png", "width": WIDTH, "height": HEIGHT, "license": 3})
        found = [(18, [2.0, 1, 4.0, 2], 0), *[[], [(1, [0, 0, 8, 4], 0)], [(1, [0, 0, 8, 4], 1)]][number % 3]]
        for category, bbox, crowd in found:
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": category, "bbox": bbox, "iscrowd": crowd}
            )
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in CATEGORIES.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Nine images to train on and six to test with, each with two captions."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for name, first, count in (("train2017", 0, 9), ("val2017", 9, 6)):
        content = instances(first, count)
        captions = [
            {"id": 2 * one["id"] + n, "image_id": one["id"], "caption": f"A dog,\n number {one['id']}, seen {n}. \n"}
            for n in range(2)
            for one in content["images"]
        ]
        (folder / name).mkdir()
        for one in content["images"]:
            Image.new("RGB", (WIDTH, HEIGHT), (one["id"], 0, 0)).save(folder / name / one["file_name"])
        write(folder / f"annotations/instances_{name}.json", content)
        write(folder / f"annotations/captions_{name}.json", {"images": content["images"], "annotations": captions})
    return folder


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def change(file: Path, by: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    by(content)
    write(file, content)


def test_an_image_is_read_with_its_captions_and_things(coco):
    images = read_annotations(coco)
    assert [image.file.name for image in images] == [f"{number:03}.png" for number in range(15)]
    assert [image.split for image in images] == ["train"] * 9 + ["val"] * 6
    dog = Thing("dog", (0.25, 0.25, 0.75, 0.75), False)
    assert images[0] == Annotated(
        coco / "train2017/000.png", "train", ["A dog, number 0, seen 0.", "A dog, number 0, seen 1."], [dog]
    )
    assert images[1].things == [dog, Thing("person", (0.0, 0.0, 1.0, 1.0), False)]
    assert images[11].things == [dog, Thing("person", (0.0, 0.0, 1.0, 1.0), True)]


def test_clients_are_those_of_the_same_images_in_jsonl(coco, tmp_path):
    lines = [
        {
            "file_name": str(image.file.relative_to(coco)),
            "split": image.split,
            "captions": image.captions,
            "objects": [{"category": of.category, "box": of.box, "crowd": of.crowd} for of in image.things],
        }
        for image in read_annotations(coco)
    ]
    listing = coco / "annotations.jsonl"
    listing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path, name in ((coco, "from_folder"), (listing, "from_listing")):
        make_clients(path, tmp_path / name, clients=1)
    one, other = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "from_folder", tmp_path / "from_listing")
    )
    assert one == other and len(one) > 20
    assert InstructionDataModule(str(tmp_path / "from_folder")).clients == ("caption_1", "grounding_1", "vqa_1")


def test_a_box_may_reach_a_pixel_beyond_its_image_or_have_no_extent(coco):
    file = coco / "annotations/instances_train2017.json"
    change(file, lambda content: content["annotations"][0].update(bbox=[-0.5, 1, 9.0, 0.0]))
    assert read_annotations(coco)[0].things[0].box == (0.0, 0.25, 1.0, 0.25)
    change(file, lambda content: content["annotations"][0].update(bbox=[-0.5, 1, 0.2, 0.0]))
    assert read_annotations(coco)[0].things[0].box == (0.0, 0.25, 0.0, 0.25)


def test_captions_of_images_that_are_left_out_are_passed_over(coco):
    change(
        coco / "annotations/captions_val2017.json",
        lambda of: of["annotations"].append({"image_id": 99, "caption": "A"}),
    )
    assert len(read_annotations(coco)) == 15


TRAIN, CAPTIONS = "instances_train2017.json", "captions_train2017.json"


@pytest.mark.parametrize(
    ("file", "entry", "change_of", "said"),
    [
        (TRAIN, "images[2]", {"id": "2"}, "id must be a whole number, got '2'"),
        (TRAIN, "images[2]", {"id": 1}, "id 1 stands in an earlier one too"),
        (TRAIN, "images[0]", {"width": 0}, "width and height must be from 1 to 1000000, got 0 and 4"),
        (TRAIN, "images[0]", {"width": 10**400}, "width and height must be from 1 to 1000000, got 1000"),
        (TRAIN, "images[0]", {"height": 4.0}, "height must be a whole number, got 4.0"),
        (TRAIN, "images[2]", {"file_name": "none.png"}, "image 'none.png' is missing"),
        (TRAIN, "images[2]", {"file_name": "../val2017/009.png"}, "points out of the folder"),
        (TRAIN, "images[2]", {"file_name": "001.png"}, "an image '001.png' was named before"),
        (TRAIN, "categories[1]", {"id": 1}, "id 1 stands in an earlier one too"),
        (TRAIN, "categories[1]", {"name": " "}, "name must be of texts that are not empty and have no <image>"),
        (TRAIN, "annotations[1]", {"image_id": 14}, "image_id 14 is none of the file's"),
        (TRAIN, "annotations[1]", {"category_id": 2}, "category_id 2 is none of the file's"),
        (TRAIN, "annotations[1]", {"category_id": None}, "category_id must be a whole number, got None"),
        (TRAIN, "annotations[1]", {"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
        (TRAIN, "annotations[1]", {"bbox": [0, 0, 9.5, 1]}, "in pixels of an image of 8 × 4, got [0"),
        (TRAIN, "annotations[1]", {"bbox": [0, -1.5, 1, 1]}, "bbox must be x, y, width, height in pixels"),
        (TRAIN, "annotations[1]", {"bbox": [0, 0, -1, 1]}, "bbox must be x, y, width, height in pixels"),
        (TRAIN, "annotations[1]", {"bbox": [0, 0, float("nan"), 1]}, "bbox must be x, y, width, height in pixels"),
        (TRAIN, "annotations[1]", {"bbox": [0, 0, 1]}, "bbox must be x, y, width, height in pixels"),
        (TRAIN, "annotations[1]", {"bbox": ["0", 0, 1, 1]}, "bbox must be x, y, width, height in pixels"),
        (CAPTIONS, "annotations[1]", {"caption": " \n"}, "caption must be of texts that are not empty"),
        (CAPTIONS, "annotations[1]", {"image_id": 1.0}, "image_id must be a whole number, got 1.0"),
    ],
)  # fmt: skip
def test_a_faulty_entry_is_named(coco, tmp_path, file, entry, change_of, said):
    path = coco / "annotations" / file
    key, number = re.fullmatch(r"(\w+)\[(\d+)\]", entry).groups()
    change(path, lambda content: content[key][int(number)].update(change_of))
    with pytest.raises(InputError) as refused:
        make_clients(coco, tmp_path / "clients")
    assert str(refused.value).startswith(f"{path}: {entry}: ")
    assert said in str(refused.value)
    assert not (tmp_path / "clients").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (TRAIN, "[", "cannot be read as JSON"),
        (TRAIN, "[]", "expected a JSON object, got list"),
        (TRAIN, '{"images": 3}', "images must be a list, got 3"),
        (TRAIN, '{"images": [3]}', "images[0]: expected a JSON object, got 3"),
        (TRAIN, '{"images": [], "categories": []}', "annotations must be a list, got None"),
        (CAPTIONS, "\udcff", "cannot be read as JSON"),
        (CAPTIONS, None, "cannot be read (No such file or directory); COCO's annotations have such a file"),
    ],
)
def test_a_faulty_file_is_named(coco, file, content, said):
    path = coco / "annotations" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=re.escape(f"{path}: {said}")):
        read_annotations(coco)


def test_an_image_without_a_caption_is_named_with_the_file_that_has_none(coco):
    captions = coco / "annotations" / CAPTIONS
    change(captions, lambda content: content.update(annotations=content["annotations"][1:9]))
    with pytest.raises(InputError, match=rf"{TRAIN}: images\[0\]: {re.escape(str(captions))} has no caption of it"):
        read_annotations(coco)


def test_a_folder_that_is_not_coco_s_and_a_split_that_is_none_are_named(coco, tmp_path):
    with pytest.raises(InputError, match=r"has no annotations/instances_<images>.json"):
        read_annotations(tmp_path)
    (coco / "annotations" / TRAIN).rename(coco / "annotations/instances_minival.json")
    with pytest.raises(
        InputError, match=r"instances_minival.json: what comes after instances_ must begin with train, val"
    ):
        read_annotations(coco)
