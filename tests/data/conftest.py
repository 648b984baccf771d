"""A made-up checkpoint's preprocessing and a small folder of domains."""

import json
from pathlib import Path

import pytest
from pictures import noise

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 16},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.45, 0.40],
    "image_std": [0.26, 0.27, 0.28],
}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write_base(tmp_path):
    """Writes a checkpoint folder with the settings changed as given and returns its path."""

    def write(**changes: object) -> str:
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | changes))
        return str(folder)

    return write


@pytest.fixture
def base(write_base) -> str:
    return write_base()


@pytest.fixture
def root(tmp_path) -> Path:
    """photo and sketch × big_cat and dog × 10 images."""
    for seed, (domain, label, number) in enumerate(
        (domain, label, number)
        for domain in ("photo", "sketch")
        for label in ("big_cat", "dog")
        for number in range(10)
    ):
        folder = tmp_path / "root" / domain / label
        folder.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / f"{number}.png")
    return tmp_path / "root"
