"""What a run folder holds, read back for comparison."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from references import contents

DOMAINS = ["cartoon", "painting", "photo", "sketch"]
SCALED = ["--federation.poison.domain=photo", "--federation.poison.kind=scale"]


def times(folder: Path, pattern: str) -> dict[str, int]:
    """When files that match were written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob(pattern)}


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a run is for."""
    return {
        name: content
        for part in ("uploads/**/*", "merged/**/*", "results.*")
        for name, content in contents(folder, part).items()
    }


def lines_of(folder: Path) -> list[dict[str, str]]:
    """The points of results.csv."""
    with (folder / "results.csv").open() as lines:
        return list(csv.DictReader(lines))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def model_of(row: dict[str, Any]) -> str:
    """What a row of the results is of, and under which condition."""
    return ", ".join(filter(None, [row["model"], row["condition"]]))


def stored(folder: Path, model: str, unseen: str) -> dict[str, Any]:
    """The latest result of a model on an unseen domain."""
    return [row for row in rows_of(folder) if (model_of(row), row["unseen"]) == (model, unseen)][-1]


def table(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy by model and unseen domain."""
    rows: dict[str, dict[str, float]] = {}
    for line in lines_of(folder):
        rows.setdefault(model_of(line), {})[line["unseen"]] = float(line["accuracy"])
    return rows


def shown_rows(folder: Path) -> dict[str, list[str]]:
    """Cells of the table of the last command, without the differences."""
    lines = [line.strip("| \n").split(" | ") for line in (folder / "table.md").read_text().splitlines()[2:]]
    return {label: [cell.strip("*") for cell in cells[:-3]] for label, *cells in lines}


def bytes_of_pruned(folder: Path) -> dict[str, str]:
    """What each upload would take had its client pruned it."""
    with (folder / "clients.csv").open() as lines:
        return {row["name"]: row["sparse_bytes"] for row in csv.DictReader(lines)}
