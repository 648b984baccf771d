"""A finished run to be continued, shared by the tests of the federation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run in another place, to be continued."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
