"""What is asked of images, and the lines that hold it."""

from __future__ import annotations

import json

import pytest

from sap_lightning.data.questions import box_answer, count, place, plural, presence, sample, with_article, write_samples


@pytest.mark.parametrize(
    ("one", "several"),
    [("dog", "dogs"), ("bus", "buses"), ("couch", "couches"), ("person", "people"), ("wine glass", "wine glasses")],
)
def test_plurals(one, several):
    assert plural(one) == several


def test_questions_have_the_image_first():
    assert presence("apple") == "<image>\nIs there an apple in the image?"
    assert count("sheep") == "<image>\nHow many sheep are there in the image?"
    assert place("cell phone") == "<image>\nWhere is the cell phone?"
    assert with_article("dog") == "a dog"


def test_a_box_is_written_with_so_many_decimals():
    assert box_answer((0, 0.126, 0.5, 1), 2) == "[0.00, 0.13, 0.50, 1.00]"
    assert box_answer((0, 0.126, 0.5, 1), 1) == "[0.0, 0.1, 0.5, 1.0]"


def test_a_line_is_a_sample_in_the_format_of_llava(tmp_path):
    write_samples(tmp_path / "train.jsonl", [sample("images/a.png", "vqa", presence("café"), "no")] * 2)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and "café" in lines[0]
    assert json.loads(lines[0]) == {
        "image": "images/a.png",
        "task": "vqa",
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a café in the image?"},
            {"from": "gpt", "value": "no"},
        ],
    }
