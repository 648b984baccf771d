"""The report of a run that merges adapters: one HTML file, and its figures for documents and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from sap_lightning.functional.statistics import Spread
from sap_lightning.functional.traffic import fedavg_bytes, one_shot_bytes
from sap_lightning.reporting.evidence import Client, Evidence
from sap_lightning.reporting.html import provenance_of, write_page
from sap_lightning.reporting.sentences import anchor_sentences, summary
from sap_lightning.reporting.table import (
    PERSONAL_COLUMN,
    TableRow,
    best_cells,
    cells_of,
    has_personal,
    interval_text,
    left_out,
)
from sap_lightning.results import Results

FEDAVG_ROUNDS = (10, 100)


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
    return write_page(
        folder,
        "page.html.j2",
        figures,
        settings,
        summary=summary(rows),
        unseen=list(unseen),
        table=_html_rows(rows),
        personal=PERSONAL_COLUMN if has_personal(rows) else "",
        clients=any(row.kind == "client" for row in rows),
        left_out=left_out(results),
        wire=_wire(rows),
        seeds=sorted({row.seed for row in results.rows}),
        evidence=evidence,
        pruned=any(client.sparse_bytes is not None for client in evidence.clients) if evidence else False,
        traffic=_traffic(evidence.clients) if evidence else [],
        anchors=anchor_sentences(evidence.clients) if evidence and evidence.clients else [],
        chance=_chance(results, evidence),
        provenance=provenance_of(row.provenance for row in results.rows),
    )


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
