"""One shot for a task that nobody trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava import CLIENTS, TRAINER, conversations, tiny_llava

from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.instruction import InstructionFederation
from sap_lightning.federation.unseen_task import one_shot
from sap_lightning.functional.lora import dense
from sap_lightning.io.instruction_upload import read_instruction_upload
from sap_lightning.merging import ATAF, SAP, TIES, Average
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.llava import load_language_base
from sap_lightning.modules.vlm_lora import VLMLoRAModule


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    clients = conversations(folder / "clients", CLIENTS, count=3)
    (public,) = conversations(folder / "anchors", {"public": "caption"}, count=4).iterdir()
    (public / "images").rename(clients / "images")
    (public / "train.jsonl").rename(clients / "anchors.jsonl")
    return str(tiny_llava(folder / "base")), str(clients)


def federation(parts: tuple[str, str], folder: Path, **settings: Any) -> InstructionFederation:
    base, root = parts
    client = VLMLoRAModule(base, rank=2, alpha=4, learning_rate=0.05, targets=["q_proj"])
    data = InstructionDataModule(root, batch_size=3)
    of = {"rounds": 1, "systems": ["fedit"], **settings}
    return InstructionFederation(client, data, TRAINER, str(folder), **of)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, parts: tuple[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("run")
    federation(parts, folder, methods=["average", "ties", SAP(sparsity=0.5)]).run()
    return folder


def found(folder: Path, method: str, client: str) -> Any:
    return json.loads((folder / "answers" / method / "1" / f"{client}.json").read_text())


def test_each_method_is_measured_on_each_task(run):
    files = {str(file.relative_to(run / "answers")) for file in run.glob("answers/*/*/*.json")}
    for method in ("average", "ties", "sap"):
        assert {f"{method}/1/{client}.json" for client in CLIENTS} <= files


def test_a_task_s_own_clients_have_no_part(run, parts):
    loaded = load_language_base(parts[0])
    connector = {name: tuple(value.shape) for name, value in loaded.connector.state_dict().items()}
    uploads = [
        read_instruction_upload(upload, layer_shapes(loaded.language), loaded.fingerprint, connector)
        for upload in sorted(run.glob("first/shared/uploads/*"))
    ]
    start = one_shot(parts[0], "caption", uploads, CLIENTS, Average(), None)
    vqa = [one for one in uploads if CLIENTS[one.adapter.name] == "vqa"]
    assert len(vqa) == 2 and start.update is not None
    for name, update in start.update.items():
        expected = sum(one.adapter.layers[name].delta() for one in vqa) / 2
        assert torch.allclose(dense(update), expected, atol=1e-6)
    for name, value in start.connectors[""].items():
        assert torch.allclose(value, (vqa[0].connector[name] + vqa[1].connector[name]) / 2, atol=1e-6)


def test_what_stands_is_not_measured_again(run, parts, monkeypatch):
    monkeypatch.setattr(VLMLoRAModule, "configure_model", lambda self: pytest.fail("measured again"))
    federation(parts, run, methods=[Average(), TIES(), SAP(sparsity=0.5)]).run()


def test_another_sparsity_is_measured_anew(run, parts):
    before = found(run, "sap", "vqa_a")
    federation(parts, run, methods=[SAP(sparsity=0.9)]).run()
    assert found(run, "sap", "vqa_a")["sources"] != before["sources"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": [ATAF(), "fisher"]}, "looks at images and captions through CLIP"),
        ({"methods": ["sap", SAP(sparsity=0.9)]}, "names a method twice"),
        ({"methods": ["saps"]}, "federation.methods saps: no such method"),
    ],
)
def test_a_faulty_setting_is_named(parts, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        federation(parts, tmp_path, **settings)


def test_one_task_alone_has_none_unseen(tmp_path, parts):
    root = conversations(tmp_path / "clients", {"vqa_a": "vqa", "vqa_b": "vqa"}, count=3)
    with pytest.raises(InputError, match="all clients are of one task"):
        federation((parts[0], str(root)), tmp_path / "run", methods=["average"]).run()


def test_sap_needs_public_conversations(tmp_path, parts):
    root = conversations(tmp_path / "clients", CLIENTS, count=3)
    with pytest.raises(InputError, match=r"anchors.jsonl: is not there; sap looks at public conversations"):
        federation((parts[0], str(root)), tmp_path / "run", methods=["sap"]).run()
