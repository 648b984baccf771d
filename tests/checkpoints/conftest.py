"""A base and two models that were trained from it, each in shards of 20 KB."""

from __future__ import annotations

import pytest
from llamas import llama, saved, trained


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of A, B and their base C."""
    folder, base = tmp_path_factory.mktemp("trio"), llama()
    models = {"a": trained(base, 1), "b": trained(base, 2), "c": base}
    return [str(saved(model, folder / name)) for name, model in models.items()]
