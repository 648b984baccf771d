"""What a command shows of a federation that has measured: the table on the terminal, the report, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from sap_lightning.callbacks.tensorboard import log_figures, tensorboards
from sap_lightning.console import table_console
from sap_lightning.escapes import for_terminal
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.files import write_csv, write_text
from sap_lightning.reporting.draw import draw
from sap_lightning.reporting.evidence import Client, collect_evidence
from sap_lightning.reporting.page import write_report
from sap_lightning.reporting.table import TableRow, left_out, markdown_table, rich_table, tabulate
from sap_lightning.results import Results

TABLE_FILE = "table.md"


def show(federation: OneShotFederation, results: Results, report: bool = True) -> None:
    """Prints these results as a table, writes it and, if wanted, the report, and puts both into TensorBoard."""
    federation.server.strategy.barrier()
    folder, unseen = results.folder, federation.unseen
    rows = tabulate(results, unseen)
    if federation.server.is_global_zero:
        print_table(rows, unseen, left_out(results))
    if report and federation.client.kind == "lora":  # it is about adapters: layers, masks, anchors
        _report(federation, results, rows)
    if federation.server.is_global_zero:
        table = markdown_table(rows, unseen)
        write_text(folder / TABLE_FILE, table)
        for board in tensorboards(federation.server):
            board.add_text("results", table)
            board.flush()
        print(f"Table: {results.csv}\nFigures: tensorboard --logdir {folder}")


def _report(federation: OneShotFederation, results: Results, rows: Sequence[TableRow]) -> None:
    evidence = collect_evidence(federation)
    if not federation.server.is_global_zero:
        return
    figures = draw(results, rows, evidence)
    log_figures(tensorboards(federation.server), figures)
    write_csv(results.folder / "clients.csv", [Client._fields, *evidence.clients])
    page = write_report(results.folder, results, rows, federation.unseen, figures, evidence, federation.settings)
    print(f"Report: {page}")


def print_table(rows: Sequence[TableRow], unseen: Sequence[str], sentences: Sequence[str]) -> None:
    """Prints the table, and sentences below it."""
    console = table_console()
    console.print(rich_table(rows, unseen))
    for sentence in sentences:
        console.print(for_terminal(sentence))
