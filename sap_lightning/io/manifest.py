"""What a client says about its adapter, and what the server accepts of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, Literal, get_args

from sap_lightning.errors import InputError
from sap_lightning.files import FOLDER_NAME, FOLDER_NAME_WORDS
from sap_lightning.functional.reach import LENGTHS, MEASURED, Reach
from sap_lightning.io.rules import (
    NUMBER,
    TEXT,
    TEXT_BY_NAME,
    Rule,
    is_integer,
    is_text,
    json_bytes,
    matches,
    require,
    short,
)

Kind = Literal["lora", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FACTORS = ("lora_A", "lora_B")
"""The parts of an adapter."""
BaseFingerprint = str | Callable[[Iterable[str]], str] | None
"""`fingerprint` of a base, or what gives it for an adapter of these layers; any base is right where there is none."""
_TEXTS = Rule(lambda value: isinstance(value, tuple) and all(map(is_text, value)), "a list of texts")
_NAME = Rule(matches(FOLDER_NAME), FOLDER_NAME_WORDS)
_SHA256 = Rule(matches(r"[0-9a-f]{64}"), "a sha256 in hex")
_COUNT = Rule(lambda value: is_integer(value, 1, 10**9), "an integer from 1 to a thousand million")
_SEED = Rule(lambda value: is_integer(value, 0), "an integer from 0")
_VERSION = Rule(lambda value: is_integer(value, 1, 2), "1 or 2, the versions known here")
_KIND = Rule(lambda value: value in KINDS, f"one of {', '.join(KINDS)}")
MOST_ROUNDS = 10**6
_ROUND = Rule(lambda value: is_integer(value, 0, MOST_ROUNDS), "an integer from 0 to a million")


def _is_reach(value: Any) -> bool:
    return (
        isinstance(value, dict) and (not value or set(value) == set(MEASURED)) and all(map(_is_curve, value.values()))
    )


def _is_curve(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == len(LENGTHS)
        and all(type(share) in (int, float) and 0 <= share <= 1 for share in value)
    )


_REACH = Rule(_is_reach, f"{len(LENGTHS)} numbers in [0, 1] for each of {', '.join(MEASURED)}, or nothing")
_RULES = {
    "format_version": _VERSION,
    "base": TEXT,
    "base_fingerprint": _SHA256,
    "domain": _NAME,
    "class_names": _TEXTS,
    "num_samples": _COUNT,
    "rank": _COUNT,
    "alpha": NUMBER,
    "targets": _TEXTS,
    "seed": _SEED,
    "packages": TEXT_BY_NAME,
    "tensors_sha256": _SHA256,
    "reach": _REACH,
}
_SECOND_RULES = {
    "kind": _KIND,
    "parts": _TEXTS,
    "round": _ROUND,
    "task": TEXT,
    "layers": _TEXTS,
    "connector_sha256": Rule(matches(r"([0-9a-f]{64})?"), "a sha256 in hex, or nothing"),
}
"""What format 2 says besides."""
_UNSAID = {"kind": "lora", "parts": FACTORS, "round": 0, "task": "", "layers": (), "connector_sha256": ""}
"""What a manifest of format 1 leaves unsaid, and how that is understood."""
_OPTIONAL = {"reach", "connector_sha256"}
DIGEST = "fields_sha256"


@dataclass(frozen=True)
class Manifest:
    """What a client says about its adapter; nothing in it depends on when or where it was written.

    Attributes:
        base: name or path of the base checkpoint.
        base_fingerprint: `fingerprint` of the base's vision tower, or of both towers where it adapts the text tower.
        domain: the client's domain; a plain name, as it may name a folder.
        class_names: the classes it was trained on, in order.
        num_samples: number of training images.
        rank: r of the adapter.
        alpha: α of the adapter.
        targets: names of the adapted modules.
        seed: seed of the training.
        packages: versions of the packages that trained it.
        tensors_sha256: `sha256_of` the adapter's layers.
        reach: how far the adapter reaches, see `functional.reach`; empty where the client does not say.
        format_version: version of the manifest's format; 1 has none of what follows, which is as it is here.
        kind: of what was trained.
        parts: of it that were sent.
        round: in which it was trained, from 0.
        task: that it was trained on, where clients have several.
        layers: names of those that were sent, where that is not all that the targets name.
        connector_sha256: of a connector that is sent beside the adapter; left out where there is none.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    base: str
    base_fingerprint: str
    domain: str
    class_names: tuple[str, ...]
    num_samples: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int
    packages: dict[str, str]
    tensors_sha256: str
    reach: Reach = field(default_factory=dict)
    format_version: int = 1
    kind: Kind = "lora"
    parts: tuple[str, ...] = FACTORS
    round: int = 0
    task: str = ""
    layers: tuple[str, ...] = ()
    connector_sha256: str = ""

    def __post_init__(self) -> None:
        for name, rule in (_RULES | _SECOND_RULES).items():
            require(name, getattr(self, name), rule)
        for name, unsaid in _UNSAID.items():
            if self.format_version == 1 and getattr(self, name) != unsaid:
                raise InputError(f"{name} is {short(getattr(self, name))}, which a manifest of format 1 cannot say")


