"""What a result was made with: settings, code and packages."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sap_lightning.fingerprints import config_hash

PACKAGES = ("lightning", "peft", "sap-lightning", "torch", "torchmetrics", "transformers")

_CHECKOUT = Path(__file__).resolve().parents[2]
_SECONDS = 10.0
# Git sets these for its hooks; they would make it answer for the repository of the hook.
_REDIRECTIONS = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}


def provenance(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run's results were made with, for every row of a table.

    Args:
        config: the run's settings.

    Returns:
        ``config``: the settings' hash.
        ``commit``: git commit of the checkout that this package stands in, with ``-dirty`` when tracked files differ
        from it; empty when it stands in none, or git is missing or fails.
        ``versions``: Python and the packages that decide results, as ``lightning 2.6.6, peft 0.21.2, …``.
    """
    return {
        "config": config_hash(config),
        "commit": _commit(),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(_versions().items())),
    }


def _commit() -> str:
    try:
        # A package installed below some other repository is none of that repository's code.
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != _CHECKOUT:
            return ""
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    """What git says of the folder above the package, without writing to its repository."""
    said = subprocess.run(
        ["git", "--no-optional-locks", "-C", _CHECKOUT, *arguments],
        capture_output=True,
        check=True,
        timeout=_SECONDS,
        env={name: value for name, value in os.environ.items() if name not in _REDIRECTIONS},
    )
    return os.fsdecode(said.stdout).strip()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # such as our own, run from a checkout that was never installed
        return "unknown"
