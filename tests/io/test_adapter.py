from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from references import TINY_VISION
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2Model,
)

from sap_lightning.errors import InputError
from sap_lightning.fingerprints import fingerprint
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.reach import MEASURED
from sap_lightning.io.adapter import read_adapter, sha256_of, write_adapter
from sap_lightning.io.manifest import DIGEST, Manifest
from sap_lightning.io.peft_config import CONFIG_FILE
from sap_lightning.io.rules import json_bytes
from sap_lightning.io.upload_files import MANIFEST_FILE, WEIGHTS_FILE
from sap_lightning.models.layers import layer_shapes

TEXT = CLIPTextConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, eos_token_id=2
)
Q = "vision_model.encoder.layers.0.self_attn.q_proj"
Q_A = f"base_model.model.{Q}.lora_A.weight"
Q_B = f"base_model.model.{Q}.lora_B.weight"
FC1 = "vision_model.encoder.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(TINY_VISION).eval()


@pytest.fixture(scope="module")
def shapes(tower: CLIPVisionModelWithProjection) -> dict[str, torch.Size]:
    return layer_shapes(tower)


def trained(model: torch.nn.Module, **config: Any) -> PeftModel:
    """A PEFT model whose factors are all random, as after training."""
    torch.manual_seed(1)
    model = get_peft_model(deepcopy(model), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def peft_deltas(model: PeftModel) -> dict[str, Tensor]:
    modules = model.get_base_model().named_modules()
    return {name: m.get_delta_weight("default").detach() for name, m in modules if hasattr(m, "get_delta_weight")}


def random_layers(shapes: dict[str, torch.Size], names: tuple[str, ...] = (Q, FC1)) -> dict[str, LoRALayer]:
    """Layers of unlike ranks and scales."""
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for rank, name in enumerate(names, start=3):
        d_out, d_in = shapes[name]
        a = torch.randn(rank, d_in, generator=generator) / 10
        b = torch.randn(d_out, rank, generator=generator) / 10
        layers[name] = LoRALayer(a, b, scale=16 / rank)
    return layers


def manifest_for(layers: dict[str, LoRALayer], tower: torch.nn.Module) -> Manifest:
    return Manifest(
        base="tiny-clip",
        base_fingerprint=fingerprint(tower),
        domain="art painting",
        class_names=("dog", "guitare à dix cordes"),
        num_samples=100,
        rank=3,
        alpha=16.0,
        targets=("q_proj", "fc1"),
        seed=0,
        packages={"torch": "2"},
        tensors_sha256=sha256_of(layers),
    )


@pytest.fixture
def upload(tmp_path: Path, tower: torch.nn.Module, shapes: dict[str, torch.Size]) -> Path:
    layers = random_layers(shapes)
    return write_adapter(tmp_path / "upload", layers, "tiny-clip", manifest_for(layers, tower))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What PEFT saves


@pytest.mark.parametrize("model_class", [CLIPVisionModelWithProjection, CLIPVisionModel])
@pytest.mark.parametrize(
    "config",
    [
        dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]),
        dict(r=4, lora_alpha=6, target_modules=["q_proj", "fc1", "fc2"], use_rslora=True),
        dict(r=4, target_modules=["v_proj"], init_lora_weights="gaussian", lora_dropout=0.1),
        dict(r=4, target_modules=["v_proj"], init_lora_weights="orthogonal"),
        dict(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "fc1", "fc2"],
            rank_pattern={r"layers\.1\..*q_proj": 2, "^encoder.layers.0.*q_proj": 1, "fc1": 3, "0.mlp.fc2": 5},
            alpha_pattern={r"encoder.layers.0.mlp.fc1": 1.5, r"^.*fc2": 7},
        ),
        dict(
            r=4,
            target_modules=["q_proj", "v_proj"],
            use_rslora=True,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.1.self_attn.v_proj": 9},
        ),
    ],
    ids=["plain", "rslora", "gaussian", "orthogonal", "patterns", "rslora-patterns"],
)
def test_deltas_equal_those_of_peft(
    tmp_path: Path, shapes: dict[str, torch.Size], model_class: type, config: dict[str, Any]
) -> None:
    model = trained(model_class(TINY_VISION), **config)
    model.save_pretrained(tmp_path / "sketch")
    adapter = read_adapter(tmp_path / "sketch", shapes)
    prefix = "vision_model." if model_class is CLIPVisionModel else ""
    expected = {prefix + name: delta for name, delta in peft_deltas(model).items()}
    assert list(adapter.layers) == sorted(expected)
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta(), expected[name], rtol=1e-6, atol=1e-8)
    assert (adapter.name, adapter.manifest, adapter.num_samples) == ("sketch", None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(upload: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
    (upload / MANIFEST_FILE).unlink()
    tensors = edit_tensors(upload, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    layer = read_adapter(upload, shapes).layers[Q]
    assert layer.A.dtype == layer.B.dtype == torch.float32
    assert layer.A.equal(tensors[Q_A].float())


def test_vision_layers_of_a_whole_clip_are_read(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    clip = CLIPModel(CLIPConfig(text_config=TEXT.to_dict(), vision_config=TINY_VISION.to_dict(), projection_dim=16))
    model = trained(clip, r=2, target_modules=r"vision_model.*q_proj")
    model.save_pretrained(tmp_path / "vision")
    assert Q in read_adapter(tmp_path / "vision", shapes).layers
    model = trained(clip, r=2, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(InputError, match="changes the text tower"):
        read_adapter(tmp_path / "both", shapes)


def test_fan_in_fan_out_says_nothing_about_linear_layers(
    tmp_path: Path, upload: Path, tower: CLIPVisionModelWithProjection, shapes: dict[str, torch.Size]
) -> None:
    before = read_adapter(upload, shapes)
    edit_json(upload / CONFIG_FILE, fan_in_fan_out=True)
    assert read_adapter(upload, shapes) == before
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = PeftModel.from_pretrained(deepcopy(tower), upload)
    torch.testing.assert_close(peft_deltas(model)[Q], before.layers[Q].delta())


# Layers that stay on disk


def test_layers_are_read_when_they_are_looked_at(upload: Path, shapes: dict[str, torch.Size]) -> None:
    layers = read_adapter(upload, shapes).layers
    assert (len(layers), list(layers)) == (2, sorted([Q, FC1]))
    assert Q in layers and "vision_model.post_layernorm" not in layers
    with pytest.raises(KeyError):
        layers["vision_model.post_layernorm"]
    first = layers[Q]
    first.A.zero_()
    assert layers[Q].A.any(), "nothing is kept of what was looked at"
    edit_tensors(upload, lambda tensors: tensors | {Q_A: 2 * tensors[Q_A]})
    torch.testing.assert_close(layers[Q].A, 2 * random_layers(shapes)[Q].A)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors | {Q_A: torch.ones(4, 32)}, r"has shape \(4, 32\), expected \(3, 32\)"),
        (lambda tensors: tensors | {Q_A: torch.full((3, 32), float("nan"))}, "lora_A has NaN or Inf"),
    ],
)
def test_a_layer_that_was_changed_is_checked_again(
    upload: Path, shapes: dict[str, torch.Size], edit: Any, message: str
) -> None:
    layers = read_adapter(upload, shapes).layers
    edit_tensors(upload, edit)
    with pytest.raises(InputError, match=message) as refused:
        layers[Q]
    assert str(upload / WEIGHTS_FILE) in str(refused.value)


def test_a_layer_whose_file_is_gone_is_refused_in_one_line(upload: Path, shapes: dict[str, torch.Size]) -> None:
    layers = read_adapter(upload, shapes).layers
    (upload / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError) as refused:
        layers[Q]
    assert str(upload / WEIGHTS_FILE) in str(refused.value) and str(refused.value).isprintable()


# Adapters of any model


BERT = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)


def test_an_adapter_of_any_model_has_peft_s_names_and_deltas(tmp_path: Path) -> None:
    config = dict(r=4, lora_alpha=6, target_modules=["query", "dense"], rank_pattern={"query": 2})
    model = trained(BertModel(BERT), **config)
    model.save_pretrained(tmp_path / "bert")
    adapter, expected = read_adapter(tmp_path / "bert"), peft_deltas(model)
    assert list(adapter.layers) == sorted(expected)
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta(), expected[name], rtol=1e-6, atol=1e-8)
        assert layer.shape == tuple(model.get_base_model().get_submodule(name).weight.shape)


