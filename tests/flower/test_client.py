"""A client's site: what it sends, and what it does not say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from places import SHAPES_CLIP
from references import contents

from sap_lightning import __version__
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.flower import client
from sap_lightning.flower.client import answer
from sap_lightning.flower.wire import MESSAGE_TYPE, Question, files_in, question_record
from sap_lightning.modules.merge import MergeModule


@pytest.fixture(scope="module")
def question(world) -> Question:
    base = MergeModule(SHAPES_CLIP)
    base.configure_model()
    return Question(base.base_fingerprint, DomainDataModule(str(world / "domains")).class_names, __version__)


@pytest.fixture
def site(world, tmp_path) -> dict[str, Any]:
    """Settings of a site that has the images of photo alone, as those of the finished run."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo").symlink_to(world / "domains" / "photo")
    return {
        "model": {"base": SHAPES_CLIP, "learning_rate": 2.0e-3},
        "data": {"root": str(tmp_path / "images"), "domain": "photo", "batch_size": 16},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "federation": {"run_dir": str(tmp_path / "run")},
    }


def ask(site: dict[str, Any] | str, question: Question, tmp_path: Path) -> Message:
    """The site's reply."""
    file = tmp_path / "site.yaml"
    if isinstance(site, dict):
        file.write_text(yaml.safe_dump(site))
    node_config = {"config": str(file)} if isinstance(site, dict) else {}
    context = Context(1, 2, node_config, RecordDict(), {}, 3)
    return answer(Message(question_record(question), 2, MESSAGE_TYPE), context)


def refusal(reply: Message, tmp_path: Path) -> str:
    """Why a site does not send anything: one line that names nothing of its machine."""
    assert reply.has_error()
    assert str(tmp_path) not in reply.error.reason and "/" not in reply.error.reason
    assert not (tmp_path / "run" / "uploads").exists()
    (line,) = reply.error.reason.splitlines()
    return line


def test_a_site_trains_once_and_sends_what_it_would_have_in_a_federation(site, question, finished, tmp_path):
    first = ask(site, question, tmp_path)
    assert files_in(first.content) == contents(finished / "uploads" / "photo")
    shutil.rmtree(tmp_path / "run" / "clients")
    again = ask(site, question, tmp_path)
    assert files_in(again.content) == files_in(first.content)
    assert not (tmp_path / "run" / "clients").exists(), "nothing is trained for an upload that stands"


def test_a_site_of_other_classes_says_so_before_it_trains(site, question, tmp_path):
    reply = ask(site, question._replace(class_names=["a", "b"]), tmp_path)
    assert refusal(reply, tmp_path).startswith("the site's classes are not the server's; set data.class_names")
    assert not (tmp_path / "run").exists()


def test_a_site_of_another_base_says_so_before_it_trains(site, question, tmp_path):
    reply = ask(site, question._replace(base_fingerprint="ab" * 32), tmp_path)
    assert refusal(reply, tmp_path) == f"the site's base is {question.base_fingerprint}, the server's {'ab' * 32}"
    assert not (tmp_path / "run").exists()


def test_a_site_of_an_older_version_says_so(site, question, tmp_path):
    reply = ask(site, question._replace(version="99.1"), tmp_path)
    assert refusal(reply, tmp_path) == f"the site has sap-lightning {__version__}, the server asks for 99.1 or later"


def test_settings_that_are_wrong_stay_at_the_site(site, question, tmp_path):
    site["data"]["root"] = str(tmp_path / "nowhere")
    said = refusal(ask(site, question, tmp_path), tmp_path)
    assert said == "cannot train at its settings; the site's log says why"


def test_a_supernode_without_a_config_says_so_at_the_site(question, tmp_path, caplog):
    assert "the site's log says why" in refusal(ask("", question, tmp_path), tmp_path)
    assert "start the SuperNode with --node-config" in caplog.text


def test_an_exception_reaches_the_server_without_its_words(site, question, tmp_path, monkeypatch):
    def fails(self: Any) -> None:
        raise RuntimeError(f"{tmp_path}/secret: boom")

    monkeypatch.setattr(client.SapCLI, "train", fails)
    assert refusal(ask(site, question, tmp_path), tmp_path) == "RuntimeError; the site's log says more"


def test_several_processes_are_refused_but_not_for_an_upload_that_stands(site, question, finished, tmp_path, caplog):
    site["trainer"]["devices"] = 2
    refusal(ask(site, question, tmp_path), tmp_path)
    assert "trainer.devices: a SuperNode trains in one process" in caplog.text
    shutil.copytree(finished / "uploads" / "photo", tmp_path / "run" / "uploads" / "photo")
    assert not ask(site, question, tmp_path).has_error()
