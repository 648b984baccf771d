"""Federated instruction tuning: what is sent, what becomes of it, and that it can be interrupted anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from kills import killed
from llava import CLIENTS, TRAINER
from transformers import LlavaForConditionalGeneration

from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.instruction import BASE, InstructionFederation
from sap_lightning.federation.run_folder import require_settings
from sap_lightning.federation.systems import SYSTEMS, Server, aggregated, task_weights, text_weights
from sap_lightning.io.adapter import read_adapter
from sap_lightning.io.instruction_upload import ReadUpload, read_instruction_upload
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.llava import load_language_base, tuned_llava
from sap_lightning.modules.vlm_lora import Start, VLMLoRAModule


def federation(base: str, root: str, folder: Path, **settings: Any) -> InstructionFederation:
    client = VLMLoRAModule(base, rank=2, alpha=4, learning_rate=0.05, targets=["q_proj"])
    data = InstructionDataModule(root, batch_size=3)
    return InstructionFederation(client, data, TRAINER, str(folder), **{"rounds": 1, "systems": ["pilot"], **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: str, root: str) -> Path:
    folder = tmp_path_factory.mktemp("run")
    federation(base, root, folder, systems=["local", "fedit", "pilot"]).run()
    return folder


def uploads_of(folder: Path, base: str) -> list[ReadUpload]:
    parts = load_language_base(base)
    assert parts.connector is not None
    connector = {name: tuple(value.shape) for name, value in parts.connector.state_dict().items()}
    return [
        read_instruction_upload(upload, layer_shapes(parts.language), parts.fingerprint, connector)
        for upload in sorted(folder.glob("uploads/*"))
    ]


def test_every_way_is_measured_after_every_turn(run):
    answers = sorted(str(file.relative_to(run / "answers").parent) for file in run.glob("answers/*/*/vqa_a.json"))
    assert answers == ["base/0", "fedit/1", "fedit/2", "local/1", "local/2", "pilot/1", "pilot/2"]
    lines = (run / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 7 * len(CLIENTS)
    assert [line.split(",")[0] for line in lines[1:4]] == [BASE] * 3


def test_uploads_hold_the_task_s_connector_and_lora_alone(run):
    for upload in run.rglob("uploads/*"):
        connector = safetensors.torch.load_file(upload / "connector.safetensors")
        assert set(connector) == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
        lora = safetensors.torch.load_file(upload / "adapter_model.safetensors")
        assert all(".q_proj.lora_" in name for name in lora)
    assert len(list(run.rglob("uploads/*"))) == len(CLIENTS) * (1 + 1 + 3)


def test_what_is_a_client_s_own_stays_at_home(run):
    kept = [safetensors.torch.load_file(file) for file in run.glob("pilot/turns/1/clients/*/kept.safetensors")]
    assert len(kept) == len(CLIENTS)
    own = {name for one in kept for name in one}
    assert {name.split(".")[0] for name in own} == {"own", "corrections", "router"}
    # A bias that starts at 0 is as many steps of AdamW long in whoever's connector.
    private = {digest_of(value) for one in kept for value in one.values() if value.ndim > 1 and value.abs().sum()}
    others = [file for file in run.rglob("*.safetensors") if "clients" not in file.parts]
    assert private and others
    for file in others:
        found = {name: digest_of(value) for name, value in safetensors.torch.load_file(file).items()}
        assert not [name for name, digest in found.items() if digest in private], file


def digest_of(value: torch.Tensor) -> bytes:
    return sha256(value.numpy().tobytes()).digest()


def test_connectors_are_averaged_by_task_and_samples(run, base):
    uploads = uploads_of(run / "first" / "task", base)
    server = aggregated(SYSTEMS["pilot"], Server(), uploads, CLIENTS)
    by_name = {one.adapter.name: one.connector for one in uploads}
    for name, value in server.connectors["vqa"].items():
        expected = (by_name["vqa_a"][name].double() + by_name["vqa_b"][name].double()) / 2
        assert torch.allclose(value.double(), expected, atol=1e-7)
    assert all(
        torch.equal(server.connectors["caption"][name], by_name["caption_a"][name]) for name in value_names(uploads)
    )


def value_names(uploads: list[ReadUpload]) -> list[str]:
    return list(uploads[0].connector)


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_the_order_of_clients_changes_nothing(run, base, name):
    uploads = uploads_of(run / "first" / "task", base)
    one, other = (aggregated(SYSTEMS[name], Server(), order, CLIENTS) for order in (uploads, uploads[::-1]))
    for client, layers in one.layers.items():
        for layer, value in layers.items():
            assert torch.equal(value.A, other.layers[client][layer].A)
            assert torch.equal(value.B, other.layers[client][layer].B)
    for task, connector in one.connectors.items():
        assert all(torch.equal(value, other.connectors[task][part]) for part, value in connector.items())


def test_weights_of_text(run, base):
    adapters = [one.adapter for one in uploads_of(run / "first" / "task", base)]
    for text in ("own", "mean", "ata"):
        assert torch.allclose(text_weights(text, adapters).sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(text_weights("own", adapters), torch.eye(3, dtype=torch.float64))
    assert task_weights("vqa", ["vqa", "caption", "vqa"], adapters) == [0.5, 0, 0.5]


def test_fedit_averages_a_and_b_apart(run, base):
    uploads = uploads_of(run / "first" / "shared", base)
    server = aggregated(SYSTEMS["fedit"], Server(), uploads, CLIENTS)
    for name, layer in server.layers["vqa_a"].items():
        A = sum(one.adapter.layers[name].A for one in uploads) / 3
        B = sum(one.adapter.layers[name].B for one in uploads) / 3
        assert torch.allclose(layer.A, A, atol=1e-6) and torch.allclose(layer.B, B, atol=1e-6)
        assert torch.equal(layer.A, server.layers["caption_a"][name].A)


def test_the_exact_mean_is_the_nearest_of_its_rank(run, base):
    uploads = uploads_of(run / "first" / "shared", base)
    server = aggregated(SYSTEMS["fedit_exact"], Server(), uploads, CLIENTS)
    for name, layer in server.layers["vqa_a"].items():
        mean = sum(one.adapter.layers[name].delta().double() for one in uploads) / 3
        U, sigma, V = torch.linalg.svd(mean)
        assert torch.allclose(layer.delta().double(), U[:, :2] * sigma[:2] @ V[:2], atol=1e-6)
        assert layer.rank == 2 and torch.equal(layer.A, server.layers["caption_a"][name].A)


def test_equal_clients_give_what_each_has(run, base):
    (one, *_) = uploads_of(run / "first" / "task", base)
    twins = [one, one]
    server = aggregated(SYSTEMS["pilot"], Server(), twins, {one.adapter.name: "vqa"})
    task = CLIENTS[one.adapter.name] if one.adapter.name in server.connectors else "vqa"
    assert all(torch.equal(value, one.connector[part]) for part, value in server.connectors[task].items())


def test_who_has_sent_nothing_goes_on_from_what_it_had(run, base):
    uploads = uploads_of(run / "first" / "task", base)
    before = aggregated(SYSTEMS["pilot"], Server(), uploads, CLIENTS)
    vqa = [one for one in uploads if one.adapter.name == "vqa_a"]
    after = aggregated(SYSTEMS["pilot"], before, vqa, CLIENTS)
    assert after.layers["caption_a"] is before.layers["caption_a"]
    assert after.connectors["caption"] is before.connectors["caption"]
    assert all(torch.equal(after.connectors["vqa"][name], vqa[0].connector[name]) for name in vqa[0].connector)


def content(folder: Path) -> dict[str, bytes]:
    parts = [*folder.rglob("uploads/*/*"), *folder.rglob("kept.safetensors"), *folder.rglob("answers/*/*/*.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in parts if file.is_file()}


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, base, root):
    def play(folder: Path) -> None:
        federation(base, root, folder).run()

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = killed(whole, lambda: play(whole))
    expected = content(whole)
    # In the first stage, between the stages, in the second, and while it measures.
    for at in (changes // 5, changes // 2, changes * 4 // 5):
        killed(broken, lambda: play(broken), at)
        killed(broken, lambda: play(broken))
        assert content(broken) == expected
        shutil.rmtree(broken)


def test_what_stands_is_not_done_again(run, base, root, monkeypatch):
    before = content(run)
    monkeypatch.setattr(VLMLoRAModule, "configure_model", lambda self: pytest.fail("trained or measured again"))
    federation(base, root, run, systems=["local", "fedit", "pilot"]).run()
    assert content(run) == before


def test_a_share_of_the_clients_takes_part(tmp_path, base, root):
    one = federation(base, root, tmp_path, share=0.34, rounds=3)
    assert [len(one.chosen(number)) for number in range(4)] == [1] * 4
    assert len({tuple(one.chosen(number)) for number in range(8)}) > 1
    one.run()
    assert len(list(tmp_path.rglob("uploads/*"))) == 4


def test_an_upload_of_another_turn_is_refused(tmp_path, run, base, root):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    upload = folder / "pilot/turns/1/uploads/vqa_a"
    shutil.rmtree(upload)
    shutil.copytree(folder / "first/task/uploads/vqa_a", upload)
    with pytest.raises(InputError, match="its round is 0, expected 1"):
        federation(base, root, folder).run()


def test_a_later_upload_is_not_gone_on_with_where_its_start_would_be_another(tmp_path, run, base, root):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "first/task/uploads/vqa_a")
    other = VLMLoRAModule(base, rank=2, alpha=4, targets=["q_proj"], seed=7).starting(Start(stage="task", task="vqa"))
    other.configure_model()
    other.write_upload(folder / "first/task/uploads/vqa_a", "vqa_a", 3)
    with pytest.raises(InputError, match=r"pilot/turns/1/uploads/\w+: was not trained from what the turn before gives"):
        federation(base, root, folder).run()


def test_images_that_have_changed_are_noticed(tmp_path, root):
    shutil.copytree(root, tmp_path / "root")
    before = contents(str(tmp_path / "root"))
    image = next(
        sample.image for sample in InstructionDataModule(str(tmp_path / "root")).samples("vqa_a", "test.jsonl")
    )
    changed = bytearray(image.read_bytes())
    changed[-1] ^= 1
    image.write_bytes(changed)
    assert contents(str(tmp_path / "root"))["vqa_a"] != before["vqa_a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj", "v_proj"]}, "vqa_a: layer .*v_proj is not among model.targets"),
        ({"targets": ["v_proj"]}, "vqa_a: layer .*q_proj is missing"),
        ({"rank": 3}, "q_proj is of rank 3 and scale 1.33333, expected model.rank 2"),
        ({"alpha": 8}, "q_proj is of rank 2 and scale 4, expected model.rank 2 and model.alpha / model.rank 2"),
    ],
)
def test_an_upload_that_cannot_be_averaged_with_the_others_is_refused(tmp_path, run, base, root, settings, message):
    """Also where its own manifest says so."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    upload = folder / "first/task/uploads/vqa_a"
    shutil.rmtree(upload)
    other = VLMLoRAModule(base, **{"rank": 2, "alpha": 4, "targets": ["q_proj"], **settings})
    other = other.starting(Start(stage="task", task="vqa"))
    other.configure_model()
    other.write_upload(upload, "vqa_a", 3)
    with pytest.raises(InputError, match=message):
        federation(base, root, folder).run()


