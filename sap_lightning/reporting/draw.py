"""All figures of a report, from its table and its evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from sap_lightning.figures import (
    conflict_figure,
    confusion_figure,
    drift_figure,
    gallery_figure,
    margin_figure,
    overlap_figure,
    projection_figure,
    rounds_figure,
    shares_figures,
    sparsity_figure,
)
from sap_lightning.functional.statistics import Spread
from sap_lightning.reporting.evidence import Evidence
from sap_lightning.reporting.table import TableRow
from sap_lightning.results import AVERAGE, ZERO_SHOT, Results

ROUNDS = "federation.rounds"


def draw(results: Results, rows: Sequence[TableRow], evidence: Evidence | None) -> dict[str, Figure]:
    """All figures that there is data for, by name; a name with a / is one of several of a kind."""
    figures: dict[str, Figure] = {}
    curves, references = accuracy_curves(results, rows)
    if any(len(curve) > 1 for curve in curves.values()):
        figures["accuracy_by_sparsity"] = sparsity_figure(curves, references)
    figures |= _draw_rounds(results, rows)
    figures |= _draw_evidence(evidence) if evidence else {}
    for figure in figures.values():  # laid out once, not anew for each of its formats
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figures


def _draw_rounds(results: Results, rows: Sequence[TableRow]) -> dict[str, Figure]:
    curves = rounds_curves(results, rows)
    if not any(len(curve) > 1 for curve in curves.values()):
        return {}
    zero_shot = dict([(ZERO_SHOT, row.mean) for row in rows if row.kind == "zero-shot"][:1])
    by_rounds = {name: [(row.rounds, row.rounds, row.mean) for row in curve] for name, curve in curves.items()}
    figures = {"accuracy_by_rounds": rounds_figure(by_rounds, zero_shot, "rounds")}
    if all(row.bytes is not None for curve in curves.values() for row in curve):
        by_bytes = {name: [(row.bytes or 0, row.rounds, row.mean) for row in curve] for name, curve in curves.items()}
        figures["accuracy_by_bytes"] = rounds_figure(by_bytes, zero_shot, "B")
    return figures


def _draw_evidence(evidence: Evidence) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if evidence.clients:
        margins = {client.name: client.margin for client in evidence.clients}
        figures["caption_margin"] = margin_figure(margins, {one.name for one in evidence.clients if one.stands_out})
    if evidence.drift:
        figures["tower_drift"] = drift_figure(evidence.drift)
    for client, figure in shares_figures(evidence.share_kept).items():
        figures[f"share_kept/{client}"] = figure
    if len(evidence.share_kept) > 1:
        figures["mask_overlap"] = overlap_figure(list(evidence.share_kept), evidence.overlap)
    if evidence.conflict:
        figures["sign_conflict"] = conflict_figure(evidence.conflict)
    if evidence.projection:
        before, after, domains, classes = evidence.projection
        for points, title in ((before, f"before merging: {ZERO_SHOT}"), (after, f"after merging: {evidence.merged}")):
            figure = projection_figure(points, domains, classes, evidence.unseen_in_projection, title)
            figures[f"projection/{title.split()[0]}"] = figure
    for domain, both in evidence.confusion.items():
        for counts, model in zip(both, (ZERO_SHOT, evidence.merged), strict=True):
            which = "before" if model == ZERO_SHOT else "after"
            figures[f"confusion/{domain}/{which}"] = confusion_figure(
                counts, evidence.class_names, f"{domain}: {model}"
            )
    for which, pictures in (("fixed", evidence.fixed), ("broken", evidence.broken)):
        if pictures:
            texts = [f"{p.truth}\n{p.before} → {p.after}" for p in pictures]
            shown = [(picture.pixels, text) for picture, text in zip(pictures, texts, strict=True)]
            figures[f"gallery/{which}"] = gallery_figure(shown, f"{which} by the merge (zero-shot → {evidence.merged})")
    return figures


def accuracy_curves(
    results: Results, rows: Iterable[TableRow]
) -> tuple[dict[str, list[tuple[float, Spread]]], dict[str, Spread]]:
    """Of the table, each pruning method's mean accuracy by ρ, and that of zero-shot and of the average."""
    curves: dict[str, list[tuple[float, Spread]]] = {}
    references: dict[str, Spread] = {}
    for row in rows:
        of = results.of(row.label)  # of the best client there are none
        if None in row.cells or len({result.sparsity for result in of}) != 1:
            continue  # other domains are no comparison, and a method that chooses ρ itself has no place on the axis
        if of[0].sparsity is not None:
            curves.setdefault(replace(of[0], swept=False).label, []).append((of[0].sparsity, row.mean))
        elif row.kind == "zero-shot" or row.model == AVERAGE:
            references[row.label] = row.mean
    return curves, references


def rounds_curves(results: Results, rows: Iterable[TableRow]) -> dict[str, list[TableRow]]:
    """Of the table, the rows of each merge that differ in the number of rounds alone, by what else it is called."""
    curves: dict[str, list[TableRow]] = {}
    for row in rows:
        if row.kind == "merge" and None not in row.cells:
            (first, *_) = results.of(row.label)
            others = {name: value for name, value in first.variant.items() if name != ROUNDS}
            curves.setdefault(replace(first, variant=others).label, []).append(row)
    return curves
