"""The uploads of the finished federation, for the modules that wear and merge them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def uploads(finished: Path) -> list[str]:
    return [str(finished / "uploads" / domain) for domain in ("cartoon", "painting", "photo")]
