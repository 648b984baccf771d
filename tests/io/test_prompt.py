"""Uploads of prompts: what is written comes back, and what is faulty is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import randn
from safetensors.torch import load, save

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter, read_adapter, sha256_of
from sap_lightning.io.context import as_layer, context_layer
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.prompt import Room, prompt_files, read_prompt, write_prompt
from sap_lightning.io.upload_files import MANIFEST_FILE, PROMPT_FILE

BASE = "ab" * 32
ROOM = Room(width=6, longest=4)
CONTEXT = randn(0, 3, 6)
LAYER = context_layer("end")
LAYERS = {LAYER: as_layer(CONTEXT)}
MANIFEST = Manifest(
    base="base",
    base_fingerprint=BASE,
    domain="photo",
    class_names=("cat", "dog"),
    num_samples=10,
    rank=3,
    alpha=3,
    targets=(LAYER,),
    seed=0,
    packages={},
    tensors_sha256=sha256_of(LAYERS),
    format_version=2,
    kind="prompt",
    parts=("context",),
    layers=(LAYER,),
)
Files = dict[str, bytes]


@pytest.fixture
def files() -> Files:
    return prompt_files(LAYERS, MANIFEST)


def read(files: Files, folder: Path) -> Adapter:
    """The prompt in these files; what is refused is named by its folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        return read_prompt(folder, ROOM, BASE)
    except InputError as error:
        assert str(error).startswith(str(folder))
        raise


def test_a_prompt_comes_back_to_the_bit(files, tmp_path):
    prompt = read(files, tmp_path / "folder")
    assert (prompt.name, prompt.kind, prompt.manifest, prompt.num_samples) == ("photo", "prompt", MANIFEST, 10)
    assert list(prompt.layers) == [LAYER] and torch.equal(prompt.layers[LAYER].delta(), CONTEXT)
    folder = write_prompt(tmp_path / "written", LAYERS, MANIFEST)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    with pytest.raises(InputError, match="already exists"):
        write_prompt(folder, LAYERS, MANIFEST)


def test_an_upload_holds_the_context_and_its_manifest_and_no_more(files):
    assert files.keys() == {PROMPT_FILE, MANIFEST_FILE}
    tensors = load(files[PROMPT_FILE])
    assert list(tensors) == [LAYER] and tensors[LAYER].nbytes == 3 * 6 * 4
    assert len(files[PROMPT_FILE]) < 3 * 6 * 4 + 200, "the header is all that stands beside it"


def test_without_a_manifest_the_folder_names_the_prompt(files, tmp_path):
    del files[MANIFEST_FILE]
    assert read(files, tmp_path / "folder").name == "folder"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_in_half_precision_is_read_in_float32(tmp_path, dtype):
    prompt = read({PROMPT_FILE: save({LAYER: CONTEXT.to(dtype)})}, tmp_path / "folder")
    assert torch.equal(prompt.layers[LAYER].delta(), CONTEXT.to(dtype).float())


def tensors(**by_position: torch.Tensor) -> Callable[[Files], Files]:
    """A weights file that holds these contexts."""
    return lambda files: {PROMPT_FILE: save({context_layer(at): tensor for at, tensor in by_position.items()})}


def said(**fields: Any) -> Callable[[Files], Files]:
    """A manifest, sealed anew, that says something else."""
    manifest = replace(MANIFEST, **fields)
    return lambda files: files | {MANIFEST_FILE: prompt_files(LAYERS, manifest)[MANIFEST_FILE]}


def lied(**fields: Any) -> Callable[[Files], Files]:
    """The same for what no manifest of ours would say."""

    def changed(files: Files) -> Files:
        content = json.loads(files[MANIFEST_FILE]) | fields
        del content["fields_sha256"]
        return files | {MANIFEST_FILE: json.dumps(content).encode()}

    return changed


