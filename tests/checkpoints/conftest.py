"""A base and two models that were trained from it, each in shards of 20 KB."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from llamas import TEXTS, llama, saved, speaking, trained


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of A, B and their base C."""
    folder, base = tmp_path_factory.mktemp("trio"), llama()
    models = {"a": trained(base, 1), "b": trained(base, 2), "c": base}
    return [str(saved(model, folder / name)) for name, model in models.items()]


@pytest.fixture(scope="session")
def speakers(trio: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A, B and C, the first of them with a tokenizer."""
    folder = tmp_path_factory.mktemp("speakers")
    for path in trio:
        shutil.copytree(path, folder / Path(path).name)
    speaking(folder / "a")
    return [str(folder / name) for name in "abc"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of ``TEXTS``."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n\n".join(TEXTS) + "\n")
    return str(file)