def begun(tmp_path: Path, run: Path, base: str, root: str) -> Callable[..., None]:
    """Starts a run again that had measured the base and nothing else, with other settings."""
    config = {"data": {"root": "here"}, "federation": {"rounds": 1, "share": 1.0}}
    folder = tmp_path / "run"
    shutil.copytree(run / "answers/base", folder / "answers/base")
    again = partial(federation, base, root, folder, systems=["fedit"])
    require_settings(folder, {**config, "data": {"root": "here", "contents": contents(root)}})

    def start(**changed: Any) -> None:
        again(config={**config, **changed}).run()

    return start


def contents(root: str) -> dict[str, str]:
    data = InstructionDataModule(root)
    return {client: data.contents(client) for client in data.clients}


@pytest.mark.parametrize("changed", [{"data": {"root": "there"}}, {"federation": {"rounds": 1, "share": 0.5}}])
def test_what_was_measured_alone_holds_to_its_settings_too(tmp_path, run, base, root, changed):
    with pytest.raises(InputError, match="was started with other settings"):
        begun(tmp_path, run, base, root)(**changed)


@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl"])
def test_conversations_that_have_changed_are_not_gone_on_with(tmp_path, run, base, root, file):
    shutil.copytree(root, tmp_path / "root")
    start = begun(tmp_path, run, base, str(tmp_path / "root"))
    lines = tmp_path / "root/vqa_b" / file
    lines.write_text(lines.read_text().replace("red", "blue", 1))
    with pytest.raises(InputError, match=r"data.contents.vqa_b was"):
        start()


