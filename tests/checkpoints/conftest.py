"""A base and two models that were trained from it, each in shards of 20 KB; and texts for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from llamas import TEXTS, llama, saved, tokenizer, trained
from places import SHAPES_CLIP
from transformers import CLIPModel


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of A, B and their base C."""
    folder, base = tmp_path_factory.mktemp("trio"), llama()
    models = {"a": trained(base, 1), "b": trained(base, 2), "c": base}
    return [str(saved(model, folder / name)) for name, model in models.items()]


@pytest.fixture(scope="session")
def speaking(trio: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A, B and C with a tokenizer."""
    folder = tmp_path_factory.mktemp("speaking")
    for path in trio:
        shutil.copytree(path, folder / Path(path).name)
    tokenizer().save_pretrained(folder / "a")
    return [str(folder / name) for name in "abc"]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n")
    return str(tmp_path / "texts.txt")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A, B and their base, which is the shipped CLIP."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate("ab"):
        shutil.copytree(SHAPES_CLIP, folder / name)
        saved(trained(CLIPModel.from_pretrained(SHAPES_CLIP), seed), folder / name, shard="1MB")
        (folder / name / "model.safetensors").unlink()
    return [str(folder / "a"), str(folder / "b"), SHAPES_CLIP]
