"""Several rounds over Flower: the same bytes as `fit` where all train in one place, and nothing of another round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flower.grid import FakeGrid, node
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from places import SHAPES_CLIP
from references import contents

from sap_lightning.errors import InputError
from sap_lightning.flower import collection
from sap_lightning.flower.client import answer
from sap_lightning.flower.server import main
from sap_lightning.flower.wire import MESSAGE_TYPE
from sap_lightning.results import Results

CLIENTS = ["cartoon", "photo"]
QUIET = {"limit_val_batches": 0, "accelerator": "cpu", "max_epochs": 1}
Answer = Callable[[Message], Message]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch) -> None:
    monkeypatch.setattr(collection, "SECONDS_BETWEEN_LOOKS", 0.001)


class Network:
    """Two sites and their server, in folders of their own."""

    def __init__(self, world: Path, folder: Path, **played: Any) -> None:
        self.folder = folder
        self.grid = FakeGrid(*(node(name, number) for number, name in enumerate(CLIENTS, start=1)))
        for domain in CLIENTS:
            self.grid.answers[domain] = self.site(world, domain)
        images = folder / "images"
        images.mkdir(parents=True)
        (images / "sketch").symlink_to(world / "domains" / "sketch")
        self.server = folder / "server"
        self.settings = {
            "model": {"base": SHAPES_CLIP},
            "data": {"root": str(images), "batch_size": 16},
            "anchors": {"root": str(world / "anchors"), "num_pairs": 8},
            "prune": {"sparsity": 0.9, "space": "factor"},
            "trainer": QUIET,
            "federation": {"run_dir": str(self.server), "report": False, "clients": CLIENTS, **played},
        }

    def site(self, world: Path, domain: str) -> Answer:
        file = self.folder / f"{domain}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "model": {"base": SHAPES_CLIP, "learning_rate": 2.0e-3, "reach": False},
            "data": {"root": str(world / "domains"), "domain": domain, "batch_size": 16},
            "trainer": QUIET,
            "federation": {"run_dir": str(self.folder / domain)},
        }
        file.write_text(yaml.safe_dump(settings))
        context = Context(1, 2, {"config": str(file)}, RecordDict(), {}, 3)
        return lambda question: answer(question, context)

    def play(self, timeout: float = 60.0) -> None:
        file = self.folder / "server.yaml"
        file.write_text(yaml.safe_dump(self.settings))
        main(self.grid, Context(1, 0, {}, RecordDict(), {"config": str(file), "quorum": 2, "timeout": timeout}, 3))


def uploads(run: Path) -> dict[str, bytes]:
    return contents(run, "rounds/*/*/uploads/**/*") | contents(run, "merged/**/*")


WAYS = [
    {"rounds": 2, "aggregation": "fedit", "optimizer": "keep", "schedule": "round"},
    {"rounds": 2, "aggregation": "fedsa_lora"},
    {"rounds": 3, "aggregation": "flora", "share": 0.5},
]


@pytest.mark.parametrize("played", WAYS, ids=lambda played: played["aggregation"])
def test_rounds_over_flower_are_those_of_fit_bit_for_bit(run, world, tmp_path, played):
    network = Network(world, tmp_path / "network", **played)
    network.play()
    options = [f"--federation.{name}={value}" for name, value in played.items()]
    clients = ["--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", "--federation.report=false"]
    training = ["--model.reach=false", "--trainer.limit_val_batches=0"]
    run("fit", *clients, *training, *options, f"--federation.run_dir={tmp_path / 'fit'}")
    expected = uploads(tmp_path / "fit")
    assert expected and uploads(network.server) == expected
    rows, of_fit = ({row.label: row.bytes for row in Results(at).rows} for at in (network.server, tmp_path / "fit"))
    assert rows["sap"] == of_fit["sap"]
    network.grid.asked = []
    network.play()
    assert network.grid.asked == [], "what stands is not asked for again"


@pytest.fixture(scope="module")
def played(world, tmp_path_factory) -> Network:
    """Two rounds that ran through."""
    network = Network(world, tmp_path_factory.mktemp("played") / "network", rounds=2, aggregation="fedit")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(collection, "SECONDS_BETWEEN_LOOKS", 0.001)
        network.play()
    return network


def asked_again(network: Network, domain: str, change: Callable[[Message], None]) -> str:
    """What the site says to the question of its second round, changed on its way: why it does not answer."""
    question = list(network.grid.questions.values())[-1 if domain == CLIENTS[-1] else -2]
    copy = Message(
        RecordDict({name: record.copy() for name, record in question.content.items()}),
        question.metadata.dst_node_id,
        MESSAGE_TYPE,
    )
    change(copy)
    reply = network.grid.answers[domain](copy)
    return reply.error.reason if reply.has_error() else ""


def test_a_site_that_stops_in_a_later_round_is_named_and_asked_again_alone(world, tmp_path):
    network = Network(world, tmp_path / "network", rounds=2, aggregation="fedit")
    photo, asked = network.grid.answers["photo"], []

    def once(question: Message) -> Message | None:
        asked.append(question)
        return photo(question) if len(asked) == 1 else None

    network.grid.answers["photo"] = once  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"1 uploads \(cartoon\) are fewer than the quorum of 2"):
        network.play(timeout=20)
    network.grid.asked, network.grid.answers["photo"] = [], photo
    network.play()
    assert network.grid.asked == ["photo"]


def test_an_upload_of_the_round_before_is_refused(played, caplog):
    network = played
    replayed = contents(network.folder / "photo" / "uploads" / "photo")
    folder = network.folder / "photo" / "rounds" / "sketch" / "1" / "uploads" / "photo"
    kept = contents(folder)
    shutil.rmtree(network.server / "rounds" / "sketch" / "1" / "uploads" / "photo")
    for name, content in replayed.items():
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=r"1 uploads \(cartoon\) are fewer than the quorum of 2"):
        network.play(timeout=1)
    assert "the upload is of round 0, asked was 1" in caplog.text
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    network.play()


CHANGES = {
    "another start": (
        lambda question: question.content["question"].update({"start": "ab" * 32}),
        "what rounds before round 2 have handed over is not what the server says",
    ),
    "a way that is none": (
        lambda question: question.content["question"].update({"way": "fedprox"}),
        "the server's way is 'fedprox', expected one of fedit, ",
    ),
    "a domain that leads out": (
        lambda question: question.content["question"].update({"unseen": "../../x"}),
        "domain '../../x': its name must be ",
    ),
    "another file": (
        lambda question: question.content.update(
            {"start": ArrayRecord({"x.bin": Array("uint8", (1,), "bytes", b"x")})}
        ),
        "start: the server hands over ['x.bin'], expected adapter_model.safetensors, adapter_config.json",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_server_may_not_ask_is_refused_and_why_stays_at_the_site(played, caplog, change):
    tamper, reason = CHANGES[change]
    assert asked_again(played, "photo", tamper) == "cannot train at its settings; the site's log says why"
    assert reason in caplog.text
