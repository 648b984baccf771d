"""Where a run keeps its things, and the settings it is held to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sap_lightning.errors import InputError
from sap_lightning.files import write_text
from sap_lightning.fingerprints import config_hash
from sap_lightning.results import earlier_version, refuse_earlier

FREE_SETTINGS = (
    "federation.run_dir",
    "federation.unseen",
    "federation.clients",
    "federation.poison",
    "federation.report",
    "data.domain",
    "merge.method",
    "merge.reject_outliers",
    "sweep",
)
"""Settings, and groups of them, that may change from one start to the next: what is in the folder does not depend on
them, or says itself what it was made with."""
EARLIER_SETTING = "data.num_workers"
"""A setting that every run folder of a version before 0.2 has."""
SERVER_SETTINGS = (*FREE_SETTINGS, "federation", "anchors", "prune", "merge")
"""Settings that no client's training depends on."""


class RunFolder:
    """config.yaml, clients/<domain>, uploads/<domain>, merged/<unseen>/<method>, results, report; poisoned/<what>."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def client(self, domain: str) -> Path:
        """A client's checkpoint and TensorBoard events."""
        return self.path / "clients" / domain

    def epochs(self, domain: str) -> Path:
        """A client's adapter after every epoch, where it adapts both towers; never sent."""
        return self.client(domain) / "epochs"

    def upload(self, domain: str) -> Path:
        """What a client sent."""
        return self.path / "uploads" / domain

    def poisoned(self, name: str) -> RunFolder:
        """Training and upload of a poisoned client."""
        return RunFolder(self.path / "poisoned" / name)

    def merged(self, unseen: str, method: str) -> Path:
        """A merged model, made without the unseen domain's client."""
        return self.path / "merged" / unseen / method


def config_file(settings: Mapping[str, Any]) -> str:
    """Where in a run folder the settings of a command are kept, beside those of others."""
    return f"configs/{config_hash(settings)}.yaml"


def require_settings(folder: Path, config: Mapping[str, Any], free: Sequence[str] = FREE_SETTINGS) -> None:
    """Writes the folder's config.yaml, or compares with the one that stands once training has begun.

    Args:
        folder: of a run or of a client.
        config: all settings.
        free: settings, and groups of them, that may differ.

    Raises:
        InputError: naming every setting that differs, or when the folder is an earlier version's.
    """
    refuse_earlier(folder)
    file = folder / "config.yaml"
    begun = (folder / "uploads").exists() or any(folder.rglob("*.ckpt"))
    if not (file.is_file() and begun):
        write_text(file, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        return
    before, now = (dict(flat(c)) for c in (yaml.safe_load(file.read_text(encoding="utf-8")), config))
    if EARLIER_SETTING in before:
        raise earlier_version(folder)
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not belongs_to(key, free)
    ]
    if changed:
        raise InputError(
            f"{folder} was started with other settings: {'; '.join(changed)}."
            " Start anew with another --federation.run_dir, or set them back"
        )


def belongs_to(setting: str, groups: Iterable[str]) -> bool:
    """Whether a setting is one of these, or in one of these groups."""
    return any(setting == name or setting.startswith(f"{name}.") for name in groups)


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every setting of a config file: ``{"model": {"rank": 8}}`` gives ``("model.rank", 8)``."""
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), config
