"""Digests: of settings, of a model's weights, and of files without reading them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sap_lightning.errors import InputError

SEAL = "sha256"
_CLOCK_TICK = 0.02


def digest(*parts: object) -> str:
    """A short name for JSON-able values that changes when any of them does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able content and a digest of it, by which `unsealed` finds it damaged."""
    return {**content, SEAL: digest(dict(content))}


def unsealed(content: Any) -> dict[str, Any]:
    """What was sealed, or what earlier versions wrote without a seal.

    Raises:
        InputError: it has changed since.
    """
    if not isinstance(content, dict):
        raise InputError("is no object")
    inner = {name: value for name, value in content.items() if name != SEAL}
    if content.get(SEAL) not in (None, digest(inner)):
        raise InputError("has changed since it was written")
    return inner


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the sha256 of settings as sorted JSON; what JSON does not know counts as its text."""
    settings = json.dumps(dict(config), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def fingerprint(module: nn.Module) -> str:
    """sha256 over the sorted names, shapes and float32 values of a module's state dict."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        hash_tensor(hashed, name, tensor)
    return hashed.hexdigest()


def hash_tensor(hashed: Any, name: str, tensor: Tensor) -> None:
    """Takes a tensor's name, shape and float32 values into a hash."""
    hashed.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
    hashed.update(tensor.detach().cpu().float().numpy().tobytes())


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
