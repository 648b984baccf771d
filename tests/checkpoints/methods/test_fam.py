"""FAM: a permuted copy is found again exactly; rows against the definition in float64; what unlike models give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llamas import WORDS, llama, saved, tokenizer, trained, weights_in
from permuted import moved, permuted
from places import SHAPES_CLIP
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from sap_lightning.checkpoints.behaviour import SPACES
from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import FAM
from sap_lightning.checkpoints.pairs import Pairs
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.checkpoints.texts import Texts
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.errors import InputError
from sap_lightning.fuse import fuse

ALL = FAM(share=1.0, threshold=0.0, beta=0.0, along=1.0, across=1.0)
"""Gives each row of A its counterpart's place."""


@pytest.fixture(scope="module")
def examples(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Examples]:
    """Noise for towers, and random sentences for language models."""
    anchors = AnchorDataModule(str(world / "anchors"), 8, SHAPES_CLIP, cache=False, noise=True)
    folder = tmp_path_factory.mktemp("sentences")
    tokenizer().save_pretrained(folder)
    words = torch.randint(1, len(WORDS), (32, 12), generator=torch.Generator().manual_seed(0))
    (folder / "texts.txt").write_text("\n".join(" ".join(WORDS[word] for word in row) for row in words.tolist()))
    return {"clip": Pairs(anchors, Path(SHAPES_CLIP)), "llama": Texts(str(folder / "texts.txt"), folder)}


