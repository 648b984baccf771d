"""The table of a run: a row for each model, its accuracy on every unseen domain, and how sure its lead is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from sap_lightning.escapes import for_markdown, for_terminal
from sap_lightning.functional.statistics import Interval, Spread, bootstrap_difference, mean_and_std
from sap_lightning.results import AVERAGE, PERSONAL, Kind, Result, Results

PERSONAL_COLUMN = "personal"
MANY = 12
"""With more merge methods than that a table is a ranking."""


class TableRow(NamedTuple):
    """A row of the table.

    Attributes:
        label: what it is called.
        kind: of the model in it; the best client is a client.
        model: what the model is called.
        cells: top-1 accuracy on each unseen domain; None where the model has none.
        mean: over the unseen domains, its spread over seeds.
        personal: of prompts, accuracy on what the clients held back of their own domains, mean over the unseen domains
            and its spread over seeds.
        ece: expected calibration error, mean over domains and seeds.
        over_average: paired difference to the plain average on the same images, with a 95 % bootstrap interval.
        over_zero_shot: the same to zero-shot.
        rounds: how often the clients have trained and uploaded.
        bytes: what has crossed the wire, up and down, mean over unseen domains and seeds; None where it is not known.
    """

    label: str
    kind: Kind
    model: str
    cells: list[Spread | None]
    mean: Spread
    personal: Spread | None
    ece: float
    over_average: Interval | None
    over_zero_shot: Interval | None
    rounds: int
    bytes: float | None


def tabulate(results: Results, unseen: Sequence[str]) -> list[TableRow]:
    """The table's rows in the order of the labels, best client after the clients; many methods by their means.

    The best client is for each unseen domain the client that does best there, of those that sent the same kind of
    thing: an upper bound on choosing one, since the choice takes labels of the unseen domain.
    """
    rows = [[row for row in results.of(label) if row.unseen in unseen] for label in results.labels]
    clients = [row for of in rows for row in of if row.kind == "client" and not row.condition]
    if clients:
        last = max(index for index, of in enumerate(rows) if of and of[0].kind == "client")
        rows[last + 1 : last + 1] = _best_clients(clients)
    every = [row for of in rows for row in of]
    return _ranked([_table_row(results, of, every, unseen) for of in rows if of])


def _ranked(rows: list[TableRow]) -> list[TableRow]:
    merges = [row for row in rows if row.kind == "merge"]
    if len({row.model for row in merges}) <= MANY:
        return rows
    rest = [row for row in rows if row.kind != "merge"]
    return [*rest, *sorted(merges, key=lambda row: -row.mean.mean)]


def _best_clients(clients: Iterable[Result]) -> list[list[Result]]:
    best: dict[tuple[str, str, int, str], Result] = {}
    for row in clients:
        kind = row.model.split()[0]  # client or coop, before the domain
        place = f"best {kind}", row.variant_label, row.seed, row.unseen
        best[place] = max(best.get(place, row), row, key=lambda one: one.metrics["accuracy"])
    by_label: dict[str, list[Result]] = defaultdict(list)
    for (model, variant, *_), row in best.items():
        by_label[f"{model}{variant}"].append(replace(row, model=model))
    return list(by_label.values())


def _table_row(results: Results, row: list[Result], every: Sequence[Result], unseen: Sequence[str]) -> TableRow:
    mean = _over_seeds(row, "accuracy")
    assert mean is not None  # every result has it
    return TableRow(
        row[0].label,
        row[0].kind,
        row[0].model,
        [_spread([r.metrics["accuracy"] for r in row if r.unseen == domain]) for domain in unseen],
        mean,
        _over_seeds(row, PERSONAL),
        sum(result.metrics["ece"] for result in row) / len(row),
        difference(results, row, [r for r in every if r.model == AVERAGE and r.condition == row[0].condition]),
        difference(results, row, [r for r in every if r.kind == "zero-shot"]),
        max(result.rounds for result in row),
        _mean_bytes(row),
    )


def _over_seeds(row: Iterable[Result], metric: str) -> Spread | None:
    """Mean of a metric over unseen domains, and its spread over seeds; None where it was not measured."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for result in row:
        if metric in result.metrics:
            by_seed[result.seed].append(result.metrics[metric])
    return _spread([sum(values) / len(values) for values in by_seed.values()])