def test_layers_that_store_their_weight_transposed_have_the_transposed_delta(tmp_path: Path) -> None:
    model = trained(GPT2Model(GPT2), r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "gpt2")
    adapter, expected = read_adapter(tmp_path / "gpt2"), peft_deltas(model)
    assert list(adapter.layers) == sorted(expected)
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta().T, expected[name], rtol=1e-6, atol=1e-8)
    assert adapter.peft["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("model_class", "model_config", "config"),
    [
        (BertModel, BERT, dict(target_modules=["query", "dense"], task_type="FEATURE_EXTRACTION")),
        (GPT2Model, GPT2, dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    ],
)
def test_what_peft_says_of_the_model_is_kept_when_it_is_written_again(
    tmp_path: Path, model_class: type, model_config: Any, config: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    base = model_class(model_config)
    model = trained(base, r=4, **config)
    model.save_pretrained(tmp_path / "first")
    adapter = read_adapter(tmp_path / "first")
    again = write_adapter(tmp_path / "again", adapter.layers, "tiny", peft=adapter.peft)
    assert read_adapter(again) == adapter
    assert read_adapter(again).peft == adapter.peft
    loaded, expected = peft_deltas(PeftModel.from_pretrained(deepcopy(base), again)), peft_deltas(model)
    assert loaded.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(loaded[name], delta, rtol=1e-6, atol=1e-8)


def test_convolutions_are_refused(tmp_path: Path) -> None:
    model = trained(CLIPVisionModel(TINY_VISION), r=2, target_modules=["patch_embedding"])
    model.save_pretrained(tmp_path / "conv")
    with pytest.raises(InputError, match="only linear layers can be merged"):
        read_adapter(tmp_path / "conv")


def test_bad_adapters_of_any_model_are_refused_all_the_same(upload: Path) -> None:
    (upload / MANIFEST_FILE).unlink()
    edit_tensors(upload, lambda tensors: tensors | {Q_A: torch.ones(4, 32)})
    with pytest.raises(InputError, match=r"has shape \(4, 32\), expected \(3, 32\)"):
        read_adapter(upload)


# What we write


def test_round_trip_is_bit_equal(upload: Path, tower: torch.nn.Module, shapes: dict[str, torch.Size]) -> None:
    layers = random_layers(shapes)
    adapter = read_adapter(upload, shapes, fingerprint(tower))
    assert list(adapter.layers) == sorted(layers)
    for name, layer in layers.items():
        assert adapter.layers[name].A.equal(layer.A)
        assert adapter.layers[name].B.equal(layer.B)
        assert adapter.layers[name].scale == layer.scale
    assert adapter.sha256 == sha256_of(layers)
    assert adapter.manifest == manifest_for(layers, tower)
    assert (adapter.name, adapter.num_samples) == ("art painting", 100)


def test_peft_loads_what_we_write(tmp_path: Path, tower: torch.nn.Module, shapes: dict[str, torch.Size]) -> None:
    layers = random_layers(shapes, tuple(shapes))
    folder = write_adapter(tmp_path / "adapter", layers, "tiny-clip")
    merged = deepcopy(tower)
    for name, layer in layers.items():
        merged.get_submodule(name).weight.data += layer.delta()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = merged(pixels).image_embeds
        got = PeftModel.from_pretrained(deepcopy(tower), folder)(pixels).image_embeds
        plain = tower(pixels).image_embeds
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().max() > 0.01


def test_peft_finds_the_base_by_itself(
    tmp_path: Path, tower: torch.nn.Module, shapes: dict[str, torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a base in a folder is called by its name alone
    tower.save_pretrained(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", random_layers(shapes), str(tmp_path / "base"))
    model = AutoPeftModel.from_pretrained(folder)
    assert isinstance(model.get_base_model(), CLIPVisionModelWithProjection)
    torch.testing.assert_close(peft_deltas(model)[Q], random_layers(shapes)[Q].delta())


def test_peft_refuses_to_load_on_a_model_without_the_layers(upload: Path) -> None:
    with pytest.raises(ValueError, match="Target modules"):
        PeftModel.from_pretrained(CLIPVisionModel(TINY_VISION), upload)


def test_equal_adapters_give_equal_bytes(tmp_path: Path, upload: Path, tower: Any, shapes: Any) -> None:
    layers = dict(reversed(random_layers(shapes).items()))
    again = write_adapter(tmp_path / "again", layers, "tiny-clip", manifest_for(layers, tower))
    assert contents(again) == contents(upload)


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path, upload: Path) -> None:
    script = (
        "import sys, torch\n"
        "from sap_lightning.io.adapter import read_adapter, write_adapter\n"
        f"shapes = {{{Q!r}: torch.Size([32, 32]), {FC1!r}: torch.Size([64, 32])}}\n"
        "adapter = read_adapter(sys.argv[1], shapes)\n"
        "write_adapter(sys.argv[2], adapter.layers, 'tiny-clip', adapter.manifest)\n"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    command = [sys.executable, "-c", script, str(upload), str(tmp_path / "again")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert contents(tmp_path / "again") == contents(upload)


@pytest.mark.parametrize("scale", [0.1 * 13, 0.9, 1.9, -2 / 3, 1e-30, 0.0])
def test_identity_survives_writing_for_any_scale(tmp_path: Path, shapes: dict[str, torch.Size], scale: float) -> None:
    layers = {name: layer._replace(scale=scale) for name, layer in random_layers(shapes, tuple(shapes)).items()}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", layers, "tiny-clip"), shapes)
    assert adapter.sha256 == sha256_of(layers)
    for layer in adapter.layers.values():
        assert layer.scale == pytest.approx(scale, rel=1e-15)


def test_identity_is_of_tensors_and_scales_not_of_files(upload: Path, shapes: dict[str, torch.Size]) -> None:
    before = read_adapter(upload, shapes)
    edit_tensors(upload, lambda tensors: {key.replace("vision_model.", ""): v for key, v in tensors.items()})
    alphas = {"layers.0.self_attn.q_proj": 16.0, "fc1": 16}
    edit_json(upload / CONFIG_FILE, r=4, rank_pattern={"q_proj": 3}, alpha_pattern=alphas, lora_alpha=1)
    assert read_adapter(upload, shapes) == before
    edit_json(upload / CONFIG_FILE, alpha_pattern=alphas | {"fc1": 17})
    (upload / MANIFEST_FILE).unlink()
    assert read_adapter(upload, shapes) != before


def test_fingerprint_is_of_names_shapes_and_float32_values(tower: CLIPVisionModelWithProjection) -> None:
    assert fingerprint(tower) == fingerprint(deepcopy(tower).double())
    changed = deepcopy(tower)
    changed.visual_projection.weight.data[0, 0] += 1e-3
    assert fingerprint(changed) != fingerprint(tower)
    assert fingerprint(torch.nn.Linear(2, 3, bias=False)) != fingerprint(torch.nn.Linear(3, 2, bias=False))


def test_layer_shapes_are_those_of_linear_weights(shapes: dict[str, torch.Size]) -> None:
    assert len(shapes) == 2 * 6 + 1
    assert shapes[FC1] == (64, 32)
    assert "vision_model.embeddings.patch_embedding" not in shapes


def test_views_of_one_stack_are_written(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    stack = torch.randn(8, 32)
    layers = {Q: LoRALayer(stack[:2], stack.T[:, 2:4]), FC1: LoRALayer(stack[:2], torch.ones(64, 2))}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", layers, "tiny-clip"), shapes)
    assert adapter.layers[Q].B.equal(stack[2:4].T)


def test_an_existing_folder_is_left_as_it_was(upload: Path, shapes: dict[str, torch.Size]) -> None:
    before = contents(upload)
    with pytest.raises(InputError, match="already exists"):
        write_adapter(upload, random_layers(shapes), "tiny-clip")
    assert contents(upload) == before


def test_bad_layers_are_not_written(tmp_path: Path, tower: torch.nn.Module, shapes: dict[str, torch.Size]) -> None:
    layers = random_layers(shapes)
    diverged = layers | {Q: layers[Q]._replace(A=layers[Q].A * float("nan"))}
    rankless = layers | {Q: LoRALayer(torch.zeros(0, 32), torch.zeros(32, 0))}
    foreign = replace(manifest_for(layers, tower), tensors_sha256="0" * 64)
    for message, bad, manifest in [
        ("no layers", {}, None),
        ("q_proj: lora_A has NaN", diverged, None),
        ("rank of .*q_proj is 0", rankless, None),
        ("tensors_sha256", layers, foreign),
    ]:
        with pytest.raises(InputError, match=message):
            write_adapter(tmp_path / "new", bad, "tiny-clip", manifest)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "new", random_layers(shapes), "tiny-clip")
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "new", random_layers(shapes), base=object())  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# What is refused


def edit_json(path: Path, **values: Any) -> None:
    """Other values, of a manifest with a digest that is theirs."""
    content = json.loads(path.read_text()) | values
    if DIGEST in content and DIGEST not in values:
        fields = {name: value for name, value in content.items() if name != DIGEST}
        content[DIGEST] = sha256(json_bytes(fields)).hexdigest()
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors = edit(load_file(folder / WEIGHTS_FILE))
    save_file(tensors, folder / WEIGHTS_FILE)
    return tensors


def assert_refused(folder: Path, shapes: dict[str, torch.Size], message: str, base: str | None = None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_adapter(folder, shapes, base)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert str(folder) in str(caught.value)


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def with_tensor(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {key: tensor}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: {}, "no tensors"),
        (without(Q_A), rf"{Q} has no lora_A"),
        (without(Q_B), rf"{Q} has no lora_B"),
        (with_tensor("step", torch.zeros(1)), "'step' is no LoRA factor"),
        (with_tensor("a\nb\x1b[31m", torch.zeros(1)), r"'a\\nb\\x1b\[31m' is no LoRA factor"),
        (with_tensor("x" * 5000, torch.zeros(1)), r"xxx\.\.\.xxx"),
        (with_tensor(Q_A.replace("lora_A", "lora_magnitude_vector"), torch.ones(32)), "is no LoRA factor"),
        (with_tensor(Q_A.replace("weight", "default.weight"), torch.ones(3, 32)), "the adapter's name 'default' in it"),
        (with_tensor(Q_B.replace("weight", "bias"), torch.ones(32)), "is no LoRA factor"),
        (with_tensor(Q_A.replace("layers.0", "layers.7"), torch.ones(3, 32)), "no such linear layer"),
        (with_tensor(Q_A.replace(Q, "vision_model.embeddings.patch_embedding"), torch.ones(3, 3, 8, 8)), "no such"),
        (with_tensor(Q_A.replace("vision", "text"), torch.ones(3, 32)), "changes the text tower"),
        (with_tensor(Q_A.replace("vision_model.", ""), torch.ones(3, 32)), "one and the same factor"),
        (with_tensor(Q_A, torch.ones(3, 31)), r"lora_A.weight has shape \(3, 31\), expected \(3, 32\)"),
        (with_tensor(Q_A, torch.ones(32, 3)), r"lora_A.weight has shape \(32, 3\), expected \(3, 32\)"),
        (with_tensor(Q_A, torch.ones(96)), r"has shape \(96,\), expected \(r, d_in\)"),
        (with_tensor(Q_B, torch.ones(32, 4)), r"lora_B.weight has shape \(32, 4\), expected \(32, 3\)"),
        (with_tensor(Q_A, torch.ones(3, 32, dtype=torch.float64)), "lora_A.weight has dtype F64"),
        (with_tensor(Q_A, torch.ones(3, 32, dtype=torch.int8)), "lora_A.weight has dtype I8"),
        (with_tensor(Q_A, torch.ones(3, 32).to(torch.float8_e4m3fn)), "lora_A.weight has dtype F8_E4M3"),
        (with_tensor(Q_A, torch.full((3, 32), float("nan"))), f"{Q}: lora_A has NaN or Inf"),
        (with_tensor(Q_B, torch.full((32, 3), float("-inf"))), f"{Q}: lora_B has NaN or Inf"),
        (with_tensor(Q_A, torch.full((3, 32), 3e38)), f"{Q}: ΔW overflows float32"),
        (with_tensor(Q_A, torch.ones(3, 32)), "tensors_sha256 is .* the tensors and scales give"),
    ],
)
def test_bad_tensors_are_refused(upload: Path, shapes: dict[str, torch.Size], edit: Any, message: str) -> None:
    edit_tensors(upload, edit)
    assert_refused(upload, shapes, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA', expected 'LORA'"),
        ("peft_type", None, "peft_type is None"),
        ("bias", "lora_only", "bias is 'lora_only', expected 'none'"),
        ("use_dora", True, "'use_dora' is True, but only plain LoRA"),
        ("lora_bias", True, "'lora_bias' is True"),
        ("use_qalora", True, "'use_qalora' is True"),
        ("modules_to_save", ["visual_projection"], "modules_to_save is .*--merge.drop_heads true"),
        ("layer_replication", [[0, 2]], "'layer_replication' is"),
        ("target_parameters", ["weight"], "'target_parameters' is"),
        ("trainable_token_indices", [1], "'trainable_token_indices' is"),
        ("alora_invocation_tokens", [1], "'alora_invocation_tokens' is"),
        ("arrow_config", {"top_k": 3}, "'arrow_config' is"),
        ("kasa_config", {"beta": 1}, "'kasa_config' is"),
        ("use_bdlora", {"nblocks": 2}, "'use_bdlora' is"),
        ("velora_config", {"scale": 1}, "'velora_config' is"),
        ("monteclora_config", {"x": 1}, "'monteclora_config' is"),
        ("megatron_config", {"x": 1}, "'megatron_config' is"),
        ("ensure_weight_tying", True, "'ensure_weight_tying' is"),
        ("from_the_future", True, "'from_the_future' is True"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', expected one that keeps the base"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4'"),
        ("init_lora_weights", "olora", "init_lora_weights is 'olora'"),
        ("init_lora_weights", "corda", "init_lora_weights is 'corda'"),
        ("init_lora_weights", "loftq", "init_lora_weights is 'loftq'"),
        ("init_lora_weights", "lora_ga", "init_lora_weights is 'lora_ga'"),
        ("init_lora_weights", ["gaussian"], "init_lora_weights is"),
        ("r", 0, "r is 0, expected an integer from 1"),
        ("r", -4, "r is -4"),
        ("r", 4.0, "r is 4.0"),
        ("r", True, "r is True"),
        ("r", "4", "r is '4'"),
        ("r", 10**6, "r is 1000000"),
        ("r", 5, "expected"),
        ("lora_alpha", float("nan"), "lora_alpha is nan, expected a finite number"),
        ("lora_alpha", float("inf"), "lora_alpha is inf"),
        ("lora_alpha", 10**400, "lora_alpha is 1000"),
        ("lora_alpha", "16", "lora_alpha is '16'"),
        ("lora_alpha", None, "lora_alpha is None"),
        ("lora_alpha", 17, "tensors_sha256"),
        ("use_rslora", True, "tensors_sha256"),
        ("use_rslora", 1, "use_rslora is 1, expected true or false"),
        ("rank_pattern", ["q_proj"], "rank_pattern is .* expected an object"),
        ("rank_pattern", {"q_proj": 0}, r"rank_pattern\['q_proj'\] is 0"),
        ("rank_pattern", {"q_proj": 9}, r"has shape \(3, 32\), expected \(9, 32\)"),
        ("alpha_pattern", {"q_proj": "8"}, r"alpha_pattern\['q_proj'\] is '8'"),
        ("alpha_pattern", {"q_proj": 8}, "tensors_sha256"),
        ("alpha_pattern", {"[": 8}, r"key of alpha_pattern is '\['"),
        ("alpha_pattern", {"**": 8}, r"key of alpha_pattern is '\*\*'"),
        ("alpha_pattern", {r"(\w+)*x": 8}, "key of alpha_pattern is .* no groups; write out the layers' names"),
        ("alpha_pattern", {".*.*.*.*.*x": 8}, "key of alpha_pattern"),
        ("alpha_pattern", {f".*{k}": 8 for k in range(65)}, "alpha_pattern has more than 64 patterns; write out"),
        ("alpha_pattern", {"x" * 1000: 8}, "key of alpha_pattern"),
        ("alpha_pattern", {f"layer{i}": 8 for i in range(14)}, "more rank or alpha patterns than"),
    ],
)
def test_bad_configs_are_refused(
    upload: Path, shapes: dict[str, torch.Size], name: str, value: Any, message: str
) -> None:
    edit_json(upload / CONFIG_FILE, **{name: value})
    assert_refused(upload, shapes, message)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "peft_type"])
def test_configs_without_the_essentials_are_refused(upload: Path, shapes: dict[str, torch.Size], name: str) -> None:
    config = json.loads((upload / CONFIG_FILE).read_text())
    del config[name]
    (upload / CONFIG_FILE).write_text(json.dumps(config))
    assert_refused(upload, shapes, f"{CONFIG_FILE}: {name} is")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("domain", "../../etc", "domain is '../../etc', expected at most 64 letters"),
        ("domain", "a/b", "domain is 'a/b'"),
        ("domain", ".hidden", "domain is"),
        ("domain", "..", "domain is"),
        ("domain", "", "domain is"),
        ("domain", "a\n", r"domain is 'a\\n'"),
        ("domain", "x" * 65, "domain is"),
        ("domain", ["photo"], "domain is"),
        ("base", 3, "base is 3, expected one line of text"),
        ("base", "\ud800", "base is"),
        ("base_fingerprint", "abc", "base_fingerprint is 'abc', expected a sha256 in hex"),
        ("class_names", "dog", "class_names is 'dog', expected a list of texts"),
        ("class_names", ["dog", 1], "class_names is"),
        ("class_names", ["\x1b[31mdog"], "class_names is"),
        ("num_samples", 0, "num_samples is 0, expected an integer from 1 to a"),
        ("num_samples", -5, "num_samples is -5"),
        ("num_samples", 1e9, "num_samples is"),
        ("num_samples", True, "num_samples is True"),
        ("num_samples", 10**30, "num_samples is"),
        ("rank", 0, "rank is 0"),
        ("alpha", float("nan"), "alpha is nan"),
        ("targets", None, "targets is None"),
        ("seed", -1, "seed is -1"),
        ("packages", ["torch"], "packages is"),
        ("packages", {"torch": 2}, "packages is"),
        ("tensors_sha256", "0" * 64, "tensors_sha256 is 0000"),
        ("tensors_sha256", None, "tensors_sha256 is None"),
        ("reach", {"grey": [0.5] * 5}, "reach is .* expected 5 numbers in .0, 1. for each of plain, grey"),
        ("reach", dict.fromkeys(MEASURED, [0.5] * 4), "reach is"),
        ("reach", dict.fromkeys(MEASURED, [0.5] * 4 + [1.5]), "reach is"),
        ("reach", dict.fromkeys(MEASURED, [0.5] * 4 + [True]), "reach is"),
        ("reach", dict.fromkeys(MEASURED, "01234"), "reach is"),
        ("reach", [0.5] * 5, "reach is"),
        ("format_version", 2, "kind is missing"),
        ("format_version", 3, "format_version is 3, expected 1 or 2"),
        ("format_version", True, "format_version is True"),
        ("pickle", "yes", "unknown field 'pickle'"),
        ("round", 1, "unknown field 'round'"),
    ],
)
def test_bad_manifests_are_refused(
    upload: Path, shapes: dict[str, torch.Size], name: str, value: Any, message: str
) -> None:
    edit_json(upload / MANIFEST_FILE, **{name: value})
    assert_refused(upload, shapes, f"{MANIFEST_FILE}: {message}")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (MANIFEST_FILE, {"rank": 5}, "no layer is of rank 5 and alpha"),
        (MANIFEST_FILE, {"alpha": 1e30}, "no layer is of rank"),
        (
            MANIFEST_FILE,
            {"targets": ["q_proj", "fc1", "v_proj"]},
            "targets name 'v_proj', of which there are no weights",
        ),
        (MANIFEST_FILE, {"targets": ["q_proj"]}, "do not name .*fc1"),
        (MANIFEST_FILE, {"num_samples": 2**63 - 1}, "num_samples is"),
        (MANIFEST_FILE, {"num_samples": 11, DIGEST: "0" * 64}, "fields_sha256 is not that of the other fields"),
        (CONFIG_FILE, {"target_modules": ["q_proj"]}, "target_modules do not name .*fc1, of which there are weights"),
        (CONFIG_FILE, {"exclude_modules": ["fc1"]}, "exclude_modules leaves out .*fc1, of which there are weights"),
        (CONFIG_FILE, {"layers_to_transform": [7]}, "layers_to_transform leaves out .*, of which there are weights"),
        (CONFIG_FILE, {"layers_to_transform": 7}, "layers_to_transform leaves out .*, of which there are weights"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    upload: Path, shapes: dict[str, torch.Size], file: str, values: dict[str, Any], message: str
) -> None:
    edit_json(upload / file, **values)
    assert_refused(upload, shapes, message)


