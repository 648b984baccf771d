"""The report of a run: one HTML file that needs no network, and its figures for documents and TensorBoard."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sap_lightning.federation.run_folder import config_file
from sap_lightning.files import as_json, write_bytes, write_text
from sap_lightning.functional.statistics import Spread
from sap_lightning.functional.traffic import fedavg_bytes, one_shot_bytes
from sap_lightning.reporting.evidence import Client, Evidence
from sap_lightning.reporting.sentences import anchor_sentences, summary
from sap_lightning.reporting.table import (
    PERSONAL_COLUMN,
    TableRow,
    best_cells,
    bytes_text,
    cells_of,
    has_personal,
    interval_text,
    left_out,
)
from sap_lightning.results import Results

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
FEDAVG_ROUNDS = (10, 100)
BITMAPS = ("projection",)
"""Figures of so many marks that the report embeds them as PNG."""
_DPI = 200
_THUMBNAIL = 224
_LONGEST_NAME = 100


def write_report(
    folder: Path,
    results: Results,
    rows: Sequence[TableRow],
    unseen: Sequence[str],
    figures: Mapping[str, Figure],
    evidence: Evidence | None,
    settings: Mapping[str, Any],
) -> Path:
    """Writes figures/<name>.png and .svg and report.html, each whole or not at all.

    Holds no time of day: the same run gives the same bytes.

    Args:
        folder: of the run, which gives the report its title.
        results: what the table is made of.
        rows: the table.
        unseen: its columns.
        figures: by name, see ``draw``.
        evidence: what is shown beside the table; without it the report is the table and its figures.
        settings: the run's.

    Returns:
        The report's path.
    """
    embedded = _write_figures(folder / FIGURES_FOLDER, figures)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _thumbnail
    environment.filters["bytes"] = bytes_text
    page = environment.get_template("page.html.j2").render(
        title=folder.name,
        summary=summary(rows),
        unseen=list(unseen),
        table=_html_rows(rows),
        personal=PERSONAL_COLUMN if has_personal(rows) else "",
        clients=any(row.kind == "client" for row in rows),
        left_out=left_out(results),
        wire=_wire(rows),
        seeds=sorted({row.seed for row in results.rows}),
        figures=embedded,
        evidence=evidence,
        pruned=any(client.sparse_bytes is not None for client in evidence.clients) if evidence else False,
        traffic=_traffic(evidence.clients) if evidence else [],
        anchors=anchor_sentences(evidence.clients) if evidence and evidence.clients else [],
        chance=_chance(results, evidence),
        provenance=_provenance(results),
        settings=yaml.safe_dump(as_json(dict(settings)), allow_unicode=True) if settings else "",
        command=_command(folder, settings),
    )
    path = folder / REPORT_FILE
    write_text(path, page)
    return path


class _Embedded(NamedTuple):
    """A figure in the page: its kind (the name before the first /), data URI and text alternative."""

    kind: str
    src: str
    alt: str


def _write_figures(folder: Path, figures: Mapping[str, Figure]) -> list[_Embedded]:
    for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        old.unlink()  # of a run that had other clients or domains
    embedded = []
    for (name, figure), file_name in zip(figures.items(), file_names(figures), strict=True):
        # The salt makes the ids of an SVG the same in every process.
        with matplotlib.rc_context({"svg.hashsalt": "sap_lightning"}):
            svg, png = _saved(figure, "svg", {"Date": None}), _saved(figure, "png", {"Software": None})
        write_bytes(folder / f"{file_name}.svg", svg)
        write_bytes(folder / f"{file_name}.png", png)
        kind = name.split("/")[0]
        src = data_uri("image/png", png) if kind in BITMAPS else data_uri("image/svg+xml", svg)
        embedded.append(_Embedded(kind, src, str(figure.get_label())))
    return embedded


def _saved(figure: Figure, form: str, metadata: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=_DPI, metadata=metadata)
    return content.getvalue()


def file_names(names: Iterable[str]) -> list[str]:
    """A plain and different file name, without suffix, for each name, whatever characters it has."""
    taken: dict[str, None] = {}
    for name in names:
        plain = re.sub(r"[^\w-]+", "_", name).strip("_")[:_LONGEST_NAME]
        number, free = 1, plain
        while free.lower() in taken:
            number += 1
            free = f"{plain}_{number}"
        taken[free.lower()] = None
    return list(taken)


def data_uri(media_type: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _thumbnail(pixels: Tensor) -> str:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return data_uri("image/jpeg", content.getvalue())


class _Row(NamedTuple):
    label: str
    cells: list[tuple[str, str, bool]]
    ece: str
    differences: list[str]


def _html_rows(rows: Sequence[TableRow]) -> list[_Row]:
    """Each cell as value, spread and whether it is the best of its column."""
    best = best_cells(rows)
    return [
        _Row(
            row.label,
            [_parts(cell, top) for cell, top in zip(cells_of(row, rows), best, strict=True)],
            f"{row.ece:.3f}",
            [interval_text(value).replace("-", "−") for value in (row.over_average, row.over_zero_shot)],
        )
        for row in rows
    ]


def _parts(cell: Spread | None, best: float) -> tuple[str, str, bool]:
    if cell is None:
        return "–", "", False
    mean, _, std = str(cell).partition(" ± ")
    return mean, std, round(cell.mean, 3) == best


def _traffic(clients: Sequence[Client]) -> list[tuple[str, int, float]]:
    """Ways to federate, what each sends and that as a multiple of one shot."""
    uploads = [client.upload_bytes for client in clients]
    pruned = [client.sparse_bytes for client in clients if client.sparse_bytes is not None]
    once = one_shot_bytes(uploads)
    ways = {"one shot": once}
    if len(pruned) == len(uploads):
        ways["one shot, pruned by the clients"] = one_shot_bytes(pruned)
    ways |= {f"FedAvg, {rounds} rounds": fedavg_bytes(uploads, rounds) for rounds in FEDAVG_ROUNDS}
    return [(way, sent, sent / once) for way, sent in ways.items() if once]


def _wire(rows: Sequence[TableRow]) -> list[tuple[str, int, int, float, str]]:
    """Of every merge its rounds, bytes, these as a multiple of the least, and accuracy; nothing where all had one."""
    merges = [row for row in rows if row.kind == "merge" and row.bytes and None not in row.cells]
    if all(row.rounds == 1 for row in merges):
        return []
    least = min(row.bytes for row in merges if row.bytes)
    return [(row.label, row.rounds, round(row.bytes), row.bytes / least, str(row.mean)) for row in merges if row.bytes]


def _chance(results: Results, evidence: Evidence | None) -> float | None:
    """Expected Jaccard index of two random masks that keep the share 1 − ρ = p: p² / (2p − p²)."""
    sparsity = next((row.sparsity for row in results.of(evidence.merged)), None) if evidence else None
    return None if sparsity is None else (1 - sparsity) / (1 + sparsity)


def _provenance(results: Results) -> dict[str, list[str]]:
    """What the rows were made with; more than one value where they differ."""
    names = {"config": "settings, hash", "commit": "git commit", "versions": "packages"}
    values = {label: {row.provenance.get(name, "") for row in results.rows} - {""} for name, label in names.items()}
    return {label: sorted(found) for label, found in values.items() if found}


def _command(folder: Path, settings: Mapping[str, Any]) -> str:
    """What repeats the run; empty when the folder holds no settings, as one that Python code filled."""
    command, file = ("sweep", "sweep.yaml") if "sweep" in settings else ("fit", config_file(settings))
    if not (folder / file).is_file():
        return ""
    config, again = shlex.quote(str(folder / file)), shlex.quote(f"{folder}_again")
    return f"python -m sap_lightning {command} --config {config} --federation.run_dir {again}"
