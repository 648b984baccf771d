"""What the server hands to the clients between two rounds, as files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sap_lightning.errors import InputError
from sap_lightning.files import as_json, new_folder, write_files, write_json
from sap_lightning.fingerprints import sealed, unsealed
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import WHOLE, Adapter, Expected, sha256_of
from sap_lightning.io.uploads import files_of, read_folder

log = logging.getLogger(__name__)
START, FOLDED = "start", "folded"
RECORD_FILE = "round.json"
IN_WORDS = {"sources": "set of uploads"}


class Handed(NamedTuple):
    """What a round hands to the clients of the next one.

    Attributes:
        start: the adapter or prompt that they go on from; they draw a new one if there is none.
        folded: what they add to the base.
    """

    start: Adapter | None
    folded: Adapter | None


def hand_over(
    folder: Path,
    base: str,
    start: Mapping[str, LoRALayer],
    folded: Mapping[str, LoRALayer],
    expected: Expected,
    record: Mapping[str, Any],
) -> None:
    """Writes what a round hands over, with a record of what it was made of, whole or not at all.

    Args:
        folder: must not exist.
        base: name or path of the base checkpoint.
        start: the factors that the next round starts from, by layer; may be empty.
        folded: what is added to the base, by layer; may be empty.
        expected: which factors of the start are written.
        record: what decided them, as JSON knows it.
    """
    parts = {
        name: (layers, sent) for name, layers, sent in ((START, start, expected.sent), (FOLDED, folded, "AB")) if layers
    }
    adapters = {name: sha256_of(layers) for name, (layers, _) in parts.items()}
    with new_folder(folder) as staging:
        for part, (layers, sent) in parts.items():
            (staging / part).mkdir()
            write_files(staging / part, files_of(layers, base, sent))
        write_json(staging / RECORD_FILE, sealed(as_json({**record, "adapters": adapters})))


def handed_in(folder: Path, expected: Expected, record: Mapping[str, Any]) -> Handed | None:
    """What `hand_over` wrote; None where it is not there, or has changed since, which is said.

    Args:
        folder: may be missing.
        expected: which factors of the start are there, and what the others are.
        record: what decides it now.

    Raises:
        InputError: it was made of something else.
    """
    if not folder.exists():
        return None
    try:
        written = unsealed(json.loads((folder / RECORD_FILE).read_bytes()))
        names = written["adapters"].keys() & {START, FOLDED}
        parts = {name: read_folder(folder / name, expected if name == START else WHOLE) for name in sorted(names)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        log.warning("%s: is not what was written (%s): made anew", folder, error)
        return None
    if written["adapters"] != {name: part.sha256 for name, part in parts.items()}:
        log.warning("%s: has changed since it was written: made anew", folder)
        return None
    for name, value in as_json(dict(record)).items():
        if written.get(name) != value:
            raise InputError(
                f"{folder}: was made with another {IN_WORDS.get(name, name)}; start anew with another"
                " --federation.run_dir, or set it back"
            )
    return Handed(parts.get(START), parts.get(FOLDED))
