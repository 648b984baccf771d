"""What a merge leaves behind, and when."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from adapters import adapter_of
from damage import cut, empty, flip
from huggingface_hub import ModelCard
from peft import PeftModel
from places import SHAPES_CLIP
from probes import random_layer, relative_gap
from references import randn
from transformers import CLIPModel, CLIPVisionModelWithProjection

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import merged as output
from sap_lightning.merging.average import Average
from sap_lightning.merging.dare import DARE
from sap_lightning.merging.krum import Krum
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.median import Median
from sap_lightning.merging.merged import Merged, holds, push_to_hub, record_in
from sap_lightning.merging.method import MergeMethod
from sap_lightning.merging.ties import TIES
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes, linear_weight

METRICS = {"anchor_loss": 0.61234}


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    found = layer_shapes(load_base(SHAPES_CLIP).tower)
    return {name: found[name] for name in sorted(found) if name.endswith(("q_proj", "fc1"))}


@pytest.fixture(scope="module")
def adapters(shapes) -> list[Adapter]:
    return [client(name, seed, shapes) for seed, name in enumerate(["photo", "sketch"])]


def client(name: str, seed: int, shapes: dict[str, torch.Size]) -> Adapter:
    layers = {layer: random_layer(1000 * seed + 2 * i, tuple(shape)) for i, (layer, shape) in enumerate(shapes.items())}
    return adapter_of(layers, name)


@pytest.fixture(scope="module")
def merged(adapters) -> Merged:
    return merge(adapters, Average())


def merge(adapters: list[Adapter], method: MergeMethod, weights: tuple[float, ...] = (0.75, 0.25)) -> Merged:
    prepared = method.prepare(adapters, list(weights))
    return Merged(SHAPES_CLIP, method, adapters, list(weights), prepared, prepared.apply())


def images() -> torch.Tensor:
    return randn(0, 2, 3, 64, 64)


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
    folder = merged.save(tmp_path / "out", format="model")
    clip = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = clip.get_image_features(images()).pooler_output
    torch.testing.assert_close(features, features_with(merged), atol=1e-5, rtol=0)
    assert load_base(str(folder)).texts(["a photo"]).shape[0] == 1, "the tokenizer is there"
    assert (folder / "preprocessor_config.json").is_file()


def test_a_dense_merge_is_a_model_unless_an_adapter_or_a_rank_is_asked_for(adapters, tmp_path):
    dense = merge(adapters, TIES())
    assert (dense.save(tmp_path / "auto") / "model.safetensors").is_file()
    assert (dense.save(tmp_path / "adapter", format="adapter") / "adapter_model.safetensors").is_file()
    assert (dense.save(tmp_path / "rank", rank=4) / "adapter_model.safetensors").is_file()
    assert record_in(tmp_path / "rank")["relative_error"] > record_in(tmp_path / "adapter")["relative_error"] > 0


@pytest.mark.parametrize("format", ["adapter", "model"])
def test_the_same_merge_gives_the_same_bytes(adapters, tmp_path, format):
    one, other = (merge(adapters, Average()).save(tmp_path / name, METRICS, format) for name in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


# The record


def test_the_record_says_what_decided_the_outcome(merged, adapters, tmp_path):
    record = record_in(merged.save(tmp_path / "out", METRICS))
    assert record["base"] == Path(SHAPES_CLIP).name, "where it is on this machine is nobody else's business"
    assert record["method"] == "average" and record["settings"] == {}
    assert record["sources"] == [
        {"name": name, "sha256": adapter.sha256, "weight": weight, "base": adapter.base, "dropped": []}
        for name, adapter, weight in zip(("photo", "sketch"), adapters, (0.75, 0.25), strict=True)
    ]
    assert record["metrics"] == METRICS
    assert record["findings"] == {} and record["rejected"] == []


def test_the_record_has_what_the_method_found_and_who_was_left_out(shapes, tmp_path):
    clients = [client(name, seed, shapes) for seed, name in enumerate(["cartoon", "photo", "sketch"])]
    merged = replace(merge(clients, Krum(multi=2), (0.2, 0.3, 0.5)), rejected=["painting"])
    record = record_in(merged.save(tmp_path / "out"))
    assert record["findings"] == merged.prepared.findings and len(record["findings"]["chosen"]) == 2
    assert record["rejected"] == ["painting"] and record["metrics"] == {}
    shown = ModelCard.load(tmp_path / "out" / "README.md").text.partition("```json\n")[2].partition("```")[0]
    assert json.loads(shown) == record["findings"]


def test_a_merge_at_another_sparsity_keeps_all_but_its_update(adapters):
    merged = merge(adapters, Magnitude(0.8))
    other = merged.at(0.3)
    assert relative_gap(other.update, Magnitude(0.3).merge(adapters, [0.75, 0.25])) == 0
    assert relative_gap(other.at(None).update, merged.update) == 0
    assert relative_gap(merged.update, other.update) > 0, "the first stays as it was"
    assert other.record() == merged.record() and other.prepared is merged.prepared


def test_a_merge_stands_in_its_own_folder_only(merged, adapters, shapes, tmp_path):
    folder = merge(adapters, TIES(0.8)).save(tmp_path / "out", METRICS, rank=4)
    assert merge(adapters, TIES(0.8)).stands_in(folder)
    assert not merge(adapters, TIES(0.7)).stands_in(folder)
    assert not merge(adapters, TIES(0.8, variant="peft")).stands_in(folder)
    assert not merge(adapters, DARE(0.8)).stands_in(folder)
    assert not merge(adapters, TIES(0.8), (0.5, 0.5)).stands_in(folder)
    assert not merge(adapters[:1], TIES(0.8), (1.0,)).stands_in(folder)
    assert not merge([adapters[0], client("sketch", 7, shapes)], TIES(0.8)).stands_in(folder)
    assert not replace(merge(adapters, TIES(0.8)), base="another/base").stands_in(folder)
    assert not merged.stands_in(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [cut, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "merge.json", "README.md"])
def test_a_folder_of_which_a_file_has_changed_holds_no_merge(
    merged, adapters, tmp_path, damage, name, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    caplog.set_level("WARNING", logger="sap_lightning")
    folder = merged.save(tmp_path / "out")
    record = record_in(folder)
    sources = [one.sha256 for one in adapters]
    assert record["sources"] and merged.stands_in(folder) and holds(folder, Average(), sources) and not caplog.text
    damage(folder / name)
    assert not merged.stands_in(folder) and not holds(folder, Average(), sources)
    if (folder / "merge.json").is_file():
        assert str(folder / name) in caplog.text
        with pytest.raises(InputError, match=rf"{name}: .*has changed since it was written; merge again"):
            record_in(folder)


@pytest.mark.parametrize("record", ['{"files": ["a"]}', '{"files": null}', '{"files": "x"}', "[" * 100_000])
def test_a_record_of_another_hand_is_no_record(adapters, tmp_path, record):
    (tmp_path / "merge.json").write_text(record)
    assert not holds(tmp_path, Average(), [one.sha256 for one in adapters])
    with pytest.raises(InputError, match=r"merge\.json: has changed since it was written"):
        record_in(tmp_path)
    (tmp_path / "merge.json").write_text('{"sources": [{}]}')
    assert not holds(tmp_path, Average(), [one.sha256 for one in adapters])


def test_a_folder_holds_a_merge_of_these_adapters_or_of_these_but_for_outliers(adapters, shapes, tmp_path):
    clients = [*adapters, client("cartoon", 2, shapes)]
    sources = [one.sha256 for one in clients]
    whole, part = merge(clients, TIES(0.8), (0.5, 0.3, 0.2)), merge(adapters, TIES(0.8))
    for name, one in (("whole", whole), ("part", part), ("rejecting", replace(part, rejected=["cartoon"]))):
        one.save(tmp_path / name)
    held = {name for name in ("whole", "part", "rejecting") if holds(tmp_path / name, TIES(0.8), sources)}
    assert held == {"whole", "rejecting"}
    assert holds(tmp_path / "whole", TIES(0.8), sources[::-1]), "in any order"
    assert not holds(tmp_path / "whole", TIES(0.8), sources[:2])
    assert not holds(tmp_path / "rejecting", TIES(0.8), sources[1:]), "one that was merged is not among these"
    assert not holds(tmp_path / "whole", TIES(0.7), sources)
    assert not holds(tmp_path / "whole", DARE(0.8), sources)
    assert not holds(tmp_path / "nowhere", TIES(0.8), sources)


# The card


def test_the_card_says_how_the_model_was_made(adapters, tmp_path):
    folder = merge(adapters, TIES(0.8)).save(tmp_path / "out", METRICS)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert {"merge", "lora", "sap_lightning", "ties"} <= set(card.data.tags)
    assert "base_model" not in card.data.to_dict(), "a folder is no model of the hub"
    assert "merged by ties" in card.text and "Base: `shapes_clip`" in card.text
    assert "- sparsity: `0.8`" in card.text and '- variant: `"authors"`' in card.text
    assert "- anchor_loss: 0.6123" in card.text
    for adapter in adapters:
        assert f"| {adapter.name} | " in card.text and adapter.sha256 in card.text


def test_the_card_says_what_speaks_against_the_adapters(adapters):
    assert "Doubts" not in merge(adapters, TIES(0.8)).card("peft", METRICS).text
    doubted = replace(merge(adapters, TIES(0.8)), doubts=["upload 'a|b': its ΔW is zero"])
    assert "- upload 'a&#124;b': its ΔW is zero" in doubted.card("peft", METRICS).text


def test_an_upload_s_name_is_no_mark_in_the_card(adapters, tmp_path):
    hostile = [replace(one, name=f"{k}|`<script>\n## [x](y)\udce9") for k, one in enumerate(adapters)]
    folder = merge(hostile, TIES(0.8)).save(tmp_path / "out", {"accuracy on |": 0.5})
    text = ModelCard.load(folder / "README.md").text
    assert "<script" not in text and "\n## [x" not in text and "accuracy on &#124;: 0.5" in text
    assert r"| 0&#124;&#96;&#60;script&#62;&#92;n## &#91;x&#93;(y)&#92;udce9 | " in text


def test_the_card_names_a_base_of_the_hub(merged):
    card = replace(merged, base="openai/clip-vit-base-patch16").card("peft", METRICS)
    assert ModelCard(str(card)).data.base_model == "openai/clip-vit-base-patch16"
    assert ModelCard(str(card)).data.library_name == "peft"


def test_a_card_without_settings_or_metrics_says_none(adapters):
    text = merge(adapters, Median()).card("peft", {}).text
    assert "## Settings\n\nnone" in text and "## Evaluation\n\nnone" in text


# Whole or not at all


@pytest.mark.parametrize("format", ["adapter", "model"])
@pytest.mark.parametrize("failing", ["card", "record"])
def test_nothing_is_left_when_saving_fails_midway(merged, tmp_path, monkeypatch, format, failing):
    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    monkeypatch.setattr(Merged, failing, fail)
    with pytest.raises(RuntimeError, match="midway"):
        merged.save(tmp_path / "out", METRICS, format)
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


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    monkeypatch.setattr(output, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    return Hub


def test_a_merge_is_pushed_to_a_repository_that_may_be_new(merged, tmp_path, hub):
    folder = merged.save(tmp_path / "out")
    assert push_to_hub(folder, "ann/merged") == "https://hub.example/ann/merged"
    (created, options), (uploaded, content) = hub.asked
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


def test_the_command_pushes_what_it_wrote(run, merged, tmp_path, hub, capsys):
    uploads = [str(merge([one], Average(), (1.0,)).save(tmp_path / one.name)) for one in merged.adapters]
    options = ["--merge.method=average", f"--merge.output={tmp_path / 'out'}", "--merge.push_to_hub=ann/merged"]
    run("merge", *options, "--uploads", *uploads)
    assert hub.asked[1][1]["folder_path"] == str(tmp_path / "out")
    assert "Uploaded to https://hub.example/ann/merged" in capsys.readouterr().out
