"""A client of a vision–language model: what it starts from, trains, says and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from llava import conversations, tiny_language_model, tiny_llava
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from sap_lightning.data.instructions import InstructionBatch, InstructionDataModule, batch_of
from sap_lightning.errors import InputError
from sap_lightning.models.llava import encoder_of, load_language_base
from sap_lightning.modules.vlm_lora import Stage, Start, VLMLoRAModule

STAGES: tuple[Stage, ...] = ("shared", "task", "mixed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("llava") / "base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: str) -> InstructionDataModule:
    root = conversations(tmp_path_factory.mktemp("conversations"), {"vqa_a": "vqa"})
    return InstructionDataModule(str(root), batch_size=3).for_client("vqa_a", encoder_of(base, 64))


@pytest.fixture(scope="module")
def batch(data: InstructionDataModule) -> InstructionBatch:
    return batch_of(data.samples("vqa_a", "train.jsonl")[:3], data.encoder)


def module_of(base: str, stage: Stage = "shared", **settings: Any) -> VLMLoRAModule:
    tasks = load_language_base(base).connector
    connectors = {} if tasks is None else {"caption": tasks.state_dict(), "vqa": tasks.state_dict()}
    start = Start(stage=stage, task="vqa", connectors=connectors if stage == "mixed" else {})
    return VLMLoRAModule(base, rank=2, alpha=4, learning_rate=0.05, **settings).starting(start)


def trainer_for(**settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_it_starts_as_the_base(base, batch, stage):
    module = module_of(base, stage).eval()
    module.configure_model()
    whole = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    parts = load_language_base(base)
    with torch.no_grad():
        losses, _ = module.answer_losses(batch, batch.images)
        images = parts.vision(batch.images, torch.device("cpu"))
        embedded = whole.get_input_embeddings()(batch.ids)
        embedded = embedded.masked_scatter((batch.ids == 4)[..., None], whole.model.multi_modal_projector(images))
        logits = whole(inputs_embeds=embedded, attention_mask=batch.attention).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses, expected[batch.labels[:, 1:].flatten() != -100], atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_it_trains_lora_and_its_connector_and_leaves_the_rest_as_it_is(base, data, stage):
    module = module_of(base, stage, targets=["q_proj"])
    module.configure_model()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    lora = {
        f"language.base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{factor}.default.weight"
        for layer in range(2)
        for factor in "AB"
    }
    parts = {"shared": {"sent"}, "task": {"sent", "own"}, "mixed": {"sent", "corrections", "router"}}[stage]
    assert trained - lora == {name for name in trained if name.split(".")[1] in parts}
    assert lora <= trained
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer_for(max_epochs=2).fit(module, datamodule=data)
    for name, value in module.state_dict().items():
        # ψ_s learns once it is no longer orthogonal to nothing, its last layer first.
        if name not in trained:
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(module.state_dict()[name], before[name]) for name in lora)
    assert not torch.equal(
        module.state_dict()["connector.sent.linear_2.weight"], before["connector.sent.linear_2.weight"]
    )


def test_what_it_says_is_what_the_whole_says(base, data):
    module = module_of(base)
    trainer_for().test(module, datamodule=data, verbose=False)
    whole = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    samples = data.samples("vqa_a", "test.jsonl")
    batch = batch_of(samples[:3], data.encoder)
    parts = load_language_base(base)
    with torch.no_grad():
        images = whole.model.multi_modal_projector(parts.vision(batch.images, torch.device("cpu")))
        embedded = whole.get_input_embeddings()(batch.prompts)
        embedded = embedded.masked_scatter((batch.prompts == 4)[..., None], images)
        ids = whole.generate(
            inputs_embeds=embedded, attention_mask=batch.prompt_attention, max_new_tokens=128, do_sample=False
        )
    assert module.said[:3] == [
        (data.encoder.text(row), sample.answer) for row, sample in zip(ids, samples, strict=False)
    ]


def test_perplexity_is_over_all_tokens_of_answers(base, data):
    module = module_of(base)
    (found,) = trainer_for().test(module, datamodule=data, verbose=False)
    batch = batch_of(data.samples("vqa_a", "test.jsonl"), data.encoder)
    with torch.no_grad():
        losses, _ = module.answer_losses(batch, batch.images)
    assert found["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    others = (*batch.images[1:], batch.images[0])  # though two batches of three were made of them
    with torch.no_grad():
        losses, _ = module.answer_losses(batch, others)
    assert found["perplexity_other_image"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert found["perplexity_other_image"] != found["perplexity"]


def test_it_goes_on_from_what_it_kept_and_was_sent(base, data):
    first = module_of(base, "task")
    trainer_for(max_epochs=1).fit(first, datamodule=data)
    sent = {"vqa": first.connector.sent.state_dict(), "caption": first.connector.sent.state_dict()}
    second = VLMLoRAModule(base, rank=2, alpha=4).starting(Start(1, "mixed", "vqa", {}, sent, first.kept()))
    second.configure_model()
    for name, value in first.connector.own.state_dict().items():
        assert torch.equal(second.connector.own.state_dict()[name], value)
    assert not any(parameter.requires_grad for parameter in second.connector.own.parameters())


def test_a_language_model_alone_is_tuned_on_text(tmp_path):
    base = str(tiny_language_model(tmp_path / "base"))
    root = conversations(tmp_path / "conversations", {"vqa_a": "vqa"}, images=False)
    data = InstructionDataModule(str(root), batch_size=3).for_client("vqa_a", encoder_of(base, 64))
    module = VLMLoRAModule(base, rank=2, alpha=4, learning_rate=0.05)
    trainer = trainer_for(max_epochs=8)
    (before,) = trainer_for().test(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer_for().test(module, datamodule=data, verbose=False)
    assert after["perplexity"] < before["perplexity"]
    assert "perplexity_other_image" not in after
    upload = module.write_upload(Path(tmp_path / "upload"), "vqa_a", 6)
    assert not (upload / "connector.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "model.rank must be at least 1"),
        ({"alpha": 0}, "model.alpha must be above 0"),
        ({"learning_rate": -1}, "model.learning_rate must be above 0"),
        ({"dropout": 2}, "model.dropout must lie in"),
        ({"targets": []}, "model.targets is empty"),
    ],
)
def test_a_faulty_setting_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        VLMLoRAModule(**settings)


def test_a_target_that_there_is_not_is_named(base):
    module = VLMLoRAModule(base, targets=["c_attn"])
    with pytest.raises(InputError, match="has no linear layer 'c_attn'; it has down_proj, gate_proj"):
        module.configure_model()
