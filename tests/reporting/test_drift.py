from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from references import randn
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sap_lightning.reporting.drift import drift_of

VISION, TEXT = "vision_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"


def keep(folder: Path, epoch: int, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / f"{epoch}.safetensors")


def adapter(seed: int) -> dict[str, Tensor]:
    return {
        f"{layer}.{factor}": randn(seed + 2 * i + j, *shape)
        for i, layer in enumerate((VISION, TEXT))
        for j, (factor, shape) in enumerate((("A", (2, 6)), ("B", (5, 2))))
    }


def test_drift_is_the_mean_cosine_of_all_pairs_by_tower_and_epoch(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("art", "photo", "sketch")]
    for epoch in (2, 10):
        for number, folder in enumerate(folders):
            keep(folder, epoch, adapter(100 * epoch + 10 * number))
    keep(folders[0], 11, adapter(0))  # the others are not there yet
    drift = drift_of(folders)
    for tower, layer in (("vision", VISION), ("text", TEXT)):
        assert [epoch for epoch, _ in drift[tower]] == [2, 10]
        for epoch, mean in drift[tower]:
            vectors = [
                torch.cat([adapter(100 * epoch + 10 * k)[f"{layer}.{of}"].half().double().flatten() for of in "AB"])
                for k in range(3)
            ]
            pairs = [cosine_similarity(vectors[i], vectors[j], 0) for i, j in ((0, 1), (0, 2), (1, 2))]
            assert mean == pytest.approx(float(sum(pairs) / 3))


def test_equal_clients_are_at_one_and_one_client_or_none_has_no_drift(tmp_path: Path) -> None:
    folders = [tmp_path / "art", tmp_path / "photo"]
    for folder in folders:
        keep(folder, 1, adapter(0))
    assert drift_of(folders) == {"vision": [(1, pytest.approx(1))], "text": [(1, pytest.approx(1))]}
    assert drift_of(folders[:1]) == drift_of([]) == drift_of([*folders, tmp_path / "nothing"]) == {}
