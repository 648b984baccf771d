"""What lies on the Hugging Face hub: ids, and the files that are fetched by one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from sap_lightning.errors import InputError, first_line

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name is an id on the hub, and no path of this machine."""
    return _ID.fullmatch(name) is not None and not Path(name).exists()


def from_hub(hub_id: str, patterns: Iterable[str], folder: Path | None = None) -> Path:
    """Fetches the files of a repository that match one of these patterns.

    Args:
        hub_id: the repository's.
        patterns: such as ``*.json``.
        folder: where they go; the hub's own cache if not given.

    Returns:
        The folder that holds them.

    Raises:
        InputError: they are not to be had.
    """
    try:
        fetched = snapshot_download(hub_id, local_dir=folder, allow_patterns=list(patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise InputError(f"{hub_id}: no such folder, and not to be had from the hub: {first_line(error)}") from error
    return folder or Path(fetched)