def test_a_config_that_names_more_than_there_is_raises_a_doubt(upload: Path, shapes: dict[str, torch.Size]) -> None:
    (upload / MANIFEST_FILE).unlink()
    edit_json(upload / CONFIG_FILE, target_modules=["q_proj", "fc1", "query"])
    assert read_adapter(upload, shapes).doubts == ["its config names 'query', of which it has no layer"]


def test_patterns_that_take_too_long_are_refused(upload: Path, shapes: dict[str, torch.Size]) -> None:
    (upload / MANIFEST_FILE).unlink()
    edit_json(upload / CONFIG_FILE, alpha_pattern={".*q.*" + "x" * place: 8 for place in range(2)})
    assert read_adapter(upload, shapes).name == "upload"
    layers = {f"{'b' * 60}.{place}.q_proj": LoRALayer(torch.ones(1, 2), torch.ones(2, 1), 1.0) for place in range(3000)}
    folder = write_adapter(upload.parent / "many", layers, "base")
    edit_json(folder / CONFIG_FILE, alpha_pattern={"b*b*" + "x" * place: 8 for place in range(50)})
    started = time.process_time()
    with pytest.raises(InputError, match="take too long to match for 3000 layers"):
        read_adapter(folder)
    assert time.process_time() - started < 5


def test_a_base_in_a_folder_is_called_by_the_folder_s_name_alone(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    for base, told in ((str(tmp_path), tmp_path.name), ("org/model", "org/model"), ("../secret/model", "model")):
        folder = write_adapter(tmp_path / told.replace("/", "-"), random_layers(shapes), base)
        assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == told
        assert read_adapter(folder, shapes).base == told


def test_a_manifest_need_not_say_how_far_the_adapter_reaches(upload: Path, shapes: dict[str, torch.Size]) -> None:
    manifest = json.loads((upload / MANIFEST_FILE).read_text())
    del manifest["reach"], manifest[DIGEST]  # as before there were either
    (upload / MANIFEST_FILE).write_text(json.dumps(manifest))
    adapter = read_adapter(upload, shapes)
    assert adapter.manifest is not None and adapter.manifest.reach == {}


def test_what_a_manifest_says_of_the_reach_comes_back(tmp_path, upload, shapes) -> None:
    adapter = read_adapter(upload, shapes)
    assert adapter.manifest is not None
    said = replace(adapter.manifest, reach={style: (0.0, 0.25, 0.5, 1, 0.5) for style in MEASURED})
    assert read_adapter(write_adapter(tmp_path / "again", adapter.layers, "tiny-clip", said), shapes).manifest == said


SECOND = {"kind": "lora", "parts": ("lora_A", "lora_B"), "round": 3, "task": "vqa", "layers": (Q, FC1)}


def test_a_manifest_of_format_2_says_what_was_sent_and_in_which_round(tmp_path, upload, shapes) -> None:
    adapter = read_adapter(upload, shapes)
    assert adapter.manifest is not None and adapter.manifest.round == 0
    said = replace(adapter.manifest, format_version=2, **SECOND)
    folder = write_adapter(tmp_path / "second", adapter.layers, "tiny-clip", said)
    assert read_adapter(folder, shapes).manifest == said
    written = json.loads((folder / MANIFEST_FILE).read_text())
    first = json.loads((upload / MANIFEST_FILE).read_text())
    assert written.keys() - first.keys() == SECOND.keys() and not first.keys() - written.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, value in SECOND.items() if name not in ("kind", "parts")]
)
def test_a_manifest_of_format_1_cannot_say_what_format_2_does(upload, shapes, name: str, value: Any) -> None:
    manifest = read_adapter(upload, shapes).manifest
    with pytest.raises(InputError, match=f"^{name} is .*, which a manifest of format 1 cannot say"):
        replace(manifest, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "prompt", "kind is 'prompt', expected 'lora'"),
        ("kind", "adapter", "kind is 'adapter', expected one of lora, prompt"),
        ("kind", ["lora"], "kind is .*, expected one of lora, prompt"),
        ("parts", "lora_A", "parts is 'lora_A', expected a list of texts"),
        ("round", -1, "round is -1, expected an integer from 0"),
        ("round", True, "round is True"),
        ("task", None, "task is None"),
        ("layers", [Q], "layers are not those of which there are weights"),
        ("layers", [Q, FC1, Q], "layers are not those"),
    ],
)
def test_a_faulty_field_of_format_2_is_refused(tmp_path, upload, shapes, name: str, value: Any, message: str) -> None:
    adapter = read_adapter(upload, shapes)
    assert adapter.manifest is not None
    said = replace(adapter.manifest, format_version=2, **SECOND)
    folder = write_adapter(tmp_path / "second", adapter.layers, "tiny-clip", said)
    edit_json(folder / MANIFEST_FILE, **{name: value})
    assert_refused(folder, shapes, f"{MANIFEST_FILE}: {message}")