FAULTY = {
    "a second tensor": (lambda files: {PROMPT_FILE: save({LAYER: CONTEXT, "memory": CONTEXT + 1})},
                        "'memory' is no context of class prompts; send that alone"),
    "PromptFL's buffers": (lambda files: {PROMPT_FILE: save({LAYER: CONTEXT, "learner.token_prefix": CONTEXT + 1})},
                           "'learner.token_prefix' is no context"),
    "two contexts": (tensors(end=CONTEXT, front=CONTEXT + 1), "holds 2 contexts, expected one"),
    "no tensor": (tensors(), "holds 0 contexts, expected one"),
    "one for each class": (tensors(end=randn(0, 2, 3, 6)), r"shape \(2, 3, 6\), a context for each class; those say"),
    "a vector": (tensors(end=CONTEXT[0]), r"shape \(6,\), expected \(tokens, 6\)"),
    "another width": (tensors(end=randn(0, 3, 7)), r"shape \(3, 7\), expected \(tokens, 6\)"),
    "no tokens": (tensors(end=torch.zeros(0, 6)), r"shape \(0, 6\), expected \(tokens, 6\)"),
    "no room for a name": (tensors(end=randn(0, 5, 6)), "has 5 tokens, beside which .* up to 4; train a shorter one"),
    "integers": (tensors(end=torch.zeros(3, 6, dtype=torch.int64)), "has dtype I64, expected one of F32"),
    "doubles": (tensors(end=CONTEXT.double()), "has dtype F64"),
    "NaN": (tensors(end=CONTEXT.clone().fill_(torch.nan)), "has NaN or Inf"),
    "too large": (tensors(end=torch.full((3, 6), 3e38)), "overflows float32"),
    "a pickle": (lambda files: {PROMPT_FILE: b"\x80\x04]\x94."}, "not safetensors"),
    "another context": (lambda files: files | tensors(end=CONTEXT + 1)(files), "tensors_sha256 is"),
    "the name elsewhere": (lambda files: files | tensors(front=CONTEXT)(files), "tensors_sha256 is"),
    "another base": (said(base_fingerprint="cd" * 32), "base_fingerprint is cdcd"),
    "another length said": (said(rank=2, alpha=2), "no layer is of rank 2"),
    "other layers said": (said(layers=("x",)), "layers are not those of which there are weights"),
    "other targets said": (said(targets=("q_proj",)), "target_modules do not name text_model"),
    "an adapter said": (said(kind="lora"), "kind is 'lora', expected 'prompt'; upload the prompt again"),
    "factors said": (said(parts=("lora_A", "lora_B")), r"parts is \('lora_A', 'lora_B'\), expected \('context',\)"),
    "class names that are none": (lied(class_names="cat"), "class_names is 'cat', expected a list of texts"),
    "a domain that leads elsewhere": (lied(domain="../photo"), "domain is"),
    "no samples": (lied(num_samples=0), "num_samples is 0"),
    "a field too many": (lied(memory=[1]), "unknown field 'memory'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_prompt_is_refused(files, tmp_path, fault):
    change, reason = FAULTY[fault]
    with pytest.raises(InputError, match=reason):
        read(change(files), tmp_path / "folder")


def test_any_flipped_bit_is_refused_or_the_prompt_is_the_same(files, tmp_path):
    original = read(files, tmp_path / "folder")
    for name, content in files.items():
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            try:
                prompt = read(files | {name: bytes(changed)}, tmp_path / "folder")
            except InputError as error:
                assert str(error).isprintable() and len(str(error)) < 1000
            else:
                assert prompt == original, (name, place)


def test_a_missing_file_and_a_link_out_of_the_folder_are_refused(files, tmp_path):
    write_prompt(tmp_path / "a", LAYERS)
    with pytest.raises(InputError, match=r"prompt\.safetensors: no such file; there is one in 'a' below it"):
        read_prompt(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"prompt\.safetensors: no such file; it holds no prompt"):
        read_prompt(tmp_path / "empty")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / PROMPT_FILE).symlink_to(tmp_path / "a" / PROMPT_FILE)
    with pytest.raises(InputError, match="leads outside the folder"):
        read_prompt(tmp_path / "b")


def test_a_context_that_is_not_finite_or_not_the_manifest_s_is_not_written(tmp_path):
    for layers, reason in (
        ({LAYER: as_layer(CONTEXT / 0)}, "has NaN or Inf"),
        ({LAYER: as_layer(CONTEXT + 1)}, "tensors_sha256 is for another context"),
    ):
        with pytest.raises(InputError, match=reason):
            write_prompt(tmp_path / "folder", layers, MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_the_reader_of_adapters_takes_no_prompt(tmp_path):
    folder = write_prompt(tmp_path / "prompt", LAYERS, MANIFEST)
    with pytest.raises(InputError, match="kind is 'prompt', expected 'lora'"):
        read_adapter(folder)
