"""The world's clients of instruction tuning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from references import contents

from sap_lightning.data.instructions import InstructionDataModule, read_samples
from sap_lightning.data.questions import TASKS, count, plural
from sap_lightning.data.shapes import instructions
from sap_lightning.data.shapes.instructions import ASK, CLIENTS, draw_clients
from sap_lightning.data.shapes.world import CLASSES, DOMAINS
from sap_lightning.errors import InputError


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions") / "clients"
    draw_clients(folder, train=12, test=6, size=16)
    return folder


def asked(file: Path) -> list[tuple[str, str]]:
    """Question and answer of every sample."""
    conversations = [json.loads(line)["conversations"] for line in file.read_text().splitlines()]
    return [(human["value"], gpt["value"]) for human, gpt in conversations]


def test_same_seed_gives_same_files_bit_for_bit(tmp_path):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        draw_clients(tmp_path / name, train=2, test=1, size=16, seed=seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_more_samples_begin_with_the_fewer(clients, tmp_path):
    draw_clients(tmp_path / "fewer", train=3, test=6, size=16)
    for client in CLIENTS:
        fewer, more = (root / client / "train.jsonl" for root in (tmp_path / "fewer", clients))
        assert more.read_text().startswith(fewer.read_text())


def test_every_task_has_two_clients_of_different_styles(clients):
    assert {path.name for path in clients.iterdir()} == {*CLIENTS, "anchors", "anchors.jsonl"}
    for task in TASKS:
        styles = [client.split("_")[1] for client in CLIENTS if client.startswith(task)]
        assert len(set(styles)) == 2 and set(styles) <= set(DOMAINS)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_has_its_samples_and_their_images(clients, client):
    images = set()
    for split, samples in (("train", 12), ("test", 6)):
        entries = [json.loads(line) for line in (clients / client / f"{split}.jsonl").read_text().splitlines()]
        assert len(entries) == samples and {entry["task"] for entry in entries} == {client.split("_")[0]}
        images |= {entry["image"] for entry in entries}
    assert images == {f"images/{path.name}" for path in (clients / client / "images").iterdir()} and len(images) == 18
    assert all(Image.open(clients / client / image).size == (16, 16) for image in images)


def test_yes_and_no_are_as_common(clients):
    for file in clients.glob("vqa_*/*.jsonl"):
        answers = [answer for _, answer in asked(file)]
        third = len(answers) // 3
        assert answers.count("yes") == answers.count("no") == third
        assert sum(answer.isdigit() for answer in answers) == third


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_what_is_drawn(task, monkeypatch):
    scenes = []

    def remembered(*args):
        scenes.append(instructions_arranged(*args))
        return scenes[-1]

    instructions_arranged = instructions.arranged
    monkeypatch.setattr(instructions, "arranged", remembered)
    answers = set()
    for number in range(60):
        _, question, answer = ASK[task]("cartoon", number, 64, np.random.default_rng(number))
        scene, things = scenes[-1], [item.thing for item in scenes[-1].items]
        if found := re.search(r"Is there an? (\w+) in", question):
            assert answer == ("yes" if found[1] in things else "no")
        elif "How many" in question:
            (thing,) = [name for name in CLASSES if question == count(name)]
            assert answer == str(things.count(thing)) and plural(thing) in question
        elif found := re.search(r"Where is the (\w+)\?", question):
            (item,) = [item for item in scene.items if item.thing == found[1]]
            assert re.fullmatch(r"\[[01]\.\d, [01]\.\d, [01]\.\d, [01]\.\d\]", answer)
            x1, y1, x2, y2 = json.loads(answer)
            assert (x1 + x2 > 1, y1 + y2 > 1) == (item.quarter % 2 == 1, item.quarter > 1)
        else:
            assert answer.startswith("a cartoon of ") and answer.endswith(f" {scene.background} background.")
            assert re.findall(r"(\w+) (\w+)(?=,| and| on)", answer) == [
                (item.colour, item.thing) for item in scene.items
            ]
        answers.add(answer)
    assert len(answers) == 5 if task == "vqa" else len(answers) > 20


def test_an_existing_folder_and_a_number_out_of_range_are_refused(tmp_path):
    with pytest.raises(InputError, match="already exists"):
        draw_clients(tmp_path)
    for wrong in ({"train": 0}, {"test": 0}, {"size": 3}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            draw_clients(tmp_path / "clients", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(instructions, "write_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_clients(tmp_path / "clients", train=1, test=1, size=16)
    assert not list(tmp_path.iterdir())


def test_the_command_draws_clients_and_tells_a_bad_folder_in_one_line(tmp_path):
    line = [sys.executable, "-m", "sap_lightning.data.shapes.instructions", str(tmp_path / "clients")]
    subprocess.run([*line, "--train", "1", "--test", "1", "--size", "16"], check=True)
    assert len(list(tmp_path.glob("clients/*/images/*.png"))) == 2 * len(CLIENTS)
    answer = subprocess.run(line, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: {tmp_path / 'clients'}: already exists")
    assert len(answer.stderr.splitlines()) == 1


def test_the_server_has_public_captions(clients):
    samples = read_samples(clients / "anchors.jsonl")
    assert len(samples) == 32 and {sample.task for sample in samples} == {"caption"}


def test_the_clients_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr(instructions, "draw_clients", lambda folder: draw_clients(folder, train=1, test=1))
    root = InstructionDataModule("shapes").root
    assert root.parent == tmp_path and InstructionDataModule("shapes").clients == tuple(sorted(CLIENTS))
    monkeypatch.setattr(instructions, "draw_clients", lambda folder: pytest.fail("drawn again"))
    assert InstructionDataModule("shapes").root == root