def test_targets_may_name_layers_that_stay_at_home_where_the_sent_ones_are_named(tmp_path, upload, shapes) -> None:
    adapter = read_adapter(upload, shapes)
    assert adapter.manifest is not None
    targets = (*adapter.manifest.targets, "v_proj")
    said = replace(adapter.manifest, format_version=2, layers=tuple(adapter.layers), targets=targets)
    assert read_adapter(write_adapter(tmp_path / "some", adapter.layers, "tiny-clip", said), shapes).manifest == said
    whole = write_adapter(tmp_path / "whole", adapter.layers, "tiny-clip", replace(said, layers=()))
    assert_refused(whole, shapes, "targets name 'v_proj', of which there are no weights")


def test_manifests_with_a_field_missing_are_refused(upload: Path, shapes: dict[str, torch.Size]) -> None:
    manifest = json.loads((upload / MANIFEST_FILE).read_text())
    del manifest["num_samples"]
    (upload / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert_refused(upload, shapes, "num_samples is missing")


def test_an_adapter_of_another_base_is_refused(
    upload: Path, tower: CLIPVisionModelWithProjection, shapes: dict[str, torch.Size]
) -> None:
    other = fingerprint(CLIPVisionModelWithProjection(TINY_VISION))
    message = f"base_fingerprint is {fingerprint(tower)}, this base's is {other}.*'tiny-clip'"
    assert_refused(upload, shapes, message, other)


@pytest.mark.parametrize("name", [CONFIG_FILE, MANIFEST_FILE])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\x80\x04}.", "not valid JSON"),
        (b'{"r": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[" * 500_000, "not valid JSON"),
        (b'{"a":' * 150_000, "not valid JSON"),
        (b"[1]", "the file is .* expected an object"),
        (b"null", "the file is None"),
        (b" " * (2**20 + 1) + b"{}", "larger than 1048576 bytes"),
    ],
    ids=["empty", "cut", "utf-16", "pickle", "digits", "nested-lists", "nested-objects", "list", "null", "large"],
)
def test_bad_json_is_refused(
    upload: Path, shapes: dict[str, torch.Size], name: str, content: bytes, message: str
) -> None:
    (upload / name).write_bytes(content)
    assert_refused(upload, shapes, f"{name}: {message}")


