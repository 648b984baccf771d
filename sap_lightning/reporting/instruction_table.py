"""The tables of federated instruction tuning: ways to tune together, and one shot for a task that nobody knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from rich.table import Table

from sap_lightning.escapes import for_markdown, for_terminal
from sap_lightning.federation.instruction import BASE, InstructionFederation
from sap_lightning.functional.statistics import Interval, bootstrap_mean
from sap_lightning.instruction_results import InstructionResult

FEDIT = "fedit"
"""The way that others are compared with."""
LOCAL = "local"
"""The way that sends nothing."""


class InstructionRow(NamedTuple):
    """One way of tuning, after its last turn.

    Attributes:
        system: its name.
        scores: by task, in the order of the tasks.
        mean: over the tasks.
        perplexity: mean over clients.
        other_image: the same with another conversation's image.
        sent: bytes of all clients in each turn.
        over_base: paired difference of the mean score to the base on the same conversations, with a 95 % bootstrap
            interval; None of the base itself, and where the conversations are not the same any more.
        over_fedit: the same to FedIT; None without it.
    """

    system: str
    scores: Sequence[float]
    mean: float
    perplexity: float
    other_image: float | None
    sent: Sequence[int]
    over_base: Interval | None
    over_fedit: Interval | None


class Cells(NamedTuple):
    """A table as text, whose first column is names and the others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for place, name in enumerate(self.header):
            table.add_column(for_terminal(name), justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*map(for_terminal, row))
        return table

    def markdown(self) -> str:
        """For a file."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [[for_markdown(name) for name in self.header], rule, *self.rows]
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(federation: InstructionFederation) -> list[InstructionRow]:
    """A row for the base and each way."""
    return [_row(federation, system) for system in (BASE, *federation.systems)]


def _row(federation: InstructionFederation, system: str) -> InstructionRow:
    results, turn = federation.results, last_turn(federation, system)
    found, by_task = results.of(system, turn), results.by_task(system, turn)
    others = [one.perplexity_other_image for one in found if one.perplexity_other_image is not None]
    turns = () if system in (BASE, LOCAL) else range(1, turn + 1)
    return InstructionRow(
        system,
        list(by_task.values()),
        fmean(by_task.values()),
        fmean(one.perplexity for one in found),
        fmean(others) if others else None,
        [results.of(system, number)[0].bytes_sent for number in turns],
        _over(federation, system, BASE),
        _over(federation, system, FEDIT) if FEDIT in federation.systems else None,
    )


def last_turn(federation: InstructionFederation, system: str) -> int:
    """After how many turns a system is what the tables show."""
    return 0 if system == BASE else 1 + federation.rounds


def _over(federation: InstructionFederation, system: str, other: str) -> Interval | None:
    """By how much a way's mean score over tasks is above another's, each answer beside the other's."""
    if system == other:
        return None
    both = (federation.results.of(name, last_turn(federation, name)) for name in (system, other))
    pairs = list(zip(*both, strict=True))
    if any(answers_of(one) != answers_of(before) for one, before in pairs):
        return None  # test conversations were changed in between
    clients = [(one.task, differences(federation, one, before)) for one, before in pairs]
    of_task = Counter(task for task, _ in clients)
    weights = [1 / (len(of_task) * of_task[task]) for task, _ in clients]
    return bootstrap_mean([values for _, values in clients], weights)


def answers_of(one: InstructionResult) -> list[str]:
    """The right answers that a client was judged by."""
    return [said["answer"] for said in one.said]


def differences(federation: InstructionFederation, one: InstructionResult, other: InstructionResult) -> list[float]:
    """The score of each answer over the other's, of one client."""
    scores = (federation.judged(one.task, result.said) for result in (one, other))
    return [score - before for score, before in zip(*scores, strict=True)]


def tables_of(federation: InstructionFederation, rows: Sequence[InstructionRow]) -> list[Cells]:
    """The ways to tune together, and where methods were asked for, one shot."""
    tasks = sorted(set(federation.data.tasks.values()))
    header = ["system", *tasks, "mean", "perplexity", "of another image", "MB sent"]
    tables = [Cells("Tuned together", header, [cells(row) for row in rows])]
    if federation.methods:
        unseen = ["merged once", *(f"{task} unseen" for task in tasks), "mean"]
        tables.append(Cells("On a task that nobody trained on", unseen, one_shot_rows(federation)))
    return tables


def cells(row: InstructionRow) -> list[str]:
    """A row as text."""
    other = "–" if row.other_image is None else f"{row.other_image:.2f}"
    scores = [f"{score:.3f}" for score in (*row.scores, row.mean)]
    return [row.system, *scores, f"{row.perplexity:.2f}", other, f"{sum(row.sent) / 1e6:.1f}"]


def one_shot_rows(federation: InstructionFederation) -> list[list[str]]:
    """The base and each merge method on each task, whose clients it was made without."""
    rows = []
    for name in (BASE, *(method.name for method in federation.methods)):
        found = federation.results.by_task(name, 0 if name == BASE else 1)
        rows.append([name, *(f"{score:.3f}" for score in (*found.values(), fmean(found.values())))])
    return rows