def clip(seed: int, **vision: int) -> CLIPModel:
    """One with the shipped CLIP's text tower, and a vision tower of its own."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = CLIPConfig.from_pretrained(SHAPES_CLIP)
    for name, size in (sizes | vision).items():
        setattr(config.vision_config, name, size)
    torch.manual_seed(seed)
    return CLIPModel(config)


def of(kind: str, seed: int = 0, **sizes: int) -> Any:
    """A random model whose weights are large enough for its neurons to differ."""
    model = (
        clip(seed, **sizes) if kind == "clip" else llama(seed, num_attention_heads=4, num_key_value_heads=2, **sizes)
    )
    moved(model, seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    return model.eval()


def sources(*models: Any, folder: Path) -> Sources:
    found = [Checkpoint(str(saved(model, folder / name))) for model, name in zip(models, "ab", strict=True)]
    return Sources.of(found, found[0], unlike=True)


def merged(method: FAM, pair: Sources, shown: Examples) -> dict[str, Tensor]:
    """All weights that the method merges."""
    seen = method.look(pair, shown)
    kept = method.kept(pair, seen)
    found = {}
    for key in pair.first.stated.keys() - kept.keys():
        (rows,) = pair.blocks(key, None)
        found[key] = method.fused(key, method.part(key, rows, pair, seen), seen).view(pair.first.stated[key].shape)
    return found


KINDS = pytest.mark.parametrize("kind", ["clip", "llama"])


@KINDS
def test_a_permuted_copy_is_found_again_exactly(kind, examples, tmp_path) -> None:
    model = of(kind)
    copied, expected = permuted(model)
    for one, other in zip(*map(examples[kind].predictions, (model, copied)), strict=True):
        assert_close(one, other, atol=1e-5, rtol=0)
    seen = ALL.look(sources(model, copied, folder=tmp_path), examples[kind])
    found = {name.removesuffix(".rows"): rows for name, rows in seen.items() if name.endswith(".rows")}
    layers = {layer for layer in expected if any(layer.endswith(role) for role in SPACES)}
    assert found.keys() == layers and len(layers) == 2 * (6 if kind == "clip" else 7)
    for layer, rows in found.items():
        assert torch.equal(rows, expected[layer]), layer
    assert ALL.findings(seen) == {"blocks": [0, 1], "matched": 1.0, "merged": 1.0}


@KINDS
def test_merging_a_permuted_copy_gives_back_the_weights(kind, examples, tmp_path) -> None:
    model = of(kind)
    pair = sources(model, permuted(model)[0], folder=tmp_path)
    for method in (ALL, FAM()):
        for key, weight in merged(method, pair, examples[kind]).items():
            assert_close(weight, model.state_dict()[key], atol=1e-5, rtol=0)


@KINDS
def test_rows_are_taken_at_the_first_model_s_scale(kind, examples, tmp_path) -> None:
    """A copy of which layers give other multiples of the same gives back the weights and biases."""
    model = of(kind)
    copied = permuted(model)[0]
    with torch.no_grad():
        for number, (name, module) in enumerate(copied.named_modules()):
            if isinstance(module, torch.nn.Linear) and ".layers." in name and "text_model" not in name:
                for parameter in module.parameters():
                    parameter.mul_(1 + number / 100)
    pair = sources(model, copied, folder=tmp_path)
    # Neurons of the multiples say other things; what is which is known from the copy itself.
    exact = ALL.look(sources(model, permuted(model)[0], folder=tmp_path / "exact"), examples[kind])
    kept = ALL.kept(pair, exact)
    found = 0
    for key in pair.first.stated.keys() - kept.keys():
        (rows,) = pair.blocks(key, None)
        weight = ALL.fused(key, ALL.part(key, rows, pair, exact), exact).view(pair.first.stated[key].shape)
        assert_close(weight, model.state_dict()[key], atol=1e-5, rtol=0)
        found += 1
    assert found == 2 * (12 if kind == "clip" else 7)


def test_a_bias_moves_by_the_share_of_inputs_that_have_a_counterpart(examples, tmp_path) -> None:
    model, other = of("clip"), trained(of("clip"), 1, 0.05)
    pair = sources(model, other, folder=tmp_path)
    seen = dict(ALL.look(pair, examples["clip"]))
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    seen[f"{layer}.rows"] = torch.arange(40)
    seen[f"{layer}.columns"] = torch.where(torch.arange(24) < 6, torch.arange(24), -1)
    (rows,) = pair.blocks(f"{layer}.bias", None)
    found = ALL.fused(f"{layer}.bias", ALL.part(f"{layer}.bias", rows, pair, seen), seen)[0]
    a, b = (one.state_dict() for one in (model, other))
    scale = a[f"{layer}.weight"][:, :6].norm(dim=1) / b[f"{layer}.weight"][:, :6].norm(dim=1)
    expected = a[f"{layer}.bias"] + 0.25 * (scale * b[f"{layer}.bias"] - a[f"{layer}.bias"])
    assert_close(found, expected, atol=1e-6, rtol=0)


@KINDS
def test_the_order_of_the_other_s_neurons_does_not_matter(kind, examples, tmp_path) -> None:
    model = of(kind)
    other = trained(model, 1, 0.02)
    method = FAM(share=0.5)
    plain = merged(method, sources(model, other, folder=tmp_path / "plain"), examples[kind])
    turned = merged(method, sources(model, permuted(other)[0], folder=tmp_path / "turned"), examples[kind])
    changed = 0
    for key, weight in plain.items():
        assert_close(turned[key], weight, atol=1e-5, rtol=0)
        changed += int((weight != model.state_dict()[key]).sum())
    assert changed > 1000


def test_neurons_of_a_wider_mlp_are_found_among_others(examples, tmp_path) -> None:
    model, wide = of("llama"), of("llama", 1, intermediate_size=60)
    place = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:48]
    own = wide.state_dict()
    for name, weight in model.state_dict().items():
        if weight.shape == own[name].shape:
            own[name].copy_(weight)
        elif name.endswith("down_proj.weight"):
            own[name].zero_()[:, place] = weight
        else:
            own[name][place] = weight
    seen = ALL.look(sources(model, wide, folder=tmp_path), examples["llama"])
    for block in range(2):
        for layer in ("gate", "up"):
            assert torch.equal(seen[f"model.layers.{block}.mlp.{layer}_proj.rows"], place)
        assert torch.equal(seen[f"model.layers.{block}.mlp.down_proj.columns"], place)


def test_blocks_of_a_deeper_model_are_found_in_order(examples, tmp_path) -> None:
    model, deep = of("llama"), of("llama", 1, num_hidden_layers=3)
    own = deep.state_dict()
    for name, weight in model.state_dict().items():
        own[name.replace("layers.1.", "layers.2.")].copy_(weight)
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # the block between them adds nothing
        own[f"model.layers.1.{name}.weight"].zero_()
    pair = sources(model, deep, folder=tmp_path / "deeper")
    assert ALL.look(pair, examples["llama"])["blocks"].tolist() == [0, 2]
    for key, weight in merged(ALL, pair, examples["llama"]).items():
        assert_close(weight, model.state_dict()[key], atol=1e-6, rtol=0)
    other_way = sources(deep, model, folder=tmp_path / "shallower")
    seen = ALL.look(other_way, examples["llama"])
    assert seen["blocks"].tolist() == [0, -1, 1]
    assert ALL.kept(other_way, seen)["model.layers.1.mlp.up_proj.weight"] == "fam leaves it"


def test_towers_that_divide_an_image_otherwise_are_matched_by_fields_of_it(examples, tmp_path) -> None:
    model, other = of("clip"), of("clip", 1, patch_size=16, hidden_size=36, num_hidden_layers=3)
    pair = sources(model, other, folder=tmp_path)
    seen = FAM(threshold=0.0).look(pair, examples["clip"])
    assert seen["vision_model.encoder.layers.0.mlp.fc1.columns"].unique().numel() == 24
    assert all(weight.isfinite().all() for weight in merged(FAM(threshold=0.0), pair, examples["clip"]).values())


def by_definition(a: np.ndarray, b: np.ndarray, x: tuple, y: tuple, rows: np.ndarray, method: FAM) -> np.ndarray:
    """A layer's weight from both models' weights, inputs and outputs (n, d), and which row of B each row has."""

    def importance(given: np.ndarray, made: np.ndarray) -> np.ndarray:
        size = np.linalg.norm(given, axis=1)
        found = []
        for output in made.T:
            p = np.histogram2d(size, output, bins=32)[0] / len(size)
            apart = np.outer(p.sum(1), p.sum(0))
            information = (p[p > 0] * np.log(p[p > 0] / apart[p > 0])).sum()
            found.append(np.abs(output).mean() * information / (output.var() + 1e-6))
        return np.array(found)

    def best(scores: np.ndarray) -> set[int]:
        return set(np.argsort(scores)[-round(method.share * len(scores)) :].tolist())

    important = [best(importance(given, made)) for given, made in zip(x, y, strict=True)]
    variance = y[1].var(0)
    sharp = variance / (variance + np.sort(variance)[(len(variance) - 1) // 2])
    d, result = x[0].mean(0), a.copy()
    for i, j in enumerate(rows):
        if j >= 0 and i in important[0] and j in important[1]:
            tau = np.linalg.norm(a[i]) / np.linalg.norm(b[j]) * b[j] - a[i]
            along = (1 - method.beta * sharp[j]) * (tau @ d) / (d @ d) * d
            result[i] = a[i] + method.along * along + method.across * (tau - along)
    return result


def test_rows_are_merged_as_by_definition(examples, tmp_path) -> None:
    models = of("llama"), trained(of("llama"), 1, 0.02).eval()
    method = FAM(share=0.5, threshold=0.0, along=0.7, across=0.4, beta=0.6)
    result = merged(method, sources(*models, folder=tmp_path), examples["llama"])
    for layer in ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"):
        x, y, weights = [], [], []
        for model in models:
            given: list[Tensor] = []
            module = model.get_submodule(layer)
            hook = module.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0][0]))
            examples["llama"].show(model)
            hook.remove()
            weights.append(module.weight.detach().double().numpy())
            x.append(torch.cat(given).double().numpy())
            y.append(x[-1] @ weights[-1].T)
        # So near a copy each neuron's counterpart is the one in its place.
        expected = by_definition(*weights, x, y, np.arange(len(weights[0])), method)
        assert_close(result[f"{layer}.weight"].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
        assert not np.allclose(expected, weights[0])


def test_nothing_is_added_at_scale_0_and_of_equal_models(examples, tmp_path) -> None:
    models = of("llama"), trained(of("llama"), 1, 0.02)
    still = FAM(along=0.0, across=0.0)
    for pair, method in (((models[0], models[0]), FAM()), (models, still)):
        found = merged(method, sources(*pair, folder=tmp_path / method.name), examples["llama"])
        assert found and all(torch.equal(weight, models[0].state_dict()[key]) for key, weight in found.items())


def test_whole_models_are_merged_to_the_same_function(examples, tmp_path) -> None:
    model = of("llama")
    a, b = saved(model, tmp_path / "a"), saved(permuted(model)[0], tmp_path / "b")
    tokenizer().save_pretrained(a)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(examples["llama"].texts))
    out = Fusion([str(a), str(b)], str(tmp_path / "out"), method="fam", texts=str(texts)).run()
    result = AutoModelForCausalLM.from_pretrained(out)
    for one, other in zip(*map(examples["llama"].predictions, (model, result)), strict=True):
        assert_close(one, other, atol=1e-5, rtol=0)
    findings = json.loads((out / "merge.json").read_text())["findings"]
    assert findings["blocks"] == [0, 1] and findings["matched"] == 1 and 0 < findings["merged"] < 0.5
    kept, weights = findings["kept"]["fam leaves it"], weights_in(a)
    assert kept and all(torch.equal(weights_in(out)[key], weights[key]) for key in kept)


def test_the_command_merges_towers_of_other_sizes_at_anchors(world, tmp_path) -> None:
    folders = []
    for name, model in (("a", of("clip")), ("b", of("clip", 1, hidden_size=36, num_hidden_layers=3))):
        shutil.copytree(SHAPES_CLIP, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        folders.append(str(saved(model, tmp_path / name)))
    line = [f"--fuse.models=[{','.join(folders)}]", "--fuse.method=fam", "--fuse.method.threshold=0"]
    anchors = [f"--anchors.root={world / 'anchors'}", "--anchors.num_pairs=8"]
    fuse([*line, *anchors, f"--fuse.output={tmp_path / 'out'}"])
    result, own = weights_in(tmp_path / "out"), weights_in(tmp_path / "a")
    changed = [key for key, weight in result.items() if not torch.equal(weight, own[key])]
    assert changed and all(key.startswith("vision_model.encoder.layers.") for key in changed)
    CLIPModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fuse.method fam looks at data: give --fuse.texts"),
        ({"texts": "t", "base": "c"}, "fuse.base c: fam looks at no base; leave it out"),
        ({"texts": "t", "models": ["a", "b", "d"]}, "fam fuses 2 models, got 3"),
    ],
)
def test_what_it_lacks_is_said_before_a_weight_is_read(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Fusion(**{"models": ["a", "b"], "output": "out", "method": "fam", **options})


def test_without_scipy_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("sap_lightning.checkpoints.methods.fam.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"fam: assigns neurons by scipy; pip install 'sap-lightning\[fam\]'"):
        Fusion(["a", "b"], "out", method="fam", texts="t")


def test_models_of_other_blocks_or_words_are_refused(texts, tmp_path) -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    folder, a = saved(gpt, tmp_path / "gpt"), saved(of("llama"), tmp_path / "a")
    for one in (folder, a):
        tokenizer().save_pretrained(one)
    with pytest.raises(InputError, match=r"gpt: its blocks have no layers self_attn.q_proj.* as Llama's or CLIP's"):
        Fusion([str(folder), str(saved(gpt, tmp_path / "b"))], str(tmp_path / "out"), method="fam", texts=texts).run()
    few = saved(of("llama", vocab_size=5), tmp_path / "few")
    with pytest.raises(InputError, match=r"makes token \d+ of it, and .*few has a vocabulary of 5; give"):
        Fusion([str(a), str(few)], str(tmp_path / "out"), method="fam", texts=texts).run()
    assert not (tmp_path / "out").exists()
