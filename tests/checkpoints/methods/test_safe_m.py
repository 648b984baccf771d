"""SAFE-M against its definition in numpy, with mean activations that another way of hooking gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import killed
from llamas import TEXTS, WORDS, weights_in
from references import contents
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import SafeM
from sap_lightning.checkpoints.sources import Change, Part, Rows
from sap_lightning.errors import InputError
from sap_lightning.fuse import fuse

LAYERS = [
    f"model.layers.{block}.{layer}_proj"
    for block in range(2)
    for layer in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def fused(folders: list[str], texts: str, output: Path, **settings: object) -> dict[str, Tensor]:
    *models, base = folders
    return weights_in(Fusion(models, str(output), base, SafeM(**settings), texts=texts).run())


@torch.no_grad()
def means(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean input of each layer over all words of the texts, and by its weight the mean output."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0][0]))
    for text in TEXTS:
        model(torch.tensor([[WORDS.index(word) for word in text.split()]]))
    inputs = {name: torch.cat(rows).double().mean(0).numpy() for name, rows in seen.items()}
    weights = {name: model.get_submodule(name).weight.double().numpy() for name in LAYERS}
    return {name: (inputs[name], weights[name] @ inputs[name]) for name in LAYERS}


def by_definition(a, b, c, of_a, of_b, of_c, share: float, paper: bool) -> np.ndarray:
    x, y = of_a
    gradients = np.outer(y, x), np.outer(of_b[1] - of_c[1], x)
    salient = []
    for weight, g in zip((a, b), gradients, strict=True):
        score = np.abs(weight * g) / (g**2 + 1e-6 if paper else 1 + 0.1 * g**2)
        salient.append(score >= np.sort(score, axis=None)[-round(share * score.size)])
    conflict = salient[0] & salient[1] & (np.sign(a - c) != np.sign(b - c))
    tau = (b - c) * (salient[1] & ~conflict)
    along = np.outer(tau @ x, x) / (x @ x)
    return a + along + 0.8 * (tau - along)


@pytest.mark.parametrize("sharpness", ["code", "paper"])
def test_matrices_of_blocks_are_as_by_definition_and_all_else_is_the_first_model_s(
    sharpness, speaking, texts, tmp_path
) -> None:
    result = fused(speaking, texts, tmp_path / "out", share=0.3, sharpness=sharpness)
    a, b, c = (weights_in(Path(folder)) for folder in speaking)
    of = [means(folder) for folder in speaking]
    for key, weight in result.items():
        if (layer := key.removesuffix(".weight")) in LAYERS:
            models = (one[key].double().numpy() for one in (a, b, c))
            expected = by_definition(*models, *(one[layer] for one in of), 0.3, sharpness == "paper")
            # A score at the threshold may fall on the other side of it by rounding.
            differs = (weight.double() - torch.from_numpy(expected)).abs() > 1e-6
            assert differs.sum(1).count_nonzero() <= 1, key
        else:
            assert torch.equal(weight, a[key]), key


def test_all_that_b_changed_is_added_where_all_is_let_in(speaking, texts, tmp_path) -> None:
    """Every weight is salient: but for conflicts it is A + τ_B."""
    result = fused(speaking, texts, tmp_path / "out", share=1.0, along=1.0, across=1.0)
    a, b, c = (weights_in(Path(folder)) for folder in speaking)
    for layer in LAYERS:
        key = f"{layer}.weight"
        tau_a, tau_b = a[key] - c[key], b[key] - c[key]
        expected = a[key] + tau_b * (tau_a.sign() == tau_b.sign())
        assert_close(result[key], expected, atol=1e-6, rtol=0)


def test_nothing_is_added_at_scale_0_and_equal_models_stay_as_they_are(speaking, texts, tmp_path) -> None:
    a = weights_in(Path(speaking[0]))
    result = fused(speaking, texts, tmp_path / "none", along=0.0, across=0.0)
    assert all(torch.equal(result[key], weight) for key, weight in a.items())
    same = str(shutil.copytree(speaking[2], tmp_path / "same"))
    result = fused([speaking[0], same, speaking[2]], texts, tmp_path / "base")
    assert all(torch.equal(result[key], weight) for key, weight in a.items())


def test_biases_are_fused_by_what_comes_out() -> None:
    """One layer by hand: the second of three biases is where B's outputs have moved."""
    a, b, c = (torch.tensor([values]) for values in ([1.0, 1.0, 1.0], [1.0, 5.0, 1.5], [1.0, 1.0, 1.0]))
    method = SafeM(share=0.4)
    seen = {"h.0.inputs": torch.ones(2), "h.0.outputs": torch.ones(3), "h.0.moved": torch.tensor([0.0, 4.0, 0.5])}
    part = Part(Rows(0, 1), c, [Change(name, "h.0.bias", weight, c) for name, weight in (("a", a), ("b", b))])
    # τ is (0, 4, 0); along (0, 4, 1/2) it is 16 / 16.25 of that direction.
    direction = torch.tensor([0.0, 4.0, 0.5])
    along = 16 / 16.25 * direction
    expected = 1 + along + 0.8 * (torch.tensor([0.0, 4.0, 0.0]) - along)
    assert_close(method.fused("h.0.bias", part, seen), expected[None])


