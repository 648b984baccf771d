"""The report of a run: one HTML file that needs no network, and its figures for documents and TensorBoard."""

from __future__ import annotations

import base64
import io
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sap_lightning.adapter import Adapter
from sap_lightning.figures import (
    anchor_loss_figure,
    conflict_figure,
    confusion_figure,
    gallery_figure,
    overlap_figure,
    projection_figure,
    share_kept,
    shares_figures,
    sparsity_figure,
)
from sap_lightning.files import as_json, write_bytes, write_text
from sap_lightning.functional.agreement import overlap, sign_conflict
from sap_lightning.functional.lora import dense
from sap_lightning.functional.outliers import OUTLIER
from sap_lightning.functional.statistics import Interval
from sap_lightning.functional.traffic import fedavg_bytes, one_shot_bytes
from sap_lightning.merging.method import PruningMethod, client_layers
from sap_lightning.results import (
    AVERAGE,
    CLIENT,
    ZERO_SHOT,
    Predictions,
    Results,
    Spread,
    TableRow,
    best_cells,
    interval_text,
    left_out,
    markdown_table,
)
from sap_lightning.run_folder import config_file

REPORT_FILE = "report.html"
TABLE_FILE = "table.md"
FIGURES_FOLDER = "figures"
FEDAVG_ROUNDS = (10, 100)
BITMAPS = ("projection",)
"""Figures of so many marks that the report embeds them as PNG."""
_DPI = 200
_THUMBNAIL = 224
_LONGEST_NAME = 100


class Projection(NamedTuple):
    """Features of the same n images in a plane.

    Attributes:
        before: those of the base, shape (n, 2).
        after: those of the merged model, shape (n, 2).
        domains: of each image.
        classes: of each image.
    """

    before: Tensor
    after: Tensor
    domains: list[str]
    classes: list[str]


class Client(NamedTuple):
    """One row of the table of clients.

    Attributes:
        name: its domain.
        upload_bytes: of the adapter that it sent.
        sparse_bytes: of the adapter had the client pruned it; None where the merge prunes nothing of it.
        anchor_loss: mean loss of the base with this adapter on the anchors; not finite if the adapter breaks the base.
        z_score: robust z-score of the anchor loss among the clients.
        poison: what was done to it on purpose; empty if it is honest.
    """

    name: str
    upload_bytes: int
    sparse_bytes: int | None
    anchor_loss: float
    z_score: float
    poison: str


class Picture(NamedTuple):
    """One image of the gallery.

    Attributes:
        pixels: shape (3, H, W), uint8.
        unseen: its domain.
        truth: its class.
        before: the class that zero-shot gave it.
        after: the class that the merged model gave it.
    """

    pixels: Tensor
    unseen: str
    truth: str
    before: str
    after: str


@dataclass
class Evidence:
    """What the report shows beside the results; of one merge and one seed.

    Attributes:
        merged: the label of the merge that it is about, such as "sap ρ=0.8".
        clients: in the order of the table.
        share_kept: client → layer → share of the parameters that pruning kept; empty where nothing is pruned.
        overlap: Jaccard index of two clients' masks, shape (K, K), in the order of share_kept.
        conflict: layer → sign conflict of the clients' updates before and after pruning.
        projection: image features of the base and of the merge, if there are any.
        unseen_in_projection: the domain that no client of the merge has seen.
        confusion: unseen domain → images by true and predicted class (C, C), of zero-shot and of the merge.
        class_names: of the C classes.
        fixed: images that zero-shot got wrong and the merge right.
        broken: the other way round.
    """

    merged: str
    clients: list[Client]
    share_kept: dict[str, dict[str, float]]
    overlap: Tensor
    conflict: dict[str, tuple[float, float]]
    projection: Projection | None
    unseen_in_projection: str
    confusion: dict[str, tuple[Tensor, Tensor]]
    class_names: list[str]
    fixed: list[Picture]
    broken: list[Picture]


MaskEvidence = tuple[dict[str, dict[str, float]], Tensor, dict[str, tuple[float, float]]]
NO_MASKS: MaskEvidence = {}, torch.empty(0, 0), {}


