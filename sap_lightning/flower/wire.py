"""What crosses the wire as Flower's records: the server's question, what it hands over, and the files of an upload."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from sap_lightning.errors import InputError, short
from sap_lightning.io.upload_files import ADAPTER_FILES

MESSAGE_TYPE = "train.upload"
MOST_BYTES = 2**28
"""Of an upload: a hundred times the adapter of a ViT-B."""
Parts = Mapping[str, Mapping[str, bytes]]
"""What rounds have handed over: the files of each adapter by name."""
NEVER = -1
_QUESTION, _FILES, _DIGESTS = "question", "files", "sha256"


class Question(NamedTuple):
    """What the server asks of every site.

    Attributes:
        base_fingerprint: of the base that adapters are to be for.
        class_names: that adapters are to be trained on, in order.
        version: of this package, that a site must have at least.
        rounds: how many there are; what follows tells of one among several.
        way, optimizer, schedule: how they are played, as `Agreement` has it.
        round: that is asked for, from 0.
        unseen: the domain that it is played for; none of the first, which is the same for all.
        last: the last round before in which the site took part; NEVER if it did in none.
        start: digest of the adapter that the site goes on from, if it is handed one.
        folded: digests of all that was added to the base, in order.
    """

    base_fingerprint: str
    class_names: list[str]
    version: str
    rounds: int = 1
    way: str = "flexlora"
    optimizer: str = "reset"
    schedule: str = "whole"
    round: int = 0
    unseen: str = ""
    last: int = NEVER
    start: str = ""
    folded: tuple[str, ...] = ()


def question_record(question: Question, parts: Parts = MappingProxyType({})) -> RecordDict:
    """A question as it is sent, with what the site goes on from."""
    asked = {**question._asdict(), "folded": list(question.folded)}
    handed = {name: _arrays(files) for name, files in parts.items()}
    return RecordDict({_QUESTION: ConfigRecord(asked), **handed})


def parts_in(content: RecordDict) -> Parts:
    """What a server has handed over with its question."""
    return {name: {of: array.data for of, array in files.items()} for name, files in content.array_records.items()}


def question_in(content: RecordDict) -> Question:
    """The question that a server sent.

    Raises:
        InputError: it is none.
    """
    asked: dict[str, Any] = dict(content.config_records.get(_QUESTION, {}))
    if set(asked) != set(Question._fields):
        raise InputError(f"the server asks for {short(sorted(asked))}; it has another version of sap-lightning")
    return Question(**{**asked, "folded": tuple(asked["folded"])})


def upload_record(folder: Path) -> RecordDict:
    """The files of an upload as they are sent, with the sha256 of each."""
    files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    digests = {name: sha256(content).hexdigest() for name, content in files.items()}
    return RecordDict({_FILES: _arrays(files), _DIGESTS: ConfigRecord(dict(digests))})


def _arrays(files: Mapping[str, bytes]) -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(content),), "bytes", content) for name, content in files.items()})


def files_in(content: RecordDict) -> dict[str, bytes]:
    """The files that a client sent, by name.

    Raises:
        InputError: they are not exactly those of an upload, too large, or not as they were sent.
    """
    files: dict[str, Array] = dict(content.array_records.get(_FILES, {}))
    digests = dict(content.config_records.get(_DIGESTS, {}))
    if set(files) != set(ADAPTER_FILES):
        raise InputError(f"sent the files {short(sorted(files))}, expected {', '.join(ADAPTER_FILES)}")
    if (size := sum(len(array.data) for array in files.values())) > MOST_BYTES:
        raise InputError(f"sent {size} bytes, more than {MOST_BYTES}; train with a lower rank")
    for name, array in files.items():
        if sha256(array.data).hexdigest() != digests.get(name):
            raise InputError(f"{name}: its sha256 is not what the client said; it was damaged on its way")
    return {name: array.data for name, array in files.items()}
