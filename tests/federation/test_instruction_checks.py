"""What cannot work is said before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from llava import CLIENTS, TRAINER, conversations, tiny_language_model

from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.instruction import InstructionFederation
from sap_lightning.modules.vlm_lora import VLMLoRAModule


def federation(base: str, root: str, folder: Path, system: str = "pilot") -> InstructionFederation:
    client, data = VLMLoRAModule(base, rank=2, targets=["q_proj"]), InstructionDataModule(root)
    return InstructionFederation(client, data, TRAINER, str(folder), rounds=1, systems=[system])


@pytest.mark.parametrize(
    ("clients", "settings", "message"),
    [
        (CLIENTS, {"methods": ["sap"]}, "anchors.jsonl: is not there"),
        ({"a": "vqa", "b": "vqa"}, {"methods": ["average"]}, "all clients are of one task"),
        (CLIENTS, {"scores": {"vqa": "iou"}}, r"vqa_a.*line 1: 'red' holds no box .*--data.scores '\{vqa: f1\}'"),
        (CLIENTS, {"scores": {"vqaa": "f1"}}, "data.scores: no client is of the task vqaa; there are caption, vqa"),
        (
            CLIENTS,
            {"methods": ["average"], "share": 0.3},
            "average needs clients of other tasks than .*, at least 1",
        ),
        (CLIENTS, {"methods": ["krum"]}, "krum needs clients of other tasks than caption, at least 3, and the first"),
        (CLIENTS, {"methods": ["at_reach"]}, "at_reach needs to know how far adapters reach"),
        ({**CLIENTS, "Zürich": "vqa"}, {}, "client 'Zürich': its name must be at most 64 letters"),
        ({**CLIENTS, "x" * 65: "vqa"}, {}, "client 'xxx.*: its name must be at most 64 letters"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(tmp_path, base, clients, settings, message):
    root = conversations(tmp_path / "root", clients, count=3)
    data = InstructionDataModule(str(root), scores=settings.pop("scores", None))
    client = VLMLoRAModule(base, rank=2, targets=["q_proj"])
    with pytest.raises(InputError, match=message):
        InstructionFederation(client, data, TRAINER, str(tmp_path / "run"), **settings).run()
    assert not (tmp_path / "run").exists()


def long_question(root: Path) -> None:
    lines = root / "vqa_b/train.jsonl"
    lines.write_text(lines.read_text().replace("what", "what " * 2000, 1))


def no_image(root: Path) -> None:
    (root / "vqa_b/images/2.png").write_bytes(b"none")


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (long_question, r"vqa_b.*train.jsonl: line 1: its first question takes 20\d\d tokens, data.longest is 1024"),
        (no_image, r"vqa_b.*2\.png: cannot be read as an image"),
    ],
)
def test_no_conversation_is_found_faulty_after_other_clients_have_trained(tmp_path, base, root, spoiled, message):
    """Mended, the conversations would be others, and the run would begin anew."""
    spoiled(Path(shutil.copytree(root, tmp_path / "root")))
    with pytest.raises(InputError, match=message):
        federation(base, str(tmp_path / "root"), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["longest", "longest_answer"])
def test_more_than_the_model_has_positions_for_is_refused(tmp_path, base, root, setting):
    lines = Path(shutil.copytree(root, tmp_path / "root")) / "vqa_b/train.jsonl"
    data = InstructionDataModule(str(tmp_path / "root"), longest_answer=128 if setting == "longest" else 250)
    lines.write_text(lines.read_text().replace('"red"', f'"{"red " * 250}"', 1))
    with pytest.raises(InputError, match=rf"line \d with data.{setting} .* positions, and .* has 256; set it lower"):
        InstructionFederation(VLMLoRAModule(base, rank=2), data, TRAINER, str(tmp_path / "run")).run()


def test_what_is_cut_off_of_a_conversation_that_is_trained_on_is_not_in_its_way(tmp_path, base, root):
    lines = Path(shutil.copytree(root, tmp_path / "root")) / "vqa_b/train.jsonl"
    more = [{"from": speaker, "value": "it is red " * 40} for speaker in ("human", "gpt") * 3]
    first, *rest = map(json.loads, lines.read_text().splitlines())
    first["conversations"] += more
    lines.write_text("\n".join(map(json.dumps, [first, *rest])))
    client, data = VLMLoRAModule(base, rank=2), InstructionDataModule(str(tmp_path / "root"), longest=100)
    InstructionFederation(client, data, TRAINER, str(tmp_path / "run"), rounds=1, systems=["fedit"]).run()


def test_a_language_model_is_shown_no_images(tmp_path, root):
    base = str(tiny_language_model(tmp_path / "base"))
    with pytest.raises(InputError, match=r"train.jsonl: has images, and .*base sees none"):
        federation(base, root, tmp_path / "run", system="fedit").run()


def test_pilot_needs_images(tmp_path):
    base = str(tiny_language_model(tmp_path / "base"))
    root = str(conversations(tmp_path / "text", CLIENTS, count=3, images=False))
    with pytest.raises(InputError, match="pilot mixes connectors of images"):
        federation(base, root, tmp_path / "run").run()
    federation(base, root, tmp_path / "run", system="fedit").run()
    result = json.loads((tmp_path / "run/answers/fedit/2/vqa_a.json").read_text())
    assert result["perplexity_other_image"] is None
