"""Every measured point of a run, on disk as soon as it is known, and the table made of them."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.files import as_json, write_csv, write_json
from sap_lightning.functional.statistics import Interval, bootstrap_difference, mean_and_std

ZERO_SHOT = "zero-shot"
AVERAGE = "average"
CLIENT = "client "
BEST_CLIENT = "best client"
CSV_METRICS = ("accuracy", "macro_accuracy", "ece")


class Cell(NamedTuple):
    """A place in the table, of one seed."""

    label: str
    unseen: str
    seed: int


@dataclass(frozen=True)
class Result:
    """One model measured on one unseen domain.

    Attributes:
        model: zero-shot, client <domain>, or what the merge is called.
        unseen: the domain it was measured on.
        measurement: digest of all that the metrics depend on.
        sparsity: ρ; None where nothing is pruned.
        swept: whether the merge was measured at several sparsities, each a row of its own.
        seed: of the clients' training.
        condition: that the merge was done under, such as a poisoned client.
        variant: the settings that a sweep changed for this point, by name.
        metrics: accuracy, macro_accuracy, ece and accuracy/<class>, as shares of 1.
        settings: those of the merge.
        sources: hashes of the adapters it was made from.
        rejected: names of clients that the server left out.
        provenance: config hash, git commit and package versions.
    """

    model: str
    unseen: str
    measurement: str
    sparsity: float | None = None
    swept: bool = False
    seed: int = 0
    condition: str = ""
    variant: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """Its place in the table: row, column and seed."""
        return Cell(self.label, self.unseen, self.seed)

    @property
    def key(self) -> tuple[Cell, str]:
        """What no two results share: one cell can have been measured with several settings."""
        return self.cell, self.measurement

    @property
    def label(self) -> str:
        """The row of the table that it belongs to."""
        sparsity = f" ρ={self.sparsity:g}" if self.swept else ""
        condition = f", {self.condition}" if self.condition else ""
        return f"{self.model}{sparsity}{condition}{self.variant_label}"

    @property
    def variant_label(self) -> str:
        """What a sweep changed, as the end of a label."""
        return "".join(f", {name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in self.variant.items())


class Predictions(NamedTuple):
    """What a model said of the images of a domain.

    Attributes:
        probabilities: of each class, shape (n, classes), float32.
        labels: the true classes, shape (n,).
        images: positions of the images in the domain, shape (n,).
    """

    probabilities: Tensor
    labels: Tensor
    images: Tensor

    @property
    def predicted(self) -> Tensor:
        """The class of highest probability, shape (n,)."""
        return self.probabilities.argmax(1)

    @property
    def correct(self) -> Tensor:
        """Whether each image was classified right, shape (n,), bool."""
        return self.predicted == self.labels


class Results:
    """The points of a run folder: results.json, results.csv (a line for each point) and predictions/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.json = folder / "results.json"
        self.csv = folder / "results.csv"
        self.rows = _read(self.json) if self.json.is_file() else []

    def has(self, point: Result) -> bool:
        """Whether this very point is known."""
        return any(row.key == point.key for row in self._of_measurement(point.measurement))

    def measured(self, measurement: str) -> Result | None:
        """A result of the same model on the same images, whatever it was called there."""
        return next(iter(self._of_measurement(measurement)), None)

    def _of_measurement(self, measurement: str) -> list[Result]:
        if not self._predictions_file(measurement).is_file():
            return []
        return [row for row in self.rows if row.measurement == measurement]

    def only(self, points: Iterable[Result]) -> Results:
        """What is known of these points alone, in this order, to be tabulated; what is on disk stays as it is."""
        known = {row.key: row for row in self.rows}
        part = copy.copy(self)
        part.rows = [known[point.key] for point in points]
        return part

    def add(self, result: Result) -> None:
        """Takes the place of an earlier result of the very point, and writes."""
        self.rows = [row for row in self.rows if row.key != result.key] + [result]
        self.write()

    @rank_zero_only
    def write(self) -> None:
        """Writes results.json and results.csv, each in one step."""
        write_json(self.json, as_json([asdict(row) for row in self.rows]))
        head = [
            "row",
            "model",
            "sparsity",
            "unseen",
            "seed",
            "condition",
            "variant",
            *CSV_METRICS,
            "rejected",
            "settings",
            "sources",
        ]
        write_csv(self.csv, [[*head, "measurement", "config", "commit", "versions"], *map(_csv_row, self.rows)])

    @property
    def labels(self) -> list[str]:
        """The table's rows: zero-shot, clients, then merges in the order of measurement."""
        clients = sorted((row for row in self.rows if row.model.startswith(CLIENT)), key=lambda row: row.model)
        first = [row for row in self.rows if row.model == ZERO_SHOT] + clients
        return list(dict.fromkeys(row.label for row in [*first, *self.rows]))

    def of(self, label: str) -> list[Result]:
        """The results of a row of the table."""
        return [row for row in self.rows if row.label == label]

    def predictions(self, result: Result) -> Predictions:
        """What the measured model said of every image."""
        return Predictions(**load_file(self._predictions_file(result.measurement)))

    @rank_zero_only
    def keep_predictions(self, measurement: str, predictions: Predictions) -> None:
        """Stores what a model said of every image, before its result is added."""
        file = self._predictions_file(measurement)
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in predictions._asdict().items()}, staging)
        staging.replace(file)

    def _predictions_file(self, measurement: str) -> Path:
        return self.folder / "predictions" / f"{measurement}.safetensors"


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds, and their number."""

    mean: float
    std: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.std:.3f}" if self.seeds > 1 else "")


class TableRow(NamedTuple):
    """A row of the table.

    Attributes:
        label: what it is called.
        cells: top-1 accuracy on each unseen domain; None where the model has none.
        mean: over the unseen domains, its spread over seeds.
        ece: expected calibration error, mean over domains and seeds.
        over_average: paired difference to the plain average on the same images, with a 95 % bootstrap interval.
        over_zero_shot: the same to zero-shot.
    """

    label: str
    cells: list[Spread | None]
    mean: Spread
    ece: float
    over_average: Interval | None
    over_zero_shot: Interval | None


def tabulate(results: Results, unseen: Sequence[str]) -> list[TableRow]:
    """The table's rows in the order of the labels, best client after the clients.

    The best client is for each unseen domain the client that does best there: an upper bound on choosing one, since
    the choice takes labels of the unseen domain.
    """
    rows = [[row for row in results.of(label) if row.unseen in unseen] for label in results.labels]
    clients = [row for of in rows for row in of if row.model.startswith(CLIENT) and not row.condition]
    if clients:
        last = max(index for index, of in enumerate(rows) if of and of[0].model.startswith(CLIENT))
        rows[last + 1 : last + 1] = _best_clients(clients)
    every = [row for of in rows for row in of]
    return [_table_row(results, of, every, unseen) for of in rows if of]


def _best_clients(clients: Iterable[Result]) -> list[list[Result]]:
    best: dict[tuple[str, int, str], Result] = {}
    for row in clients:
        place = row.variant_label, row.seed, row.unseen
        best[place] = max(best.get(place, row), row, key=lambda one: one.metrics["accuracy"])
    by_label: dict[str, list[Result]] = defaultdict(list)
    for row in best.values():
        by_label[f"{BEST_CLIENT}{row.variant_label}"].append(replace(row, model=BEST_CLIENT))
    return list(by_label.values())


def _table_row(results: Results, row: list[Result], every: Sequence[Result], unseen: Sequence[str]) -> TableRow:
    by_seed: dict[int, list[float]] = defaultdict(list)
    for result in row:
        by_seed[result.seed].append(result.metrics["accuracy"])
    return TableRow(
        row[0].label,
        [_spread([r.metrics["accuracy"] for r in row if r.unseen == domain]) for domain in unseen],
        Spread(*mean_and_std([sum(values) / len(values) for values in by_seed.values()]), len(by_seed)),
        sum(result.metrics["ece"] for result in row) / len(row),
        difference(results, row, [r for r in every if r.model == AVERAGE and r.condition == row[0].condition]),
        difference(results, row, [r for r in every if r.model == ZERO_SHOT]),
    )


def difference(results: Results, row: Sequence[Result], reference: Sequence[Result]) -> Interval | None:
    """Accuracy of a row over that of a reference, on the images, seeds and variants that both have; None if none."""
    others = {(r.unseen, r.seed, r.variant_label): r for r in reference}
    pairs = [(r, others.get((r.unseen, r.seed, r.variant_label))) for r in row]
    by_domain: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for own, other in sorted(((o, t) for o, t in pairs if t is not None), key=lambda pair: pair[0].seed):
        correct = results.predictions(own).correct, results.predictions(other).correct
        by_domain[own.unseen].append(correct)
    if not by_domain or row[0].model == reference[0].model:
        return None
    stacked = [tuple(map(torch.stack, zip(*by_domain[name], strict=True))) for name in sorted(by_domain)]
    return bootstrap_difference([own for own, _ in stacked], [other for _, other in stacked])


def left_out(results: Results) -> list[str]:
    """Which clients the server left out of which merges, in sentences; none where none stood out."""
    cases = {
        (row.unseen, row.seed, f"{row.condition}{row.variant_label}", ", ".join(row.rejected))
        for row in results.rows
        if row.rejected
    }
    return [
        f"Left out of the merges for unseen {unseen}, seed {seed} ({condition}): {rejected}."
        for unseen, seed, condition, rejected in sorted(cases)
    ]


def rich_table(rows: Sequence[TableRow], unseen: Sequence[str]) -> Table:
    """The table for a terminal, the best of each column in bold; – where a client has seen the domain."""
    caption = "a client has no accuracy on its own domain, and its mean leaves it out"
    partial = any(None in row.cells for row in rows)
    table = Table("model", title="top-1 accuracy on unseen domains", caption=caption if partial else None)
    for domain in [*unseen, "mean"]:
        table.add_column(domain, justify="right")
    best = best_cells(rows)
    for row in rows:
        cells = zip([*row.cells, row.mean], best, strict=True)
        marked = (_marked(cell, top, "[bold]{}[/bold]").replace(" ± 0.", "±.") for cell, top in cells)
        table.add_row(row.label, *marked)
    return table


def markdown_table(rows: Sequence[TableRow], unseen: Sequence[str]) -> str:
    """The table for TensorBoard's text tab and for documents, with calibration and paired differences."""
    head = ["model", *unseen, "mean", "ECE", "over average [95 %]", "over zero-shot [95 %]"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    best = best_cells(rows)
    for row in rows:
        cells = [_marked(cell, top, "**{}**") for cell, top in zip([*row.cells, row.mean], best, strict=True)]
        differences = [interval_text(value) for value in (row.over_average, row.over_zero_shot)]
        lines.append([row.label, *cells, f"{row.ece:.3f}", *differences])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def best_cells(rows: Sequence[TableRow]) -> list[float]:
    """The highest value of each unseen domain, and of the means over all of them, as printed."""
    whole = [row.mean for row in rows if None not in row.cells]
    columns = [*zip(*(row.cells for row in rows), strict=True), whole]
    return [max((round(cell.mean, 3) for cell in column if cell), default=0.0) for column in columns]


def interval_text(interval: Interval | None) -> str:
    """A difference in points of accuracy with its interval, such as +1.2 [0.3, 2.1]."""
    if interval is None:
        return "–"
    return f"{100 * interval.difference:+.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(*mean_and_std(values), len(values)) if values else None


def _marked(cell: Spread | None, best: float, mark: str) -> str:
    if cell is None:
        return "–"
    return mark.format(cell) if round(cell.mean, 3) == best else str(cell)


def _read(file: Path) -> list[Result]:
    try:
        return [Result(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: not results of this version ({error}); use another --federation.run_dir") from error


def _csv_row(row: Result) -> list[object]:
    metrics = [f"{row.metrics[name]:.6f}" for name in CSV_METRICS]
    point = [row.label, row.model, "" if row.sparsity is None else row.sparsity, row.unseen, row.seed, row.condition]
    made = [";".join(row.rejected), _json(row.settings), ";".join(row.sources), row.measurement]
    return [
        *point,
        _json(row.variant),
        *metrics,
        *made,
        *(row.provenance.get(name, "") for name in ("config", "commit", "versions")),
    ]


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str) if values else ""


def _short(value: Any) -> str:
    """A setting in a label: lists without brackets, paths by their last part."""
    if isinstance(value, list):
        return "+".join(map(_short, value))
    if isinstance(value, str):
        return value.rstrip("/").rsplit("/", 1)[-1]
    return f"{value:g}" if isinstance(value, float) else str(value)
