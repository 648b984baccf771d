"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import rank_zero_only
from safetensors.torch import save
from torch import Tensor

from sap_lightning.errors import InputError


def cache_folder() -> Path:
    """What can be made or fetched anew: `$SAP_LIGHTNING_CACHE`, or `~/.cache/sap_lightning/images`. Safe to delete."""
    return Path(os.environ.get("SAP_LIGHTNING_CACHE") or os.path.expanduser("~/.cache/sap_lightning/images"))


def refuse_existing(folder: str | Path) -> None:
    """Raises InputError when something of that name already stands."""
    if os.path.lexists(folder):
        raise InputError(f"{folder}: already exists and is not overwritten; name another folder or remove it")


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other commands from writing to a folder; of several processes of one command the first one holds it.

    Raises:
        InputError: when another command has it, or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    try:
        with FileLock(folder / ".lock", timeout=0) if getattr(rank_zero_only, "rank", 0) == 0 else nullcontext():
            yield
    except Timeout as error:
        raise InputError(f"{folder}: another command is writing there; wait for it, or use another folder") from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes its final name when the block ends without an error.

    Raises:
        InputError: when something of that name already stands.
    """
    folder = Path(folder)
    refuse_existing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            staging = Path(temporary) / folder.name
            staging.mkdir()
            yield staging
            staging.rename(folder)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def _cannot_be_written(folder: Path, error: OSError) -> InputError:
    return InputError(f"{folder}: cannot be written ({error.strerror or error}); check path and disk")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of ``path`` when the block ends without an error."""
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with staging.open("xb") as file:
            yield file
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step."""
    with replacing(path) as file:
        file.write(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces a safetensors file in one step; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step; bytes of a name in it that are no UTF-8 are escaped, in JSON as JSON does."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def as_json(content: Any) -> Any:
    """Content as it comes back from a JSON file; what JSON does not know becomes text."""
    return json.loads(json.dumps(content, default=str))


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Replaces a CSV file in one step."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file in one step; keys are sorted, so equal content gives equal bytes."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