def evidence_of_masks(method: PruningMethod, adapters: Sequence[Adapter], sparsity: float) -> MaskEvidence:
    """Share kept, mask overlap and sign conflict as Evidence has them, of a method that is prepared.

    The masks of all clients are in memory together, a byte for each parameter; their updates one layer at a time.
    """
    masks = [method.kept(adapter, sparsity) for adapter in adapters]
    shares = {adapter.name: share_kept(kept) for adapter, kept in zip(adapters, masks, strict=True)}
    matrix = torch.tensor([[overlap(one, other) for other in masks] for one in masks], dtype=torch.float64)
    conflict = {}
    for name in client_layers(adapters):
        whole, pruned = [], []
        for adapter, kept in zip(adapters, masks, strict=True):
            for space in method.spaces(adapter, [name]).values():
                whole.append(adapter.layers[name].delta())
                left = tuple(theta * mask for theta, mask in zip(space.parameters, kept[name], strict=True))
                pruned.append(dense(space.update(left)))
        conflict[name] = sign_conflict(whole), sign_conflict(pruned)
    return shares, matrix, conflict


def gallery(
    before: Predictions, after: Predictions, images: np.ndarray, class_names: Sequence[str], unseen: str, limit: int
) -> tuple[list[Picture], list[Picture]]:
    """The images that a merge fixed and those that it broke, those first of which it is surest.

    Args:
        before: zero-shot's predictions on the unseen domain.
        after: the merged model's, of the same images.
        images: the domain's, uint8 (N, 3, H, W).
        class_names: in label order.
        unseen: the domain.
        limit: the most pictures of either kind.

    Raises:
        ValueError: the predictions are of different images.
    """
    before, after = _in_order(before), _in_order(after)
    if not torch.equal(before.images, after.images):
        raise ValueError(f"predictions of different images of {unseen}: {len(before.images)} and {len(after.images)}")
    confidence = after.probabilities.max(1).values

    def pictures(chosen: Tensor) -> list[Picture]:
        surest = chosen.nonzero().flatten()
        surest = surest[confidence[surest].argsort(descending=True, stable=True)][:limit]
        return [
            Picture(
                torch.from_numpy(np.array(images[int(after.images[i])])),
                unseen,
                *(class_names[int(of[i])] for of in (after.labels, before.predicted, after.predicted)),
            )
            for i in surest
        ]

    return pictures(~before.correct & after.correct), pictures(before.correct & ~after.correct)


def _in_order(predictions: Predictions) -> Predictions:
    order = predictions.images.argsort(stable=True)
    return Predictions(*(tensor[order] for tensor in predictions))


def draw(results: Results, rows: Sequence[TableRow], evidence: Evidence | None) -> dict[str, Figure]:
    """All figures that there is data for, by name; a name with a / is one of several of a kind."""
    figures: dict[str, Figure] = {}
    curves, references = accuracy_curves(results, rows)
    if any(len(curve) > 1 for curve in curves.values()):
        figures["accuracy_by_sparsity"] = sparsity_figure(curves, references)
    return figures | (_draw_evidence(evidence) if evidence else {})


def _draw_evidence(evidence: Evidence) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if evidence.clients:
        losses = {client.name: client.anchor_loss for client in evidence.clients}
        figures["anchor_loss"] = anchor_loss_figure(losses, {c.name: c.z_score for c in evidence.clients})
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
        elif of[0].model in (ZERO_SHOT, AVERAGE):
            references[row.label] = row.mean
    return curves, references


def log_figures(boards: Iterable[Any], figures: Mapping[str, Figure]) -> None:
    """Adds figures to TensorBoard writers."""
    for board in boards:
        for name, figure in figures.items():
            board.add_figure(name, figure, close=False)


