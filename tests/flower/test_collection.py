"""One question to every site, and every way in which it may be answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flower.grid import FakeGrid, lost, node, says
from flower.uploads import CLASSES, QUESTION, SHAPES, read, record_of, write_upload
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from references import contents

from sap_lightning.errors import InputError
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.flower import collection as module
from sap_lightning.flower.collection import Collection
from sap_lightning.flower.sites import Register
from sap_lightning.flower.wire import upload_record
from sap_lightning.io.adapter import read_adapter

SILENT = lambda question: None  # noqa: E731  # an answer like the others
ENOUGH = 60.0


@pytest.fixture(autouse=True)
def no_pause(monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.001)


@pytest.fixture
def grid() -> FakeGrid:
    return FakeGrid(node("cartoon", 11), node("photo", 12))


def collection(grid: FakeGrid, folder: Path, clients: list[str] | None = None) -> Collection:
    run = RunFolder(folder)
    known = [read_adapter(upload, SHAPES) for upload in run.uploads]
    return Collection(grid, Register(folder / "sites.json", clients), QUESTION, read, run, known)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def outcomes(folder: Path) -> list[tuple[str, str]]:
    return [(row["domain"], row["outcome"]) for row in rows(folder)]


def test_every_site_is_asked_once_and_its_upload_stands_as_it_was_sent(grid, tmp_path):
    sent = {name: write_upload(tmp_path / name, name, seed) for seed, name in enumerate(("cartoon", "photo"))}
    grid.answers = {name: says(upload_record(folder)) for name, folder in sent.items()}
    uploads = collection(grid, tmp_path / "run").wait(2, ENOUGH)
    assert grid.asked == ["cartoon", "photo"]
    assert [upload.name for upload in uploads] == ["cartoon", "photo"]
    assert [contents(upload) for upload in uploads] == [contents(folder) for folder in sent.values()]
    sizes = [sum(map(len, contents(folder).values())) for folder in sent.values()]
    assert [row["bytes"] for row in rows(tmp_path / "run")] == sizes
    keys = json.loads((tmp_path / "run" / "sites.json").read_text())
    assert [keys[row["domain"]] == row["key"] for row in rows(tmp_path / "run")] == [True, True]


def test_fewer_than_the_quorum_are_an_error_and_a_second_run_asks_for_the_others_alone(grid, tmp_path):
    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon", 1)), "photo": SILENT}
    with pytest.raises(
        InputError, match=r"1 uploads \(cartoon\) are fewer than the quorum of 2; they stay in .*/uploads"
    ):
        collection(grid, tmp_path / "run").wait(2, 0.1)
    assert outcomes(tmp_path / "run") == [("cartoon", "taken"), ("photo", "late")]
    before = contents(tmp_path / "run" / "uploads")
    grid.asked, grid.answers = [], {"photo": says(record_of(tmp_path, "photo", 2))}
    collection(grid, tmp_path / "run").wait(2, ENOUGH)
    assert grid.asked == ["photo"]
    assert contents(tmp_path / "run" / "uploads").items() > before.items()


def test_a_quorum_goes_on_without_those_that_are_late(grid, tmp_path):
    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon")), "photo": SILENT}
    assert [upload.name for upload in collection(grid, tmp_path / "run").wait(1, 0.1)] == ["cartoon"]


def test_a_client_that_takes_part_and_never_came_is_recorded(grid, tmp_path):
    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon"))}
    collection(grid, tmp_path / "run", ["cartoon", "sketch"]).wait(1, 0.1)
    assert outcomes(tmp_path / "run") == [("photo", "refused"), ("cartoon", "taken"), ("sketch", "absent")]


def test_a_failure_is_recorded_in_one_line_and_not_asked_again(grid, tmp_path):
    reason = "Trouble\nin many lines " * 100
    grid.answers = {
        "cartoon": says(record_of(tmp_path, "cartoon")),
        "photo": says(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)),
    }
    collection(grid, tmp_path / "run").wait(1, ENOUGH)
    assert grid.asked == ["cartoon", "photo"]
    (said,) = [row["reason"] for row in rows(tmp_path / "run") if row["outcome"] == "failed"]
    assert said.startswith(r"'Trouble\nin many") and len(said) <= 120


def refusals(grid: FakeGrid, tmp_path: Path, photo: Path) -> str:
    """What a run says of the upload that photo sends, beside a good one."""
    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon", 1)), "photo": says(upload_record(photo))}
    collection(grid, tmp_path / "run").wait(1, ENOUGH)
    assert [path.name for path in (tmp_path / "run" / "uploads").iterdir()] == ["cartoon"]
    (row,) = [row for row in rows(tmp_path / "run") if row["outcome"] == "refused"]
    assert row["domain"] == "photo" and "\n" not in row["reason"]
    return row["reason"]


def test_an_upload_of_another_s_domain_is_refused(grid, tmp_path):
    photo = write_upload(tmp_path / "sent", "sketch")
    assert refusals(grid, tmp_path, photo) == "the upload is of 'sketch', for which another site speaks"


def test_an_upload_of_other_classes_is_refused(grid, tmp_path):
    photo = write_upload(tmp_path / "sent", "photo", classes=CLASSES[::-1])
    assert refusals(grid, tmp_path, photo) == "the upload's class_names are not those that were asked for"


def test_an_upload_for_another_base_is_refused(grid, tmp_path):
    photo = write_upload(tmp_path / "sent", "photo", base="cd" * 32)
    assert refusals(grid, tmp_path, photo).startswith("photo: manifest.json: base_fingerprint is cdcd")


def test_a_copy_of_another_s_adapter_is_refused(grid, tmp_path):
    photo = write_upload(tmp_path / "sent", "photo", seed=1)
    assert refusals(grid, tmp_path, photo) == "the same adapter as that of cartoon"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_malformed_file_is_refused(grid, tmp_path, name):
    photo = write_upload(tmp_path / "sent", "photo")
    (photo / name).write_bytes((photo / name).read_bytes()[:-10])
    assert refusals(grid, tmp_path, photo).startswith(f"photo: {name}: ")


def test_a_second_reply_of_a_site_is_refused(grid, tmp_path):
    run = collection(grid, tmp_path / "run")
    replies = [record_of(tmp_path, "photo", seed) for seed in (1, 2)]
    run.ask(ttl=ENOUGH)
    (question,) = [number for number, asked in grid.questions.items() if asked.metadata.dst_node_id == 12]
    run.take([Message(content, reply_to=grid.questions[question]) for content in replies])
    assert outcomes(tmp_path / "run") == [("photo", "taken"), ("photo", "refused")]
    assert rows(tmp_path / "run")[1]["reason"] == "it has answered before"
    assert contents(tmp_path / "run" / "uploads" / "photo") == contents(tmp_path / "photo 1")


def test_a_reply_to_what_was_not_asked_and_one_from_another_node_are_refused(grid, tmp_path):
    run = collection(grid, tmp_path / "run")
    run.ask(ttl=ENOUGH)
    content = record_of(tmp_path, "photo")
    stranger, impostor = (Message(content, reply_to=question) for question in grid.questions.values())
    stranger.metadata.__dict__["_reply_to_message_id"] = "another question"
    impostor.metadata.__dict__["_src_node_id"] = 11
    run.take([stranger, impostor])
    assert [(row["node"], row["outcome"], row["reason"]) for row in rows(tmp_path / "run")] == [
        ("11", "refused", "it was not asked"),
        ("11", "refused", "it was not asked"),
    ]
    assert not (tmp_path / "run" / "uploads").exists()


def test_a_site_that_is_started_anew_before_flower_noticed_is_asked_again(grid, tmp_path):
    def restarts(question: Message) -> None:
        grid.nodes[1] = node("photo", 12, since="tuesday")
        grid.answers["photo"] = lambda question: Message(photo, reply_to=question) if asked_again(question) else None

    def asked_again(question: Message) -> bool:
        return question is grid.questions["question 2"]

    photo = record_of(tmp_path, "photo", 1)
    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon", 2)), "photo": restarts}
    collection(grid, tmp_path / "run").wait(2, ENOUGH)
    assert grid.asked == ["cartoon", "photo", "photo"]
    assert outcomes(tmp_path / "run") == [("cartoon", "taken"), ("photo", "taken")]


def test_a_site_that_is_away_is_waited_for_and_asked_when_it_is_back(grid, tmp_path, monkeypatch):
    def dies(question: Message) -> Message:
        grid.nodes.pop()
        grid.answers["photo"] = says(record_of(tmp_path, "photo", 1))
        return lost(question, ErrorCode.NODE_UNAVAILABLE)

    def comes_back(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 5:
            grid.nodes.append(node("photo", 12, since="tuesday"))

    looks: list[float] = []
    monkeypatch.setattr(module.time, "sleep", comes_back)
    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon", 2)), "photo": dies}
    collection(grid, tmp_path / "run").wait(1, ENOUGH)
    assert grid.asked == ["cartoon", "photo", "photo"]
    assert outcomes(tmp_path / "run") == [("cartoon", "taken"), ("photo", "taken")]


def test_a_site_that_goes_away_and_stays_away_is_late(grid, tmp_path):
    def dies(question: Message) -> Message:
        grid.nodes.pop()
        return lost(question, ErrorCode.NODE_UNAVAILABLE)

    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon")), "photo": dies}
    collection(grid, tmp_path / "run", ["cartoon", "photo"]).wait(1, 0.1)
    assert outcomes(tmp_path / "run") == [("cartoon", "taken"), ("photo", "late")]


@pytest.mark.parametrize("code", [ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE])
def test_a_question_that_flower_lost_is_asked_anew(grid, tmp_path, code):
    def is_lost(question: Message) -> Message:
        grid.answers["photo"] = says(record_of(tmp_path, "photo", 1))
        return lost(question, code)

    grid.answers = {"cartoon": says(record_of(tmp_path, "cartoon", 2)), "photo": is_lost}
    collection(grid, tmp_path / "run").wait(2, ENOUGH)
    assert grid.asked == ["cartoon", "photo", "photo"]


def test_a_site_that_speaks_in_flower_s_name_has_failed(grid, tmp_path):
    grid.answers = {name: says(Error(ErrorCode.NODE_UNAVAILABLE, "away")) for name in ("cartoon", "photo")}
    with pytest.raises(InputError, match=r"0 uploads \(none\) are fewer than the quorum of 1"):
        collection(grid, tmp_path / "run").wait(1, 0.1)
    assert grid.asked == ["cartoon", "photo"]
    assert outcomes(tmp_path / "run") == [("cartoon", "failed"), ("photo", "failed")]


def test_an_upload_that_cannot_be_written_ends_the_run_and_is_not_refused(grid, tmp_path):
    grid.answers = {"cartoon": SILENT, "photo": says(record_of(tmp_path, "photo"))}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "uploads").write_text("in the way")
    with pytest.raises(InputError, match=r"uploads/photo: cannot be written"):
        collection(grid, tmp_path / "run").wait(1, ENOUGH)
    assert not (tmp_path / "run" / "replies.jsonl").exists()
