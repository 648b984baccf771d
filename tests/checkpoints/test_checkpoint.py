"""Models on disk: which files are one, and what is said of those that contradict each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from llamas import weights_in
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sap_lightning.checkpoints.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint
from sap_lightning.errors import InputError


@pytest.fixture
def model(trio: list[str], tmp_path: Path) -> Path:
    """A model of its own in shards."""
    return Path(shutil.copytree(trio[0], tmp_path / "model"))


def test_one_file_goes_before_shards_as_for_transformers(model, trio) -> None:
    save_file(weights_in(Path(trio[1])), model / WEIGHTS_FILE, {"format": "pt"})
    checkpoint, loaded = Checkpoint(str(model)), AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert list(checkpoint.shards) == [WEIGHTS_FILE] and INDEX_FILE not in checkpoint.beside()
    for key in checkpoint.stated:
        height = loaded[key].shape[0] if loaded[key].ndim > 1 else 1
        assert torch.equal(checkpoint.rows(key, 0, height).view(loaded[key].shape), loaded[key])


def test_an_index_that_contradicts_its_shards_is_refused_with_key_and_shard(model) -> None:
    index = json.loads((model / INDEX_FILE).read_text())
    places = index["weight_map"]
    norm = "model.norm.weight"
    first, last = min(places.values()), places[norm]
    unlike = {
        f"has '{norm}' in {first}, and it is in {last}": places | {norm: first},
        f"has 'ghost' in {first}, and {first} has no such tensor": places | {"ghost": first},
        f"has no '{norm}', and it is in {last}": {k: v for k, v in places.items() if k != norm},
        f"does not name {first}, which stands beside": {k: v for k, v in places.items() if v != first},
    }
    assert first != last
    for message, placed in unlike.items():
        (model / INDEX_FILE).write_text(json.dumps(index | {"weight_map": placed}))
        with pytest.raises(InputError, match=rf"model/{INDEX_FILE}: {message}.*; save the model again"):
            Checkpoint(str(model))
    (model / INDEX_FILE).write_text(json.dumps(index))
    tensors = load_file(model / last)
    save_file({key: tensor for key, tensor in tensors.items() if key != norm} | {"x": torch.ones(1)}, model / last)
    with pytest.raises(InputError, match=f"{INDEX_FILE}: has '{norm}' in {last}, and {last} has no such tensor"):
        Checkpoint(str(model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "merges.txt", "preprocessor_config.json"])
def test_the_fingerprint_changes_with_what_a_model_is_loaded_by(name, model) -> None:
    before = Checkpoint(str(model)).fingerprint
    assert Checkpoint(str(model)).fingerprint == before
    (model / name).write_text('{"vocab_size": 1}')
    assert Checkpoint(str(model)).fingerprint != before


def test_records_of_our_commands_are_not_taken_along(model) -> None:
    names = {*Checkpoint(str(model)).beside()}
    for name in ("merge.json", "compress.json", "plan.json"):
        (model / name).write_text("{}")
    assert {*Checkpoint(str(model)).beside()} == names
