"""What a merge leaves behind, and when."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from places import SHAPES_CLIP
from transformers import CLIPModel, CLIPVisionModelWithProjection

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging import merged as output
from sap_lightning.merging.average import Average
from sap_lightning.merging.dare import DARE
from sap_lightning.merging.median import Median
from sap_lightning.merging.merged import Merged, push_to_hub
from sap_lightning.merging.ties import TIES
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes, linear_weight


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    found = layer_shapes(load_base(SHAPES_CLIP).tower)
    return {name: found[name] for name in sorted(found) if name.endswith(("q_proj", "fc1"))}


@pytest.fixture(scope="module")
def adapters(shapes) -> list[Adapter]:
    return [random_adapter(name, seed, shapes) for seed, name in enumerate(["photo", "sketch"])]


def random_adapter(name: str, seed: int, shapes: dict[str, torch.Size]) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        layer: LoRALayer(
            0.1 * torch.randn(3, d_in, generator=generator), 0.1 * torch.randn(d_out, 3, generator=generator), 2.0
        )
        for layer, (d_out, d_in) in shapes.items()
    }
    return Adapter(name, layers, sha256_of(layers))


@pytest.fixture(scope="module")
def merged(adapters) -> Merged:
    return merge(adapters, Average())


def merge(adapters: list[Adapter], method: Any, weights: tuple[float, ...] = (0.75, 0.25)) -> Merged:
    update = method.merge(adapters, list(weights))
    return Merged(SHAPES_CLIP, method, adapters, list(weights), update, {"anchor_loss": 0.61234})


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge.json").read_text())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features_with(merged: Merged) -> torch.Tensor:
    tower = CLIPVisionModelWithProjection.from_pretrained(SHAPES_CLIP).eval()
    for name in merged.update:
        delta = sum(w * one.layers[name].delta() for one, w in zip(merged.adapters, merged.weights, strict=True))
        linear_weight(tower, name).add_(delta)
    return tower(images()).image_embeds


# The model


def test_an_exact_merge_is_an_adapter_that_peft_loads(merged, tmp_path):
    folder = merged.save(tmp_path / "out")
    assert {file.name for file in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "merge.json",
        "README.md",
    }
    tower = PeftModel.from_pretrained(CLIPVisionModelWithProjection.from_pretrained(SHAPES_CLIP), folder).eval()
    torch.testing.assert_close(tower(images()).image_embeds.detach(), features_with(merged), atol=1e-5, rtol=0)
    assert record_in(folder)["relative_error"] == 0


def test_a_full_model_is_a_whole_clip_model(merged, tmp_path):
    folder = merged.save(tmp_path / "out", "model")
    clip = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = clip.get_image_features(images()).pooler_output
    torch.testing.assert_close(features, features_with(merged), atol=1e-5, rtol=0)
    assert load_base(str(folder)).texts(["a photo"]).shape[0] == 1, "the tokenizer is there"
    assert (folder / "preprocessor_config.json").is_file()


def test_a_dense_merge_is_a_model_unless_an_adapter_or_a_rank_is_asked_for(adapters, tmp_path):
    dense = merge(adapters, TIES())
    assert (dense.save(tmp_path / "auto") / "model.safetensors").is_file()
    assert (dense.save(tmp_path / "adapter", "adapter") / "adapter_model.safetensors").is_file()
    assert (dense.save(tmp_path / "rank", rank=4) / "adapter_model.safetensors").is_file()
    assert record_in(tmp_path / "rank")["relative_error"] > record_in(tmp_path / "adapter")["relative_error"] > 0


@pytest.mark.parametrize("format", ["adapter", "model"])
def test_the_same_merge_gives_the_same_bytes(adapters, tmp_path, format):
    one, other = (merge(adapters, Average()).save(tmp_path / name, format) for name in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


# The record


def test_the_record_says_what_decided_the_outcome(merged, adapters, tmp_path):
    record = record_in(merged.save(tmp_path / "out"))
    assert record["base"] == SHAPES_CLIP
    assert record["method"] == "average" and record["settings"] == {}
    assert record["sources"] == [
        {"name": "photo", "sha256": adapters[0].sha256, "weight": 0.75},
        {"name": "sketch", "sha256": adapters[1].sha256, "weight": 0.25},
    ]
    assert record["metrics"] == {"anchor_loss": 0.61234}
    assert record["findings"] == {}


def test_a_merge_stands_in_its_own_folder_only(merged, adapters, shapes, tmp_path):
    folder = merge(adapters, TIES(0.8)).save(tmp_path / "out", rank=4)
    assert merge(adapters, TIES(0.8)).stands_in(folder)
    assert replace(merge(adapters, TIES(0.8)), metrics={}).stands_in(folder), "metrics decide nothing"
    assert not merge(adapters, TIES(0.7)).stands_in(folder)
    assert not merge(adapters, TIES(0.8, variant="peft")).stands_in(folder)
    assert not merge(adapters, DARE(0.8)).stands_in(folder)
    assert not merge(adapters, TIES(0.8), (0.5, 0.5)).stands_in(folder)
    assert not merge(adapters[:1], TIES(0.8), (1.0,)).stands_in(folder)
    assert not merge([adapters[0], random_adapter("sketch", 7, shapes)], TIES(0.8)).stands_in(folder)
    assert not replace(merge(adapters, TIES(0.8)), base="another/base").stands_in(folder)
    assert not merged.stands_in(tmp_path / "nowhere")


# The card


def test_the_card_says_how_the_model_was_made(adapters, tmp_path):
    folder = merge(adapters, TIES(0.8)).save(tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert {"merge", "lora", "sap_lightning", "ties"} <= set(card.data.tags)
    assert "base_model" not in card.data.to_dict(), "a folder is no model of the hub"
    assert "merged by ties" in card.text and SHAPES_CLIP in card.text
    assert "- sparsity: `0.8`" in card.text and '- variant: `"authors"`' in card.text
    assert "- anchor_loss: 0.6123" in card.text
    for adapter in adapters:
        assert f"| {adapter.name} | " in card.text and adapter.sha256 in card.text


def test_the_card_names_a_base_of_the_hub(merged):
    card = replace(merged, base="openai/clip-vit-base-patch16").card("peft")
    assert ModelCard(str(card)).data.base_model == "openai/clip-vit-base-patch16"
    assert ModelCard(str(card)).data.library_name == "peft"


def test_a_card_without_settings_or_metrics_says_none(adapters):
    text = replace(merge(adapters, Median()), metrics={}).card("peft").text
    assert "## Settings\n\nnone" in text and "## Evaluation\n\nnone" in text


# Whole or not at all


@pytest.mark.parametrize("format", ["adapter", "model"])
@pytest.mark.parametrize("failing", ["card", "record"])
def test_nothing_is_left_when_saving_fails_midway(merged, tmp_path, monkeypatch, format, failing):
    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    monkeypatch.setattr(Merged, failing, fail)
    with pytest.raises(RuntimeError, match="midway"):
        merged.save(tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_a_standing_folder_is_left_alone(merged, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not overwritten"):
        merged.save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_update_that_is_not_finite_is_not_written(merged, tmp_path):
    update = {name: layer._replace(B=layer.B * torch.inf) for name, layer in merged.update.items()}
    with pytest.raises(InputError, match="merge by average is not finite"):
        replace(merged, update=update).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The hub


class Hub:
    """Takes down what it is asked."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repository: str, **options: Any) -> str:
        self.asked.append((repository, options))
        return f"https://hub.example/{repository}"

    def upload_folder(self, repo_id: str, **options: Any) -> None:
        self.asked.append((repo_id, options))


