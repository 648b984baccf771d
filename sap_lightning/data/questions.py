"""What clients of instruction tuning are asked of images, and the files that hold questions and answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TASKS = ("caption", "vqa", "grounding")
ANCHORS_FILE = "anchors.jsonl"
"""The server's public conversations, beside the clients' folders."""
IMAGE = "<image>"
"""What stands for the image in a question."""
DESCRIBE = f"{IMAGE}\nDescribe the image."
IRREGULAR = {
    "person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "fish": "fish", "skis": "skis",
    "scissors": "scissors",
}  # fmt: skip
"""Plurals of COCO's categories and the shapes world's things that no rule gives."""


def presence(thing: str) -> str:
    """The question that is answered with yes or no."""
    return f"{IMAGE}\nIs there {with_article(thing)} in the image?"


def count(thing: str) -> str:
    """The question that is answered with a number."""
    return f"{IMAGE}\nHow many {plural(thing)} are there in the image?"


def place(thing: str) -> str:
    """The question that is answered with a box."""
    return f"{IMAGE}\nWhere is the {thing}?"


def box_answer(box: Sequence[float], decimals: int) -> str:
    """A box (x1, y1, x2, y2), in shares of width and height with y down, as it is written in an answer."""
    return f"[{', '.join(f'{value:.{decimals}f}' for value in box)}]"


def sample(image: str, task: str, question: str, answer: str) -> dict[str, Any]:
    """One line of a client's file, in the format of LLaVA (Liu et al. 2023, https://arxiv.org/abs/2304.08485).

    Args:
        image: its path below the client's folder.
        task: one of TASKS.
        question: with IMAGE where the image stands.
        answer: what the client's model is to say.
    """
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "task": task, "conversations": turns}


def write_samples(file: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Writes samples to a JSONL file."""
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples), encoding="utf-8")


def with_article(noun: str) -> str:
    """A noun after a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Several of what a noun names."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
