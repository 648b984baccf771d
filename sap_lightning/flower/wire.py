"""What crosses the wire as Flower's records: the server's question, and the files of an upload."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from sap_lightning.errors import InputError, short
from sap_lightning.io.upload_files import ADAPTER_FILES

MESSAGE_TYPE = "train.upload"
MOST_BYTES = 2**28
"""Of an upload: a hundred times the adapter of a ViT-B."""
_QUESTION, _FILES, _DIGESTS = "question", "files", "sha256"


class Question(NamedTuple):
    """What the server asks of every site.

    Attributes:
        base_fingerprint: of the base that adapters are to be for.
        class_names: that adapters are to be trained on, in order.
        version: of this package, that a site must have at least.
    """

    base_fingerprint: str
    class_names: list[str]
    version: str


def question_record(question: Question) -> RecordDict:
    """A question as it is sent."""
    return RecordDict({_QUESTION: ConfigRecord(question._asdict())})


def question_in(content: RecordDict) -> Question:
    """The question that a server sent.

    Raises:
        InputError: it is none.
    """
    asked: dict[str, Any] = dict(content.config_records.get(_QUESTION, {}))
    if set(asked) != set(Question._fields):
        raise InputError(f"the server asks for {short(sorted(asked))}; it has another version of sap-lightning")
    return Question(**asked)


def upload_record(folder: Path) -> RecordDict:
    """The files of an upload as they are sent, with the sha256 of each."""
    files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    digests = {name: sha256(content).hexdigest() for name, content in files.items()}
    arrays = {name: Array("uint8", (len(content),), "bytes", content) for name, content in files.items()}
    return RecordDict({_FILES: ArrayRecord(arrays), _DIGESTS: ConfigRecord(dict(digests))})


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
