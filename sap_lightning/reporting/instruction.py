"""What is shown of federated instruction tuning: tables, and the report."""

from __future__ import annotations

import logging

from sap_lightning.console import table_console
from sap_lightning.errors import first_line
from sap_lightning.federation.instruction import InstructionFederation
from sap_lightning.files import write_text
from sap_lightning.reporting.instruction_page import write_instruction_report
from sap_lightning.reporting.instruction_table import rows_of, tables_of
from sap_lightning.reporting.show import TABLE_FILE

log = logging.getLogger(__name__)


def show_instruction(federation: InstructionFederation) -> None:
    """Prints the tables and writes them, and the report, without which the run is as whole."""
    rows = rows_of(federation)
    tables = tables_of(federation, rows)
    console = table_console()
    for table in tables:
        console.print(table.rich())
    write_text(federation.folder / TABLE_FILE, "\n".join(table.markdown() for table in tables))
    try:
        print(f"Report: {write_instruction_report(federation, rows, tables)}")
    except Exception as error:  # whatever drawing, or what clients wrote, leads to: all is measured and on disk
        log.warning("%s: has no report (%s); the same command writes it anew", federation.folder, first_line(error))
    print(f"Table: {federation.results.csv}\nAnswers: {federation.folder / 'answers'}")
    print(f"Figures: tensorboard --logdir {federation.folder}")
