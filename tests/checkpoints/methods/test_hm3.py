"""HM3: classifiers joined, whose probabilities are their own where bodies are alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed
from llamas import SIZES, TEXTS, ids_of, saved, trained, weights_in
from references import contents
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BeitConfig,
    BeitForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import HM3
from sap_lightning.errors import InputError
from sap_lightning.functional.groups import probabilities_by_group
from sap_lightning.fuse import fuse
from sap_lightning.merging import DARE, TIES

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": 16, "patch_size": 8}
LABELS = {"animals": ["cat", "dog", "horse"], "moods": ["cat", "sad"]}
"""Of two tasks, which have a name in common."""
KINDS = {
    "llama": (LlamaForSequenceClassification, LlamaConfig, {**SIZES, "pad_token_id": 0}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, {**SMALL, "vocab_size": 40}),
    "vit": (ViTForImageClassification, ViTConfig, {**SMALL, **IMAGES}),
    "resnet": (ResNetForImageClassification, ResNetConfig,
               {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
}  # fmt: skip


def classifier(kind: str, task: str, **options: Any) -> Any:
    """One of equal bodies, with a head of its own."""
    of_model, of_config, settings = KINDS[kind]
    torch.manual_seed(0)
    body = of_model(of_config(num_labels=2, **settings | options))
    labels = LABELS[task]
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = of_model(of_config(**named, **settings | options))
    generator = torch.Generator().manual_seed(len(labels))
    weights = model.state_dict()
    for key, weight in body.state_dict().items():
        rows = torch.rand(weights[key].shape, generator=generator) - 0.5
        weights[key].copy_(weight if weight.shape == weights[key].shape and key not in heads_of(body) else rows)
    return model


def heads_of(model: Any) -> list[str]:
    return [key for key, weight in model.state_dict().items() if key.split(".")[0] in ("classifier", "score") and
            len(weight) == model.config.num_labels]  # fmt: skip


def both(kind: str, folder: Path, **options: Any) -> list[str]:
    return [str(saved(classifier(kind, task, **options), folder / task)) for task in LABELS]


def joined(models: list[str], output: Path, method: HM3 | None = None, **options: Any) -> dict[str, Tensor]:
    Fusion(models, str(output), method=method or HM3(), **options).run()
    return weights_in(output)


@torch.inference_mode()
def logits_of(folder: Path | str, kind: str) -> Tensor:
    if kind in ("vit", "resnet"):
        images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return AutoModelForImageClassification.from_pretrained(folder)(images).logits
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.cat([model(ids_of(text)).logits for text in TEXTS])


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_bodies_each_group_s_probabilities_are_its_model_s(kind, tmp_path) -> None:
    models = both(kind, tmp_path)
    joined(models, tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["label_groups"]
    found = probabilities_by_group(logits_of(tmp_path / "out", kind), groups)
    for task, folder in zip(LABELS, models, strict=True):
        assert_close(found[task], logits_of(folder, kind).softmax(-1), atol=1e-6, rtol=0)
    assert not torch.allclose(logits_of(models[1], kind)[:, :1], logits_of(models[0], kind)[:, :1])


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_the_head_is_the_sum_of_heads_expanded_by_zeros(kind, tmp_path) -> None:
    models = both(kind, tmp_path)
    result, (one, two) = joined(models, tmp_path / "out"), map(weights_in, map(Path, models))
    for key in {key for key in one if one[key].shape != two[key].shape}:
        first, other = torch.zeros(2, 5, *one[key].shape[1:])
        first[:3], other[3:] = one[key], two[key]
        assert torch.equal(result[key], first + other)


def test_labels_are_a_task_s_and_say_so(tmp_path) -> None:
    joined(both("vit", tmp_path), tmp_path / "out")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    expected = ["animals: cat", "animals: dog", "animals: horse", "moods: cat", "moods: sad"]
    assert [config.id2label[number] for number in range(5)] == expected and config.num_labels == 5
    assert config.label2id == {name: number for number, name in enumerate(expected)}
    groups = {"animals": [0, 3], "moods": [3, 5]}
    assert config.label_groups == groups
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["findings"]["label_groups"] == groups


@pytest.mark.parametrize("method", [TIES(variant="mergekit"), DARE(sparsity=0.5)], ids=lambda one: one.name)
def test_bodies_are_fused_as_the_method_under_it_does(method, tmp_path) -> None:
    base = classifier("roberta", "animals")
    folders = [str(saved(trained(classifier("roberta", task), seed), tmp_path / task))
               for seed, task in enumerate(LABELS)]  # fmt: skip
    bare = str(saved(base.roberta, tmp_path / "base"))
    result = joined(folders, tmp_path / "out", HM3(method), base=bare)
    Fusion(folders, str(tmp_path / "plain"), bare, method).run()
    plain = {key: one for key, one in weights_in(tmp_path / "plain").items() if ".layer." in key}
    assert plain and all(torch.equal(result[key], weight) for key, weight in plain.items())


def test_tasks_with_as_many_labels_keep_their_own_rows(tmp_path) -> None:
    one, two = classifier("vit", "moods"), trained(classifier("vit", "moods"), 1)
    folders = [str(saved(one, tmp_path / "x" / "moods")), str(saved(two, tmp_path / "y" / "moods"))]
    result = joined(folders, tmp_path / "out")
    assert torch.equal(result["classifier.bias"], torch.cat([one.classifier.bias, two.classifier.bias]))
    assert_close(
        result["vit.layernorm.weight"], (one.vit.layernorm.weight + two.vit.layernorm.weight) / 2, atol=1e-6, rtol=0
    )
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.label_groups == {"moods (1)": [0, 2], "moods (2)": [2, 4]}


def test_the_command_joins_and_a_killed_one_continues_to_the_same_bytes(tmp_path) -> None:
    models = both("llama", tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    line = [f"--fuse.models=[{','.join(models)}]", "--fuse.method=hm3", f"--fuse.output={place / 'out'}"]
    fuse(line)
    whole = contents(place / "out")
    shutil.rmtree(place / "out")
    play = Fusion(models, str(place / "out"), method="hm3").run
    events = killed(place, play)
    for event in (events // 2, events - 4):
        shutil.rmtree(place / "out")
        killed(place, play, event)
        fuse(line)
        assert contents(place / "out") == whole, event
        assert [path.name for path in place.iterdir()] == ["out"]


def refused(models: list[str | Path], output: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        joined(list(map(str, models)), output)
    assert not output.exists() and not list(output.parent.glob(".*"))


def test_other_bodies_and_poolings_are_refused(trio, tmp_path) -> None:
    one = saved(classifier("vit", "animals"), tmp_path / "one")
    other = saved(classifier("vit", "moods", num_hidden_layers=2), tmp_path / "deeper")
    refused([one, other], tmp_path / "out", "deeper: num_hidden_layers is 2 in its config, and 1 in .*one's")
    refused(
        [one, saved(classifier("roberta", "moods"), tmp_path / "r")], tmp_path / "out", "r: model_type is 'roberta'"
    )
    torch.manual_seed(0)
    beits = [
        saved(BeitForImageClassification(BeitConfig(**SMALL, **IMAGES, use_mean_pooling=mean)), tmp_path / str(mean))
        for mean in (True, False)
    ]
    refused([*beits], tmp_path / "out", "False: use_mean_pooling is False")
    refused([*trio[:2]], tmp_path / "out", "a: is 'LlamaForCausalLM' by its config; hm3 joins models …ForImage")
    several = saved(classifier("vit", "moods", problem_type="multi_label_classification"), tmp_path / "several")
    refused([one, several], tmp_path / "out", "several: problem_type is 'multi_label_classification'")


def test_other_images_and_heads_that_are_none_are_refused(tmp_path) -> None:
    models = both("vit", tmp_path)
    for folder, mean in zip(models, (0.5, 0.4), strict=True):
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps({"image_mean": [mean] * 3}))
    refused([*models], tmp_path / "out", "moods: its preprocessor_config.json says other than .*animals's")
    (Path(models[1]) / "preprocessor_config.json").unlink()
    config = json.loads((Path(models[1]) / "config.json").read_text())
    (Path(models[1]) / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a"}, "label2id": {"a": 0}}))
    refused([*models], tmp_path / "out", r"animals: has 0 layers such as classifier or score .*\(3, 1\)")


def test_adapters_are_none_of_its_models() -> None:
    with pytest.raises(InputError, match=r"merge.method hm3 fuses whole models, not adapters; it is a method of the"):
        HM3().prepare([], [])