def manifest_from(content: dict[str, Any]) -> Manifest:
    """A manifest from its JSON object.

    Raises:
        InputError: naming a field that is missing, unknown or wrong.
    """
    require("format_version", content.get("format_version"), _VERSION)
    said = {name: value for name, value in content.items() if name != DIGEST}
    manifest = _from_fields(said)
    if DIGEST in content and content[DIGEST] != _digest(said):
        raise InputError(f"{DIGEST} is not that of the other fields; the file has changed, upload it again")
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as JSON text, with a digest of its fields that shows damage."""
    known = _rules_of(manifest.format_version)
    said = {name: value for name, value in asdict(manifest).items() if name in known}
    if not manifest.connector_sha256:
        said.pop("connector_sha256", None)
    return json_bytes(said | {DIGEST: _digest(said)})


def _digest(said: dict[str, Any]) -> str:
    return sha256(json_bytes(said)).hexdigest()


def _rules_of(version: int) -> dict[str, Rule]:
    return _RULES if version == 1 else _RULES | _SECOND_RULES


def _from_fields(content: dict[str, Any]) -> Manifest:
    known = _rules_of(content["format_version"]).keys()
    if missing := sorted(known - _OPTIONAL - content.keys()):
        raise InputError(f"{missing[0]} is missing; write the upload again")
    if unknown := sorted(content.keys() - known):
        raise InputError(f"unknown field {short(unknown[0])}; write the upload again")
    return Manifest(**_frozen(content))


def _frozen(value: Any) -> Any:
    """The same with tuples for lists."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def base_with(base_fingerprint: str, folded: Iterable[str]) -> str:
    """What stands for a base's fingerprint once updates have been added to it: of that, and of their digests in order.

    It does not depend on how a machine rounds their sum.
    """
    for digest in folded:
        base_fingerprint = sha256(f"{base_fingerprint}\0{digest}".encode()).hexdigest()
    return base_fingerprint


def require_base(trained_on: str, expected: str | None, name: str = "") -> None:
    """Raises InputError when an adapter was trained on another base than the one at hand.

    Args:
        trained_on: `fingerprint` of the base it was trained on.
        expected: that of the base at hand; any base is right if not given.
        name: of the base it was trained on, if known.
    """
    if expected not in (None, trained_on):
        which = f", {short(name)}" if name else ""
        raise InputError(
            f"base_fingerprint is {trained_on}, this base's is {expected}; merge it into the base it was trained on"
            f"{which}"
        )


def check_domain(name: str) -> None:
    """Raises InputError when an upload cannot name its domain so."""
    if not _NAME.holds(name):
        raise InputError(f"domain {name!r}: its name must be {_NAME.words}; rename the folder, or the dataset's value")