class ClosedHub(Hub):
    def upload_folder(self, repo_id: str, **options: Any) -> None:
        raise ConnectionError("401 Client Error\nfor url: https://hub.example")


def test_a_merge_is_pushed_to_a_repository_that_may_be_new(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    folder = merged.save(tmp_path / "out")
    assert push_to_hub(folder, "ann/merged") == "https://hub.example/ann/merged"
    (created, options), (uploaded, content) = Hub.asked
    assert created == uploaded == "ann/merged" and options == {"exist_ok": True}
    assert content["folder_path"] == str(folder)


def test_a_hub_that_refuses_is_one_line_and_the_merge_stands(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "HfApi", ClosedHub)
    folder = merged.save(tmp_path / "out")
    with pytest.raises(
        InputError, match=r"merge\.push_to_hub ann/merged: 401 Client Error; the merge itself stands in"
    ):
        push_to_hub(folder, "ann/merged")
    assert merged.stands_in(folder)


def test_the_command_pushes_what_it_wrote(run, merged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    for one in merged.adapters:
        Merged(SHAPES_CLIP, Average(), [one], [1.0], one.layers).save(tmp_path / one.name)
    uploads = [str(tmp_path / one.name) for one in merged.adapters]
    options = ["--merge.method=average", f"--merge.output={tmp_path / 'out'}", "--merge.push_to_hub=ann/merged"]
    run("merge", *options, "--uploads", *uploads)
    assert Hub.asked[1][1]["folder_path"] == str(tmp_path / "out")
    assert "Uploaded to https://hub.example/ann/merged" in capsys.readouterr().out