class Detonator:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_pickles_are_refused_unread(upload: Path, tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    (upload / WEIGHTS_FILE).unlink()
    bomb = Detonator(tmp_path / "detonated")
    torch.save({Q_A: bomb}, upload / "adapter_model.bin")
    assert_refused(upload, shapes, "adapter_model.bin is a pickle")
    shutil.copy(upload / "adapter_model.bin", upload / WEIGHTS_FILE)
    assert zipfile.is_zipfile(upload / WEIGHTS_FILE)
    assert_refused(upload, shapes, "not safetensors")
    (upload / WEIGHTS_FILE).write_bytes(pickle.dumps(bomb))
    assert_refused(upload, shapes, "not safetensors")
    assert not bomb.path.exists()
    pickle.loads((upload / WEIGHTS_FILE).read_bytes())
    assert bomb.path.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"x" * 4096])
def test_other_bytes_named_safetensors_are_refused(upload: Path, shapes: dict[str, torch.Size], content: bytes) -> None:
    (upload / WEIGHTS_FILE).write_bytes(content)
    assert_refused(upload, shapes, "not safetensors")


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_truncated_safetensors_are_refused(upload: Path, shapes: dict[str, torch.Size], kept: float) -> None:
    content = (upload / WEIGHTS_FILE).read_bytes()
    (upload / WEIGHTS_FILE).write_bytes(content[: int(kept * len(content))])
    assert_refused(upload, shapes, "not safetensors")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_files_are_refused(upload: Path, shapes: dict[str, torch.Size], name: str) -> None:
    (upload / name).unlink()
    assert_refused(upload, shapes, f"{name}: no such file")


