"""What bases of any kind say of themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from places import SHAPES_CLIP
from torch import nn
from transformers import BertConfig, BertModel, CLIPModel, GPT2Config, GPT2LMHeadModel

from sap_lightning.errors import InputError
from sap_lightning.models.base import linear_shapes, load_whole, model_type
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes


def saved(folder: Path, model: nn.Module) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_the_linear_layers_of_any_checkpoint_are_known_from_its_config_alone(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12))
    base = saved(tmp_path, bert)
    (tmp_path / "model.safetensors").unlink()
    expected = {name: tuple(part.weight.shape) for name, part in bert.named_modules() if isinstance(part, nn.Linear)}
    assert linear_shapes(base) == expected
    assert expected["encoder.layer.0.intermediate.dense"] == (12, 8)
    assert model_type(base) == "bert"


def test_a_layer_that_stores_its_weight_turned_has_the_shape_of_its_update(tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=5, n_positions=4))
    shapes = linear_shapes(saved(tmp_path, gpt2))
    assert shapes["h.0.attn.c_attn"] == (24, 8) and gpt2.transformer.h[0].attn.c_attn.weight.shape == (8, 24)
    assert model_type(str(tmp_path)) == "gpt2"


def test_the_shipped_base_is_a_clip_model_whose_tower_s_layers_are_found_both_ways() -> None:
    assert model_type(SHAPES_CLIP) == "clip"
    shapes, whole = layer_shapes(load_base(SHAPES_CLIP).tower), linear_shapes(SHAPES_CLIP)
    assert shapes.items() <= whole.items()


def test_a_model_that_transformers_has_no_base_model_of_has_no_known_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "encoder-decoder-of-another-kind"}))
    with pytest.raises(InputError, match=rf"model\.base '{tmp_path}': no checkpoint could be loaded"):
        model_type(str(tmp_path))
    assert linear_shapes(str(tmp_path)) == {}


def test_a_base_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"model\.base '/nowhere': no checkpoint could be loaded"):
        model_type("/nowhere")


def test_code_that_a_checkpoint_brings_is_neither_run_nor_asked_about(tmp_path: Path, capfd) -> None:
    config = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(InputError, match=r"no checkpoint could be loaded: .*custom code"):
        model_type(str(tmp_path))
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_a_config_of_fewer_blocks_than_there_are_weights_of_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"of a deeper CLIP checkpoint .* vision_model\.encoder\.layers\.1\."):
        load_whole(CLIPModel, base, "model.base", "CLIP checkpoint")
