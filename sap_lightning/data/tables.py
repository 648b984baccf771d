"""Images in the table of a Hugging Face dataset, saved, in parquet files or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
import pyarrow.compute as pc

from sap_lightning.data.images import Picture, read_encoded
from sap_lightning.errors import InputError, first_line
from sap_lightning.fingerprints import digest, file_fingerprint


def is_table(folder: Path) -> bool:
    """Whether a folder holds a saved dataset or parquet files."""
    return _is_saved(folder) or bool(_parquet_files(folder))


def load_table(root: str, rows: int | None = None) -> datasets.Dataset:
    """All splits of a dataset in a folder or on the hub, one after the other.

    Args:
        root: the folder, or id on the hub.
        rows: of a dataset on the hub, fetch no more than these first rows.

    Raises:
        InputError: no such dataset, or not readable.
    """
    folder = Path(root).expanduser()
    try:
        if _is_saved(folder):
            loaded = datasets.load_from_disk(folder)
        elif files := _parquet_files(folder):
            # Named by the files' stats: the library's own cache looks at their mtime only.
            loaded = datasets.load_dataset("parquet", file_fingerprint(files), data_files=files)
        elif rows is not None:
            loaded = first_rows(next(iter(datasets.load_dataset(root, streaming=True).values())), rows)
        else:
            loaded = datasets.load_dataset(root)
        if isinstance(loaded, datasets.DatasetDict):
            return datasets.concatenate_datasets(list(loaded.values()))
        return loaded
    except Exception as error:  # the library raises its own, pyarrow's, the hub client's and the file system's
        there = "this is no folder" if folder.exists() else f"there is no {folder.absolute()}"
        here = "" if folder.is_dir() else f" ({there})"
        raise InputError(
            f"{root}: neither a folder of images{here} nor a readable dataset: {first_line(error)}"
        ) from error


def first_rows(stream: datasets.IterableDataset, rows: int) -> datasets.Dataset:
    """The first rows of a stream as a table, images still encoded."""
    return datasets.Dataset.from_list(list(stream.decode(False).take(rows)), features=stream.features)


def image_column(table: datasets.Dataset, root: str) -> str:
    """The name of the table's first image column.

    Raises:
        InputError: it has none.
    """
    for name, feature in table.features.items():
        untagged = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
        if isinstance(feature, datasets.Image) or untagged:
            return name
    raise InputError(f"{root}: no image column among {', '.join(table.column_names)}")


def table_pictures(table: datasets.Dataset, column: str, rows: Sequence[int]) -> list[Picture]:
    """The pictures of some rows, still encoded."""
    encoded = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    return [Picture(f"row {row}", partial(_read_cell, encoded, column, row)) for row in rows]


def table_fingerprint(table: datasets.Dataset, column: str) -> str:
    """A digest of the table, of the files it is kept in, and of image files that it only points to."""
    cells = table.select_columns(column).with_format("arrow")[:][column]
    outside = pc.struct_field(cells, "path").filter(pc.is_null(pc.struct_field(cells, "bytes")))
    files = [cache["filename"] for cache in table.cache_files]
    return digest(table._fingerprint, file_fingerprint(files), file_fingerprint(outside.drop_null().to_pylist()))


def _read_cell(table: datasets.Dataset, column: str, row: int) -> bytes:
    cell = table[row][column] or {"bytes": b""}
    return read_encoded(Path(cell["path"])) if cell["bytes"] is None else cell["bytes"]


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _parquet_files(folder: Path) -> list[str]:
    return sorted(str(file) for pattern in ("*.parquet", "*/*.parquet") for file in folder.glob(pattern))