def test_a_killed_fusion_continues_to_the_same_bytes(speaking, texts, tmp_path) -> None:
    *models, base = speaking
    play = Fusion(models, str(tmp_path / "out"), base, "safe_m", texts=texts).run
    play()
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    killed(tmp_path, play, 12)
    play()
    assert contents(tmp_path / "out") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out", "texts.txt"}


def test_both_towers_of_clip_models_are_fused_by_anchors(clips, world, tmp_path) -> None:
    *models, base = clips
    line = [f"--fuse.models=[{','.join(models)}]", f"--fuse.base={base}", f"--fuse.output={tmp_path / 'out'}"]
    fuse([*line, f"--anchors.root={world / 'anchors'}", "--anchors.num_pairs=8", "--fuse.method=safe_m"])
    result, own = weights_in(tmp_path / "out"), weights_in(Path(models[0]))
    changed = [key for key, weight in result.items() if not torch.equal(weight, own[key])]
    assert {key.split(".")[0] for key in changed} == {"text_model", "vision_model"}
    assert all(".layers." in key and "norm" not in key for key in changed)
    assert any(key.endswith("bias") for key in changed)


def test_the_command_fuses(speaking, texts, tmp_path) -> None:
    *models, base = speaking
    line = [f"--fuse.models=[{','.join(models)}]", f"--fuse.base={base}", f"--fuse.output={tmp_path / 'out'}"]
    fuse([*line, f"--fuse.texts={texts}", "--fuse.method=safe_m", "--fuse.method.share=0.5"])
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["method"], record["settings"]["share"]) == ("safe_m", 0.5)
    assert "model.norm.weight" in record["findings"]["kept"]["safe_m leaves it"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fuse.method safe_m looks at data: give --fuse.texts for language models, or --anchors.root"),
        ({"texts": "t", "base": None}, "fuse.base is not set: safe_m needs the model that all were trained from"),
        ({"texts": "t", "models": ["a", "b", "d"]}, "safe_m fuses 2 models, got 3"),
        ({"texts": "t", "models": ["a"]}, "safe_m needs at least 2"),
        ({"texts": "t", "weights": [0.5, 0.5]}, "fuse.weights .*: safe_m weighs no models; leave it out"),
    ],
)
def test_what_it_lacks_is_said_before_a_weight_is_read(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Fusion(**{"models": ["a", "b"], "output": "out", "base": "c", "method": "safe_m", **options})


def test_it_is_no_method_for_adapters(run) -> None:
    with pytest.raises(InputError, match=r"merge.method safe_m: no such method"):
        run("merge", "--merge.method=safe_m", "--merge.output=out", "--uploads", "a")
    with pytest.raises(InputError, match=r"merge.method safe_m fuses whole models, not adapters"):
        SafeM().prepare([], [])
