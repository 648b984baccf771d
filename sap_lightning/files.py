"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sap_lightning.errors import WHAT_TO_CHECK, InputError

log = logging.getLogger(__name__)
LOCK_FILE = ".lock"
UNFINISHED = ".unfinished"
"""How the names of files and folders end that are not whole yet."""
FOLDER_NAME = r"[A-Za-z0-9_-][A-Za-z0-9 _.-]{0,63}"
"""What may be a folder's name on any system, and leads nowhere else."""
FOLDER_NAME_WORDS = "at most 64 letters, digits, spaces and _ - . (not first)"


def cache_folder() -> Path:
    """What can be made or fetched anew: `$SAP_LIGHTNING_CACHE`, or `~/.cache/sap_lightning`. Safe to delete."""
    return Path(os.environ.get("SAP_LIGHTNING_CACHE") or os.path.expanduser("~/.cache/sap_lightning"))


def refuse_existing(folder: str | Path) -> None:
    """Raises InputError when something of that name already stands."""
    if os.path.lexists(folder):
        raise InputError(f"{folder}: already exists and is not overwritten; name another folder or remove it")


def folder_named(setting: str, folder: str) -> Path:
    """The new folder that a setting names.

    Raises:
        InputError: when that is no name of a folder, as an empty one, ``.`` and ``/`` are none.
    """
    path = Path(folder)
    if path.name in ("", "..") or "\0" in folder:
        raise InputError(f"{setting} {folder!r}: is no name of a new folder; give one, such as {setting} result")
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system says against writing there becomes the one line that a person reads.

    Raises:
        InputError: naming the path.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {WHAT_TO_CHECK}") from error


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other commands from writing to a folder, and clears away what a killed one left unfinished in it.

    Of several processes of one command the first one holds it.

    Raises:
        InputError: when another command has it or a folder below it, or it cannot be written.
    """
    folder = Path(folder)
    if not _is_first_process():
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = _hold(folder)
    with held:
        for lock in folder.glob(f"*/**/{LOCK_FILE}"):
            with _hold(lock.parent):
                pass
        clear_unfinished(folder)
        try:
            yield
        except OSError as error:
            if error.filename is not None:
                raise
            with writing(folder):  # TensorBoard does not say where
                raise


def _is_first_process() -> bool:
    # Lightning says so when it is imported; a command that does without has one process.
    return getattr(rank_zero_only, "rank", 0) == 0


def _hold(folder: Path) -> AbstractContextManager[object]:
    try:
        return FileLock(folder / LOCK_FILE).acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{folder}: another command is writing there; wait for it, or use another folder") from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes its final name when the block ends without an error.

    Raises:
        InputError: when something of that name already stands, or it cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder)
    staging = _unfinished(folder)
    with writing(folder):
        try:
            staging.mkdir(parents=True)
            yield staging
            put_in_place(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def put_in_place(staging: Path, folder: Path) -> None:
    """Gives a folder that is whole its final name."""
    for path in [*staging.rglob("*"), staging]:
        _outlast_power_cut(path)
    staging.rename(folder)
    _outlast_power_cut(folder.parent)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by name into a folder that `new_folder` gives."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of ``path`` when the block ends without an error."""
    staging = _unfinished(path)
    try:
        with staging.open("xb") as file:
            yield file
        _outlast_power_cut(staging)
        staging.replace(path)
        _outlast_power_cut(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """A name beside a path for what is to become of it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed command was writing in a folder or below it. Nobody may be writing there."""
    _remove(folder.rglob(f".*.{'?' * 32}{UNFINISHED}"))


def clear_unfinished_at(path: Path) -> None:
    """Removes what a killed command was writing to a path. Nobody may be writing to it, but others beside it."""
    _remove(path.parent.glob(f".{path.name}.{'?' * 32}{UNFINISHED}"))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _outlast_power_cut(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step; its folder is made if it is not there.

    Raises:
        InputError: when it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)


def append_bytes(path: Path, content: bytes) -> None:
    """Adds to a file that stands, all of it or, when it cannot be written, nothing.

    Raises:
        InputError: when it cannot be written.
    """
    with writing(path):
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(content)
            _outlast_power_cut(path)
        except OSError:
            os.truncate(path, size)
            raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces a safetensors file in one step; it has the sha256 of what it holds in its metadata."""
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {"sha256": _sha256_of(plain)}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """What `write_tensors` wrote; None where it is not there, or has changed since and is set aside."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            stated = (file.metadata() or {}).get("sha256")
    except (SafetensorError, KeyError):  # a KeyError for a dtype that torch does not have
        tensors, stated = {}, ""
    if stated not in (None, _sha256_of(tensors)):
        set_aside(path)
        return None
    return tensors


def _sha256_of(tensors: dict[str, Tensor]) -> str:
    return sha256(save(tensors)).hexdigest()


def set_aside(path: Path) -> None:
    """Says that a file is damaged, and renames it, so that what it held can be made anew; the first process does."""
    if not _is_first_process():
        return
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    log.warning("%s is damaged: it is now %s, and what it held is made anew", path, aside.name)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step; bytes of a name in it that are no UTF-8 are escaped, in JSON as JSON does."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def sha256_of_file(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


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