def write_report(
    folder: Path,
    results: Results,
    rows: Sequence[TableRow],
    unseen: Sequence[str],
    evidence: Evidence | None,
    settings: Mapping[str, Any],
    boards: Iterable[Any] = (),
) -> Path:
    """Writes figures/<name>.png and .svg, table.md and report.html, each whole or not at all.

    Holds no time of day: the same run gives the same bytes.

    Args:
        folder: of the run, which gives the report its title.
        results: what the table is made of.
        rows: the table.
        unseen: its columns.
        evidence: what is shown beside the table; without it the report is the table and accuracy against sparsity.
        settings: the run's.
        boards: TensorBoard writers that get the figures too.

    Returns:
        The report's path.
    """
    figures = draw(results, rows, evidence)
    log_figures(boards, figures)
    embedded = _write_figures(folder / FIGURES_FOLDER, figures)
    write_text(folder / TABLE_FILE, markdown_table(rows, unseen))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _thumbnail
    environment.filters["bytes"] = bytes_text
    page = environment.get_template("report.html.j2").render(
        title=folder.name,
        summary=summary(results, rows),
        unseen=list(unseen),
        table=_html_rows(rows),
        clients=any(row.label.startswith(CLIENT) for row in rows),
        left_out=left_out(results),
        seeds=sorted({row.seed for row in results.rows}),
        figures=embedded,
        evidence=evidence,
        pruned=any(client.sparse_bytes is not None for client in evidence.clients) if evidence else False,
        traffic=_traffic(evidence.clients) if evidence else [],
        anchors=anchor_sentences(evidence.clients) if evidence and evidence.clients else [],
        chance=_chance(results, evidence),
        outlier=OUTLIER,
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
    folder.mkdir(parents=True, exist_ok=True)
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


def summary(results: Results, rows: Sequence[TableRow]) -> list[str]:
    """What the table says, in sentences: which model is best, and how sure its lead is.

    Only models that were measured on every unseen domain count, so no single client does.
    """
    models = {row.label: of[0].model for row in rows if (of := results.of(row.label))}
    whole = [row for row in rows if None not in row.cells and not models.get(row.label, CLIENT).startswith(CLIENT)]
    merges = [row for row in whole if models[row.label] not in (ZERO_SHOT, AVERAGE)]
    if not whole:
        return []
    best = max(whole, key=lambda row: row.mean.mean)
    domains = len(best.cells)
    over = f"over the {domains} unseen domains" if domains > 1 else "on the unseen domain"
    said = [
        f"{best.label} is the most accurate model {over}: {best.mean} top-1 accuracy{' on average' * (domains > 1)}."
    ]
    candidate = best if best in merges or not merges else max(merges, key=lambda row: row.mean.mean)
    if candidate is not best:
        said.append(f"No merge does better; of them {candidate.label} comes nearest with {candidate.mean}.")
    leads = [
        _lead(interval, reference)
        for interval, reference in (
            (candidate.over_average, "the plain average"),
            (candidate.over_zero_shot, ZERO_SHOT),
        )
        if interval is not None
    ]
    if leads:
        said.append(f"{'It' if candidate is best else candidate.label} is {' and '.join(leads)}.")
    if candidate in merges and len(merges) > 1:
        said.append(
            f"It was picked from {len(merges)} merges by its accuracy on these very images, which flatters it a little."
        )
    return [sentence.replace(" ± ", "\u00a0±\u00a0") for sentence in said]


def _lead(interval: Interval, reference: str) -> str:
    points, low, high = (100 * value for value in interval)
    signed, where = (
        text.replace("-", "−") for text in (f"{points:+.1f}", f"(95 % interval {low:+.1f} to {high:+.1f})")
    )
    if low > 0:
        return f"{points:.1f} points ahead of {reference} {where}"
    if high < 0:
        return f"{-points:.1f} points behind {reference} {where}"
    return f"level with {reference} as far as these images can tell, {signed} points {where}"


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
            [_parts(cell, top) for cell, top in zip([*row.cells, row.mean], best, strict=True)],
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


def bytes_text(count: int) -> str:
    """A number of bytes in decimal units, such as 1.18 MB."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {' kMGT'[power]}B"


def anchor_sentences(clients: Sequence[Client]) -> list[str]:
    """Which clients the anchors single out, and whether those are the poisoned ones."""
    if len(clients) < 3:
        return ["Of fewer than three clients none can be called the odd one."]
    flagged = {client.name for client in clients if client.z_score > OUTLIER}
    poisoned = {client.name for client in clients if client.poison}
    said = [f"The anchors single out {_listed(flagged)}." if flagged else "The anchors single out no client."]
    if poisoned:
        found, blamed = poisoned & flagged, flagged - poisoned
        said.append(f"Poisoned on purpose: {_listed(poisoned)}; found: {len(found)} of {len(poisoned)}.")
        said.append(f"Honest clients singled out wrongly: {_listed(blamed) if blamed else 'none'}.")
    elif flagged:
        said.append("No client was poisoned on purpose, so a false alarm or a domain that is unlike the others.")
    return said


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


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
