"""AdaMMS: interpolated blocks, and α by answers that a loop of fused models gives too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llamas import TEXTS, ids_of, llama, saved, tokenizer, trained, weights_in
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaModel

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import AdaMMS
from sap_lightning.errors import InputError
from sap_lightning.fuse import fuse


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two language models that say other things."""
    folder, model = tmp_path_factory.mktemp("unlike"), llama()
    for name, one in {"a": model, "b": trained(model, 1, 0.01)}.items():
        tokenizer().save_pretrained(saved(one, folder / name))
    return [str(folder / name) for name in "ab"]


def fused(models: list[str], output: Path, **options) -> Path:
    return Fusion(models, str(output), **options).run()


def findings_in(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text())["findings"]


def test_blocks_are_interpolated_and_all_else_is_the_first_model_s(trio, tmp_path) -> None:
    result = weights_in(fused(trio[:2], tmp_path / "out", method=AdaMMS(alpha=0.3)))
    a, b = (weights_in(Path(folder)) for folder in trio[:2])
    for key, weight in result.items():
        if ".layers." in key:
            assert_close(weight, 0.7 * a[key] + 0.3 * b[key], atol=1e-7, rtol=0)
        else:
            assert torch.equal(weight, a[key])


def test_blocks_of_another_prefix_are_found(trio, tmp_path) -> None:
    bare = saved(LlamaModel.from_pretrained(trio[1]), tmp_path / "bare")
    assert "layers.0.mlp.up_proj.weight" in weights_in(bare)
    result = weights_in(fused([trio[0], str(bare)], tmp_path / "out", method=AdaMMS(alpha=0.3)))
    expected = weights_in(fused(trio[:2], tmp_path / "expected", method=AdaMMS(alpha=0.3)))
    assert all(torch.equal(result[key], weight) for key, weight in expected.items())


def test_at_alpha_0_it_is_the_first_model_byte_for_byte(trio, tmp_path) -> None:
    fused(trio[:2], tmp_path / "out", method=AdaMMS(alpha=0))
    for shard in Path(trio[0]).glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@torch.inference_mode()
def said(folder: Path) -> list[list[int]]:
    """The most probable next token, sixteen times, after each text."""
    model, found = AutoModelForCausalLM.from_pretrained(folder), []
    for text in TEXTS:
        ids = ids_of(text)
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == model.config.eos_token_id:
                break
        found.append(ids[0, ids_of(text).shape[1] :].tolist())
    return found


def test_alpha_is_that_at_which_fewest_answers_of_fused_models_move(unlike, texts, tmp_path) -> None:
    method = AdaMMS(largest=1.0, steps=6)
    findings = findings_in(fused(unlike, tmp_path / "out", method=method, texts=texts))
    answers = [said(fused(unlike, tmp_path / f"{alpha:g}", method=AdaMMS(alpha=alpha))) for alpha in method.grid]
    moving = []
    for i in range(6):
        beside = [answers[j] for j in (i - 1, i + 1) if 0 <= j < 6]
        moving.append(sum(any(other[x] != answers[i][x] for other in beside) for x in range(len(TEXTS))))
    assert list(findings["moving"].values()) == moving and len(set(moving)) > 1
    best = min(range(1, 5), key=lambda i: (moving[i], i))
    assert findings["alpha"] == method.grid[best]
    fixed = weights_in(tmp_path / f"{method.grid[best]:g}")
    assert all(torch.equal(weight, fixed[key]) for key, weight in weights_in(tmp_path / "out").items())


def test_the_steadiest_alpha_is_no_end_of_the_grid_and_of_equal_ones_the_smallest() -> None:
    chosen = AdaMMS(steps=5, largest=0.8).findings({"moving": torch.tensor([0.0, 3.0, 2.0, 2.0, 0.0])})
    assert chosen["alpha"] == 0.4


def test_clip_models_answer_with_captions(clips, world, tmp_path) -> None:
    line = [f"--fuse.models=[{','.join(clips[:2])}]", "--fuse.method=adamms", "--fuse.method.steps=3"]
    anchors = [f"--anchors.root={world / 'anchors'}", "--anchors.num_pairs=8"]
    fuse([*line, *anchors, f"--fuse.output={tmp_path / 'out'}"])
    findings = findings_in(tmp_path / "out")
    assert findings["alpha"] == 0.3 and list(findings["moving"]) == ["0", "0.3", "0.6"]
    result, a, b = (weights_in(folder) for folder in (tmp_path / "out", *map(Path, clips[:2])))
    key = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert_close(result[key], 0.7 * a[key] + 0.3 * b[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fuse.method adamms looks at data: give --fuse.texts .* or --fuse.method.alpha"),
        ({"method": AdaMMS(alpha=0.1), "texts": "t"}, "fuse.texts t: adamms looks at none here; leave it out"),
        ({"texts": "t", "base": "c"}, "adamms looks at no base; leave it out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Fusion(**{"models": ["a", "b"], "output": "out", "method": "adamms", **options})
