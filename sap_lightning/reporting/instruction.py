"""What is shown of federated instruction tuning: a table of scores by task, and how they rise over the turns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from sap_lightning.console import on_terminal
from sap_lightning.federation.instruction import BASE, InstructionFederation
from sap_lightning.files import write_text
from sap_lightning.instruction_results import InstructionResults
from sap_lightning.reporting.show import LOG_WIDTH, TABLE_FILE


class InstructionRow(NamedTuple):
    """One way of tuning, after its last turn.

    Attributes:
        system: its name.
        scores: by task, in the order of the tasks.
        mean: over the tasks.
        perplexity: mean over clients.
        other_image: the same with another conversation's image.
        sent: bytes of all clients in all turns.
    """

    system: str
    scores: Sequence[float]
    mean: float
    perplexity: float
    other_image: float | None
    sent: int


class Cells(NamedTuple):
    """A table as text, whose first column is names and the others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(results: InstructionResults, systems: Sequence[str], turns: int) -> list[InstructionRow]:
    """A row for the base and each way."""
    rows = []
    for system, turn in [(BASE, 0), *((system, turns) for system in systems)]:
        found, by_task = results.of(system, turn), results.by_task(system, turn)
        others = [one.perplexity_other_image for one in found if one.perplexity_other_image is not None]
        sent = (
            0
            if system in (BASE, "local")
            else sum(results.of(system, number)[0].bytes_sent for number in range(1, turn + 1))
        )
        rows.append(
            InstructionRow(
                system,
                list(by_task.values()),
                fmean(by_task.values()),
                fmean(one.perplexity for one in found),
                fmean(others) if others else None,
                sent,
            )
        )
    return rows


def cells(row: InstructionRow) -> list[str]:
    """A row as text."""
    other = "–" if row.other_image is None else f"{row.other_image:.2f}"
    scores = [f"{score:.3f}" for score in (*row.scores, row.mean)]
    return [row.system, *scores, f"{row.perplexity:.2f}", other, f"{row.sent / 1e6:.1f}"]


def one_shot_rows(federation: InstructionFederation) -> list[list[str]]:
    """The base and each merge method on each task, whose clients it was made without."""
    rows = []
    for name in (BASE, *(method.name for method in federation.methods)):
        found = federation.results.by_task(name, 0 if name == BASE else 1)
        rows.append([name, *(f"{score:.3f}" for score in (*found.values(), fmean(found.values())))])
    return rows


def show_instruction(federation: InstructionFederation) -> None:
    """Prints the table and writes it, and draws the scores over the turns."""
    results, turns = federation.results, 1 + federation.rounds
    tasks = sorted(set(federation.data.tasks.values()))
    header = ["system", *tasks, "mean", "perplexity", "of another image", "MB sent"]
    rows = [cells(row) for row in rows_of(results, federation.systems, turns)]
    tables = [Cells("Tuned together", header, rows)]
    if federation.methods:
        unseen = ["merged once", *(f"{task} unseen" for task in tasks), "mean"]
        tables.append(Cells("On a task that nobody trained on", unseen, one_shot_rows(federation)))
    console = Console(width=None if on_terminal() else LOG_WIDTH)
    for table in tables:
        console.print(table.rich())
    write_text(federation.folder / TABLE_FILE, "\n".join(table.markdown() for table in tables))
    over_turns(results, federation.systems, turns).savefig(federation.folder / "scores.png", dpi=150)
    print(f"Table: {results.csv}\nAnswers: {federation.folder / 'answers'}")
    print(f"Figures: {federation.folder / 'scores.png'}, tensorboard --logdir {federation.folder}")


def over_turns(results: InstructionResults, systems: Sequence[str], turns: int) -> Figure:
    """The mean score over tasks after each turn."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    base = fmean(results.by_task(BASE, 0).values())
    for system in systems:
        scores = [fmean(results.by_task(system, turn).values()) for turn in range(1, turns + 1)]
        axes.plot(range(turns + 1), [base, *scores], marker="o", label=system)
    axes.set_xticks(range(turns + 1))
    axes.set_xlabel("times that clients have trained")
    axes.set_ylabel("mean score over tasks")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
