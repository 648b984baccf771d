"""Uploads from folders, the hub and checkpoints, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SHAPES_CLIP

from sap_lightning.errors import InputError
from sap_lightning.fingerprints import fingerprint
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import sha256_of, write_adapter
from sap_lightning.io.uploads import read_uploads
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes

DOMAINS = ["cartoon", "painting", "photo", "sketch"]


class Touch:
    """What a hostile pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    return layer_shapes(load_base(SHAPES_CLIP).tower)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(finished) -> dict[str, Any]:
    return torch.load(finished / "clients" / "photo" / "last.ckpt", weights_only=True)


def random_upload(folder: Path, seed: int = 0, shape: tuple[int, int] = (8, 6)) -> Path:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator)
    return write_adapter(folder, {"block.fc": LoRALayer(A, B, 0.5)}, "some/base")


def saved(checkpoint: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


def assert_refused(uploads: Sequence[str | Path], reason: str, *given: Any) -> None:
    with pytest.raises(InputError, match=reason) as error:
        read_uploads(uploads, *given)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_its_client_s_upload(finished, shapes):
    base_fingerprint = fingerprint(load_base(SHAPES_CLIP).tower)
    for domain in DOMAINS:
        folder, checkpoint = finished / "uploads" / domain, finished / "clients" / domain / "last.ckpt"
        [upload] = read_uploads([folder], shapes, base_fingerprint)
        [same] = read_uploads([checkpoint], shapes, base_fingerprint)
        assert same.sha256 == upload.sha256 == sha256_of(dict(upload.layers))
        assert same.name == upload.name == domain
        assert list(same.layers) == list(upload.layers)
        for name, layer in upload.layers.items():
            assert torch.equal(same.layers[name].A, layer.A) and torch.equal(same.layers[name].B, layer.B)
            assert same.layers[name].scale == layer.scale


def test_a_checkpoint_of_what_is_also_given_as_a_folder_is_the_same_upload(finished, shapes):
    both = [finished / "uploads" / "photo", finished / "clients" / "photo" / "last.ckpt"]
    assert_refused(both, r"last\.ckpt: the same adapter as .*uploads/photo; give each upload once", shapes)


def test_a_plain_peft_folder_is_an_upload_named_after_itself(tmp_path):
    [adapter] = read_uploads([random_upload(tmp_path / "my client")])
    assert adapter.name == "my client" and adapter.manifest is None and list(adapter.layers) == ["block.fc"]


def test_adapters_come_in_the_order_of_the_uploads(tmp_path):
    folders = [random_upload(tmp_path / str(seed), seed) for seed in range(4)]
    assert [adapter.name for adapter in read_uploads(folders)] == ["0", "1", "2", "3"]
    assert [adapter.name for adapter in read_uploads(folders[::-1])] == ["3", "2", "1", "0"]


def test_the_same_upload_under_two_names_is_refused_naming_both(tmp_path):
    first = random_upload(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    assert_refused([first, tmp_path / "second"], r"second: the same adapter as .*first; give each upload once")


def test_uploads_for_layers_of_different_shapes_are_refused_naming_both(tmp_path):
    uploads = [random_upload(tmp_path / "small"), random_upload(tmp_path / "large", shape=(16, 6))]
    reason = r"upload 'large': block\.fc is for a weight of shape \(16, 6\), in 'small' it is \(8, 6\)"
    assert_refused(uploads, reason)


# Checkpoints


def test_a_garbled_checkpoint_is_refused(tmp_path, finished, shapes):
    whole = (finished / "clients" / "photo" / "last.ckpt").read_bytes()
    for name, content in {"empty": b"", "garbage": b"not a checkpoint", "cut": whole[:-2000]}.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        assert_refused([tmp_path / f"{name}.ckpt"], rf"{name}\.ckpt: no checkpoint of a client", shapes)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, checkpoint, shapes):
    ran = tmp_path / "ran"
    saved({**checkpoint, "callbacks": Touch(ran)}, tmp_path / "torch.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Touch(ran), protocol=2))
    for name in ("torch", "plain"):
        assert_refused([tmp_path / f"{name}.ckpt"], rf"{name}\.ckpt: no checkpoint of a client", shapes)
    assert not ran.exists()
    torch.load(tmp_path / "torch.ckpt", weights_only=False)
    assert ran.exists(), "the code does run where it is let"


def test_a_checkpoint_of_something_else_is_refused(tmp_path, checkpoint, shapes):
    for name, content in {
        "list": [1, 2],
        "tensors": {"weight": torch.ones(2)},
        "no_rank": {**checkpoint, "hyper_parameters": {"alpha": 16}},
    }.items():
        file = saved(content, tmp_path / f"{name}.ckpt")
        assert_refused([file], rf"{name}\.ckpt: no checkpoint of a client", shapes)
    for name, settings, reason in [
        ("rank_0", {"alpha": 16, "rank": 0}, "r is 0, expected an integer from 1 to 4096"),
        ("huge", {"alpha": 16, "rank": 5000}, "r is 5000, expected an integer from 1 to 4096"),
        ("word", {"alpha": "16", "rank": 8}, "lora_alpha is '16', expected a finite number"),
    ]:
        file = saved({**checkpoint, "hyper_parameters": settings}, tmp_path / f"{name}.ckpt")
        assert_refused([file], rf"{name}\.ckpt: {reason}", shapes)
    file = saved({**checkpoint, "state_dict": {"head.weight": torch.ones(2, 2)}}, tmp_path / "head.ckpt")
    assert_refused([file], r"head\.ckpt: holds no LoRA factors", shapes)


def test_a_checkpoint_with_faulty_factors_is_refused(tmp_path, checkpoint, shapes):
    key = next(key for key in checkpoint["state_dict"] if ".lora_A." in key)
    layer = key.removeprefix("tower.base_model.model.").removesuffix(".lora_A.default.weight")

    def with_factor(name: str, factor: Any) -> Path:
        factors = {k: v for k, v in checkpoint["state_dict"].items() if k != key}
        return saved({**checkpoint, "state_dict": factors | ({} if factor is None else {key: factor})}, tmp_path / name)

    A = checkpoint["state_dict"][key]
    for name, factor, reason in [
        ("nan", A * torch.nan, f"{layer}: lora_A has NaN or Inf"),
        ("large", torch.full_like(A, 3e38), f"{layer}: ΔW overflows float32"),
        ("wide", torch.cat([A, A], dim=1), rf".*{layer}.* has shape \(8, 192\), expected \(8, 96\)"),
        ("alone", None, f"{layer} has no lora_A"),
        ("flat", A.flatten(), rf".*{layer}.* has shape \(768,\), expected \(r, d_in\)"),
        ("deep", A[..., None], rf".*{layer}.* has shape \(8, 96, 1\), expected \(r, d_in\)"),
        ("ranks", torch.cat([A, A]), rf".*{layer}.* has shape \(16, 96\), expected \(8, 96\)"),
        ("whole", A.long(), rf".*{layer}.* has dtype torch.int64, expected one of F32, F16, BF16"),
        ("words", "A", "no checkpoint of a client"),
    ]:
        assert_refused([with_factor(f"{name}.ckpt", factor)], rf"{name}\.ckpt: {reason}", shapes)


def test_a_checkpoint_of_another_base_is_refused(tmp_path, finished, checkpoint, shapes):
    file = finished / "clients" / "photo" / "last.ckpt"
    wider = {name: torch.Size(2 * size for size in shape) for name, shape in shapes.items()}
    assert_refused([file], r"last\.ckpt: .*lora_A.* has shape \(8, 96\), expected \(8, 192\)", wider)
    assert_refused([file], r"last\.ckpt: .*the base has no such linear layer", {"other.layer": torch.Size((4, 4))})
    reason = rf"last\.ckpt: base_fingerprint is {checkpoint['base_fingerprint']}, this base's is 0{{64}}"
    assert_refused([file], reason, shapes, "0" * 64)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder of repositories in the hub's place."""

    def snapshot_download(hub_id: str, local_dir: Path, allow_patterns: list[str]) -> None:
        Path(local_dir).mkdir(parents=True)
        for file in (tmp_path / "hub" / hub_id).iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, local_dir)

    monkeypatch.setattr("sap_lightning.io.hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_hub_id_is_fetched_without_what_an_upload_does_not_need(hub, cache):
    folder = random_upload(hub / "ann" / "lora.v1")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    [adapter], [same] = read_uploads(["ann/lora.v1"]), read_uploads([folder])
    assert adapter.sha256 == same.sha256
    assert {file.name for file in cache.rglob("*") if file.is_file()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_folder_goes_before_a_hub_id_of_the_same_name(hub, tmp_path):
    random_upload(hub / "ann" / "lora", seed=0)
    [local] = read_uploads([random_upload(tmp_path / "ann" / "lora", seed=1)])
    [adapter] = read_uploads(["ann/lora"])
    assert adapter.sha256 == local.sha256


def test_the_hub_s_upload_is_as_little_trusted_as_any(hub):
    folder = random_upload(hub / "eve" / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert_refused(["eve/lora"], "use_dora")


def test_an_unreachable_hub_is_said_with_the_id(monkeypatch, tmp_path, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(["nobody/nothing"], "nobody/nothing: no such folder, and not to be had from the hub")
    assert not cache.exists()


def test_what_is_neither_folder_nor_hub_id_is_never_asked_of_the_hub(tmp_path):
    for upload in (tmp_path / "nothing", "./a/b", "a/b/c", "nothing"):
        assert_refused([upload], "no such folder")
