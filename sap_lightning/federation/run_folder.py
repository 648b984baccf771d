"""Where a run keeps its things, and the settings it is held to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from sap_lightning.errors import InputError
from sap_lightning.files import write_text
from sap_lightning.fingerprints import config_hash
from sap_lightning.io.manifest import Kind, check_domain
from sap_lightning.results import earlier_version, refuse_earlier

log = logging.getLogger(__name__)
FREE_SETTINGS = (
    "federation.run_dir",
    "federation.unseen",
    "federation.clients",
    "federation.poison",
    "federation.report",
    "federation.last_method",
    "federation.parallel",
    "data.domain",
    "merge.method",
    "merge.weights",
    "merge.max_share",
    "merge.reject_outliers",
    "model.init_args.memory",
    "sweep",
)
"""Settings, and groups of them, that may change from one start to the next: what is in the folder does not depend on
them, or says itself what it was made with."""
SEAL = "# sha256 of the rest: "
CONFIG_FILE = "config.yaml"
EARLIER_SETTING = "data.num_workers"
"""A setting that every run folder of a version before 0.2 has."""
SERVER_SETTINGS = (*FREE_SETTINGS, "anchors", "prune", "merge")
"""Settings that no client's training depends on, where there is one round."""
SERVER_SETTINGS_OF_ROUNDS = (*FREE_SETTINGS, "prune")
"""The same where clients go on from what the server has merged: by average, unless merge.method, which is held to in
other ways, says otherwise."""
MADE = ("uploads", "first", "answers")
"""Folders that stand once clients have begun to train, or something was measured."""
_OF_ROUNDS = tuple(f"federation.{name}" for name in ("rounds", "share", "aggregation", "optimizer", "schedule"))
"""Those of the federation that say nothing where there is one round."""


class RunFolder:
    """config.yaml, clients/<domain>, uploads/<domain>, merged/<unseen>/<method>, results, report; poisoned/<what>.

    Of several rounds the first stands there, the others in rounds/<unseen>/<number>. What prompt clients train and send
    stands in prompts/, beside what others do in the same run.

    Raises:
        InputError: on use, for a domain whose name would lead elsewhere.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def of_kind(self, kind: Kind) -> RunFolder:
        """Where clients of a kind have all but the results."""
        return RunFolder(self.path / "prompts") if kind == "prompt" else self

    def client(self, domain: str) -> Path:
        """A client's checkpoint and TensorBoard events."""
        return self._of("clients", domain)

    def epochs(self, domain: str) -> Path:
        """A client's adapter after every epoch, where it adapts both towers; never sent."""
        return self.client(domain) / "epochs"

    def upload(self, domain: str) -> Path:
        """What a client sent."""
        return self._of("uploads", domain)

    @property
    def uploads(self) -> list[Path]:
        """All that stands of what clients sent, in the order of their domains."""
        return sorted(self.path.glob("uploads/[!.]*"))

    def poisoned(self, name: str) -> RunFolder:
        """Training and upload of a poisoned client."""
        return RunFolder(self.path / "poisoned" / name)

    def round(self, unseen: str, number: int) -> RunFolder:
        """Training and uploads of a round, from 0; the first is the same for every unseen domain."""
        return RunFolder(self._of("rounds", unseen) / str(number)) if number else self

    def last_round(self, unseen: str) -> RunFolder:
        """The last round that has uploads for an unseen domain."""
        numbers = [int(uploads.parent.name) for uploads in self._of("rounds", unseen).glob("*/uploads")]
        return self.round(unseen, max(numbers, default=0))

    @property
    def has_later_rounds(self) -> bool:
        """Whether a round after the first has begun."""
        return any(self.path.glob("rounds/*/*"))

    def handed(self, unseen: str, number: int) -> Path:
        """What a round hands to the clients of the next one."""
        return self._of("rounds", unseen) / str(number) / "global"

    def merged(self, unseen: str, method: str) -> Path:
        """A merged model, made without the unseen domain's client."""
        return self._of("merged", unseen) / method

    def _of(self, folder: str, domain: str) -> Path:
        check_domain(domain)
        return self.path / folder / domain


def config_file(settings: Mapping[str, Any]) -> str:
    """Where in a run folder the settings of a command are kept, beside those of others."""
    return f"configs/{config_hash(settings)}.yaml"


@rank_zero_only
def write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings as YAML, below a comment with the sha256 of the rest; of several processes the first does."""
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    write_text(file, f"{_seal(text)}\n{text}")


def read_settings(file: Path) -> dict[str, Any]:
    """What `write_settings` wrote, or an earlier version, which knew no sha256.

    Raises:
        InputError: it has changed since.
    """
    try:
        content = file.read_text(encoding="utf-8")
        seal, _, text = content.partition("\n")
        settings = yaml.safe_load(content)
    except (UnicodeDecodeError, yaml.YAMLError):
        seal, text, settings = SEAL, "", None
    if not isinstance(settings, dict) or (seal.startswith(SEAL) and seal != _seal(text)):
        raise InputError(f"{file}: has changed since it was written; fit, run as it was, writes it anew")
    return settings


def _seal(text: str) -> str:
    return SEAL + sha256(text.encode()).hexdigest()


def require_settings(folder: Path, config: Mapping[str, Any], free: Sequence[str] = FREE_SETTINGS) -> None:
    """Writes the folder's config.yaml, or compares with the one that stands once training has begun.

    Args:
        folder: of a run or of a client.
        config: all settings.
        free: settings, and groups of them, that may differ.

    Raises:
        InputError: naming every setting that differs, or when the folder is an earlier version's.
    """
    if not is_held_to(folder, config, free):
        write_settings(folder / CONFIG_FILE, config)


def is_held_to(folder: Path, config: Mapping[str, Any], free: Sequence[str] = FREE_SETTINGS) -> bool:
    """Whether training has begun in a folder whose config.yaml stands and says the same; takes what the above does.

    Raises:
        InputError: naming every setting that differs, or when the folder is an earlier version's.
    """
    refuse_earlier(folder)
    file = folder / CONFIG_FILE
    begun = any((folder / made).exists() for made in MADE) or any(folder.rglob("*.ckpt"))
    if not (file.is_file() and begun):
        return False
    try:
        before, now = (_held(settings) for settings in (read_settings(file), config))
    except InputError as error:
        log.warning("%s", error)
        return False
    if EARLIER_SETTING in before:
        raise earlier_version(folder)
    refuse_other_settings(folder, before, now, free)
    return True


def _held(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, without those of rounds where there is one, as before there could be several."""
    settings = dict(flat(config))
    # Instruction tuning, which has no aggregation to choose, has several turns in one round too.
    if settings.get("federation.rounds", 1) > 1 or "federation.aggregation" not in settings:
        return settings
    return {name: value for name, value in settings.items() if not belongs_to(name, _OF_ROUNDS)}


def refuse_other_settings(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()
) -> None:
    """Raises InputError that names every setting that what is in a folder was not made with."""
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