def _mean_bytes(row: Sequence[Result]) -> float | None:
    counted = [result.bytes for result in row if result.bytes is not None]
    return sum(counted) / len(counted) if len(counted) == len(row) else None


def difference(results: Results, row: Sequence[Result], reference: Sequence[Result]) -> Interval | None:
    """Accuracy of a row over that of a reference, on the images, seeds and variants that both have; None if none."""
    others = {(r.unseen, r.seed, r.variant_label): r for r in reference}
    pairs = [(r, others.get((r.unseen, r.seed, r.variant_label))) for r in row]
    by_domain: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for own, other in sorted(((o, t) for o, t in pairs if t is not None), key=lambda pair: pair[0].seed):
        correct = results.correct(own), results.correct(other)
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
    caption = []
    if any(None in row.cells for row in rows):
        caption.append("a client has no accuracy on its own domain, and its mean leaves it out")
    if has_personal(rows):
        caption.append("personal: at the clients' own sites, whose domains the model has seen")
    table = Table("model", title="top-1 accuracy on unseen domains", caption="\n".join(caption) or None)
    for column in [*unseen, "mean", *([PERSONAL_COLUMN] if has_personal(rows) else [])]:
        table.add_column(for_terminal(column), justify="right")
    best = best_cells(rows)
    for row in rows:
        cells = zip(cells_of(row, rows), best, strict=True)
        marked = (_marked(cell, top, "[bold]{}[/bold]").replace(" ± 0.", "±.") for cell, top in cells)
        table.add_row(for_terminal(row.label), *marked)
    return table


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """What a model was measured at, for a terminal."""
    table = Table("metric", "value")
    for name, value in sorted(metrics.items()):
        table.add_row(for_terminal(name), f"{value:.6f}")
    return table


def markdown_table(rows: Sequence[TableRow], unseen: Sequence[str]) -> str:
    """The table for TensorBoard's text tab and for documents, with calibration and paired differences.

    Where there were several rounds it says how many, and what has crossed the wire.
    """
    personal = [PERSONAL_COLUMN] if has_personal(rows) else []
    head = ["model", *map(for_markdown, unseen), "mean", *personal]
    head += ["ECE", "over average [95 %]", "over zero-shot [95 %]"]
    several = any(row.rounds > 1 for row in rows)
    head += ["rounds", "bytes"] if several else []
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    best = best_cells(rows)
    for row in rows:
        cells = [_marked(cell, top, "**{}**") for cell, top in zip(cells_of(row, rows), best, strict=True)]
        differences = [interval_text(value) for value in (row.over_average, row.over_zero_shot)]
        wire = [str(row.rounds), "–" if row.bytes is None else bytes_text(round(row.bytes))] if several else []
        lines.append([for_markdown(row.label), *cells, f"{row.ece:.3f}", *differences, *wire])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def has_personal(rows: Sequence[TableRow]) -> bool:
    """Whether the table has a column for accuracy at the clients' own sites."""
    return any(row.personal for row in rows)


def cells_of(row: TableRow, rows: Sequence[TableRow]) -> list[Spread | None]:
    """The accuracies of a row of the table: on each unseen domain, their mean, and at home where any row has that."""
    return [*row.cells, row.mean, *([row.personal] if has_personal(rows) else [])]


def best_cells(rows: Sequence[TableRow]) -> list[float]:
    """The highest value of each unseen domain, of the means over all of them and of the personal ones, as printed."""
    whole = [row.mean for row in rows if None not in row.cells]
    columns = [*zip(*(row.cells for row in rows), strict=True), whole]
    if has_personal(rows):
        columns.append([row.personal for row in rows])
    return [max((round(cell.mean, 3) for cell in column if cell), default=0.0) for column in columns]


def interval_text(interval: Interval | None) -> str:
    """A difference in points of accuracy with its interval, such as +1.2 [0.3, 2.1]."""
    if interval is None:
        return "–"
    return f"{100 * interval.difference:+.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def bytes_text(count: int) -> str:
    """A number of bytes in decimal units, such as 1.18 MB."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {' kMGT'[power]}B"


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(*mean_and_std(values), len(values)) if values else None


def _marked(cell: Spread | None, best: float, mark: str) -> str:
    if cell is None:
        return "–"
    return mark.format(cell) if round(cell.mean, 3) == best else str(cell)
