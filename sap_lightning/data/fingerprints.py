"""Digests that tell whether an input changed, without reading it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from sap_lightning.errors import InputError

_CLOCK_TICK = 0.02


def digest(*parts: object) -> str:
    """A short name for JSON-able values that changes when any of them does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def file_fingerprint(files: Sequence[Path | str]) -> str:
    """A digest of path, size, mtime and ctime of every file; ctime also moves when mtime is set back.

    Raises:
        InputError: a file is missing.
    """
    try:
        stats = [(os.path.realpath(file), os.stat(file)) for file in files]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    _outlast_clock_tick(max((stat.st_ctime for _, stat in stats), default=0))
    return digest([(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats])


def _outlast_clock_tick(changed: float) -> None:
    """File times move in ticks of some milliseconds; a second change within one tick would go unnoticed."""
    if time.time() - changed < _CLOCK_TICK:
        time.sleep(_CLOCK_TICK)
