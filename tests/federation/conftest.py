"""What the tests of the federation share: a LLaVA and its clients' conversations."""

from __future__ import annotations

import pytest
from llava import CLIENTS, conversations, tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("llava") / "base"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(conversations(tmp_path_factory.mktemp("conversations"), CLIENTS, count=3))