def test_an_adapter_in_a_folder_below_is_pointed_at(upload: Path, shapes: dict[str, torch.Size]) -> None:
    (upload / "sketch").mkdir()
    (upload / CONFIG_FILE).rename(upload / "sketch" / CONFIG_FILE)
    assert_refused(upload, shapes, f"{CONFIG_FILE}: no such file; there is one in 'sketch' below it")


def test_missing_folders_are_refused(upload: Path, shapes: dict[str, torch.Size]) -> None:
    assert_refused(upload / "nowhere", shapes, "no such folder")
    assert_refused(upload / CONFIG_FILE, shapes, "no such folder")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE])
def test_path_tricks_are_refused(upload: Path, tmp_path: Path, shapes: dict[str, torch.Size], name: str) -> None:
    path = upload / name
    path.rename(tmp_path / "secret")
    path.symlink_to("../secret")
    assert_refused(upload, shapes, f"{name}: leads outside the folder")
    path.unlink()
    path.symlink_to("/nowhere")
    assert_refused(upload, shapes, f"{name}: leads outside the folder")
    path.unlink()
    path.symlink_to(name)
    assert_refused(upload, shapes, f"{name}: not a regular file")
    path.unlink()
    os.mkfifo(path)
    assert_refused(upload, shapes, f"{name}: not a regular file")
    path.unlink()
    path.mkdir()
    assert_refused(upload, shapes, f"{name}: not a regular file")


def test_a_snapshot_of_the_hub_s_cache_is_an_upload(
    upload: Path, tmp_path: Path, shapes: dict[str, torch.Size]
) -> None:
    repository = tmp_path / "models--org--adapter"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    upload.rename(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert read_adapter(snapshot, shapes).name == "art painting"
    (repository / "refs").mkdir()
    (snapshot / CONFIG_FILE).rename(repository / "refs" / "main")
    (snapshot / CONFIG_FILE).symlink_to("../../refs/main")
    (repository / "refs" / "main").unlink()
    (repository / "refs" / "main").write_text("{}")
    assert_refused(snapshot, shapes, "leads outside the folder")


def test_links_within_the_folder_are_followed(upload: Path, shapes: dict[str, torch.Size]) -> None:
    (upload / WEIGHTS_FILE).rename(upload / "weights")
    (upload / WEIGHTS_FILE).symlink_to("weights")
    assert read_adapter(upload, shapes).name == "art painting"