def test_hidden_folders_are_no_clients(tmp_path, root):
    shutil.copytree(root, tmp_path / "root")
    shutil.copytree(tmp_path / "root/vqa_a", tmp_path / "root/.ipynb_checkpoints")
    assert InstructionDataModule(str(tmp_path / "root")).clients == tuple(sorted(CLIENTS))


def test_a_table_that_is_gone_is_written_anew(tmp_path, run, base, root):
    table = Path(shutil.copytree(run, tmp_path / "run")) / "results.csv"
    before = table.read_bytes()
    table.unlink()
    federation(base, root, tmp_path / "run").run()
    assert table.read_bytes() == before


def test_a_measurement_that_is_damaged_is_made_anew(tmp_path, run, base, root):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    file = folder / "answers/pilot/2/vqa_a.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"score"', b'"scare"'))
    federation(base, root, folder).run()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "federation.rounds must be at least 1"),
        ({"epochs_per_round": 0}, "federation.epochs_per_round must be at least 1"),
        ({"share": 2}, "federation.share must lie in"),
        ({"systems": ["pilots"]}, "name some of local, fedit, fedit_exact, pilot"),
        ({"systems": ["fedit", "fedit"]}, "each once"),
        ({"systems": []}, "name some of"),
    ],
)
def test_a_faulty_setting_is_named(tmp_path, base, root, settings, message):
    with pytest.raises(InputError, match=message):
        federation(base, root, tmp_path, **settings)


def test_what_a_newcomer_begins_with_is_a_llava(run, base, root, tmp_path):
    assert {path.name for path in run.glob("*/models/*")} == {"all", "vqa", "caption"}
    assert {path.parents[1].name for path in run.glob("*/models/*")} == {"fedit", "pilot"}
    llava = tuned_llava(base, run / "pilot/models/vqa")
    sent = safetensors.torch.load_file(run / "pilot/models/vqa/connector.safetensors")
    for name, value in llava.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, sent[name])
    layers = read_adapter(run / "pilot/models/vqa").layers
    plain = LlavaForConditionalGeneration.from_pretrained(base)
    for name, layer in layers.items():
        inner = name.removeprefix("model.")
        before, after = (one.model.language_model.get_submodule(inner).weight for one in (plain, llava))
        assert torch.allclose(after, before + layer.delta(), atol=1e-6)
    llava.save_pretrained(tmp_path / "saved")
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved").num_parameters() == plain.num_parameters()


def test_a_folder_that_holds_no_tuned_model_is_named(run, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "pilot/models/vqa", folder)
    (folder / "connector.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no connector.safetensors"):
        tuned_llava(base, folder)
