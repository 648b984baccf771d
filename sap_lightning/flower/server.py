"""The server: asks every site once a round, merges what they sent, and evaluates as the command fit does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from sap_lightning import __version__
from sap_lightning.cli import SapCLI
from sap_lightning.console import quieten
from sap_lightning.errors import InputError
from sap_lightning.federation.comparable import comparable
from sap_lightning.federation.handed import FOLDED, START
from sap_lightning.federation.rounds import Asked
from sap_lightning.federation.run_folder import RunFolder, is_held_to
from sap_lightning.federation.turns import Agreement, folded_in
from sap_lightning.files import locked
from sap_lightning.flower.collection import Collection
from sap_lightning.flower.simulation import Partitions
from sap_lightning.flower.sites import Register
from sap_lightning.flower.wire import NEVER, Parts, Question, question_record
from sap_lightning.io.adapter import Adapter, Expected
from sap_lightning.io.rules import Rule, is_integer, require
from sap_lightning.reporting.show import show

log = logging.getLogger(__name__)
SITES_FILE = "sites.json"
app = ServerApp()


class RunConfig(NamedTuple):
    """What ``flwr run --run-config`` sets.

    Attributes:
        config: the server's YAML file.
        quorum: uploads without which nothing is merged.
        timeout: seconds to wait in a round for sites that have not answered.
    """

    config: str
    quorum: int
    timeout: float


_RULES = {
    "config": Rule(lambda value: isinstance(value, str) and bool(value), "the path of the server's YAML file"),
    "quorum": Rule(lambda value: is_integer(value, 1), "an integer from 1"),
    "timeout": Rule(lambda value: type(value) in (int, float) and value > 0, "a number of seconds above 0"),
}


def run_config_from(given: Mapping[str, Any]) -> RunConfig:
    """The settings of a run.

    Raises:
        InputError: naming one that is missing or wrong.
    """
    for name, rule in _RULES.items():
        require(f"run-config {name}", given.get(name), rule)
    return RunConfig(**{name: given[name] for name in _RULES})


class Sites:
    """The sites of a federation, which are asked once a round.

    Args:
        grid: Flower's way to them.
        cli: the server's settings.
        run: of this run.
    """

    def __init__(self, grid: Grid, cli: SapCLI, run: RunConfig) -> None:
        self.grid, self.cli, self.run = grid, cli, run
        self.folder: RunFolder = cli.run_folder
        self.register = _register(grid, cli)
        settings = cli.config_init.federation
        played = settings.rounds, settings.aggregation, settings.optimizer, settings.schedule
        self.agreed = Agreement(*played, blocks=cli.model.named_blocks)

    @cached_property
    def question(self) -> Question:
        """What is asked in the first round."""
        self.cli.merge.configure_model()
        agreed = self.agreed
        return Question(
            self.cli.merge.base_fingerprint,
            self.cli.datamodule.class_names,
            __version__,
            agreed.rounds,
            agreed.way,
            agreed.optimizer,
            agreed.schedule,
        )

    def first_uploads(self) -> list[Path]:
        """Those of the first round, which are asked for until a later one has begun: that knows its clients.

        Raises:
            InputError: fewer than the quorum.
        """
        domains = self.register.domains
        standing = [upload for upload in self.folder.uploads if domains is None or upload.name in domains]
        if self.folder.has_later_rounds:
            return standing
        expected = self.agreed.expected(0, self.cli.model.drawn)
        known = self.cli.merge.read_uploads(standing, expected)
        return self._collection(self.question, self.folder, expected, known).wait(self.run.quorum, self.run.timeout)

    def ask(self, asked: Asked) -> None:
        """Gets the uploads of a later round that do not stand.

        Raises:
            InputError: one does not come in time.
        """
        folder = self.folder.round(asked.unseen, asked.number)
        standing = [upload for upload in folder.uploads if upload.name in asked.last]
        known = self.cli.merge.read_uploads(standing, asked.expected)
        if len(known) == len(asked.last):
            return
        start = asked.handed[-1].start
        question = self.question._replace(
            round=asked.number,
            unseen=asked.unseen,
            start=start.sha256 if start else "",
            folded=tuple(adapter.sha256 for adapter in folded_in(asked.handed)),
        )
        later = {
            domain: question_record(
                question._replace(last=NEVER if last is None else last), self._parts(asked, last or 0)
            )
            for domain, last in asked.last.items()
        }
        log.info("round %d of %d, %s unseen", asked.number + 1, self.agreed.rounds, asked.unseen)
        collection = self._collection(question, folder, asked.expected, known, later)
        collection.wait(len(later), self.run.timeout)

    def _parts(self, asked: Asked, since: int) -> Parts:
        """The files that a site is handed: its start, and what was added to the base since its last round."""
        parts = {}
        for number, handed in enumerate(asked.handed):
            folder = self.folder.handed(asked.unseen, number)
            if handed.folded and number >= since:
                parts[f"{FOLDED} {number}"] = folder / FOLDED
            if handed.start and number == asked.number - 1:
                parts[START] = folder / START
        return {name: {file.name: file.read_bytes() for file in sorted(part.iterdir())} for name, part in parts.items()}

    def _collection(
        self,
        question: Question,
        folder: RunFolder,
        expected: Expected,
        known: Sequence[Adapter],
        later: Mapping[str, RecordDict] | None = None,
    ) -> Collection:
        read = partial(self.cli.merge.adapter_from_bytes, expected=expected)
        return Collection(self.grid, self.register, question, read, folder, known, later)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Flower logs every exception with its traceback; an error that is for a person stands for itself."""
    if record.exc_info and isinstance(error := record.exc_info[1], InputError):
        record.msg, record.args, record.exc_info = f"error: {error}", (), None
    return True


@app.lifespan()
def _quiet(context: Context) -> Iterator[None]:
    quieten()
    logging.getLogger("flwr").addFilter(_in_one_line)
    yield


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Collects the uploads that are missing, merges them for every unseen domain, and evaluates."""
    run = run_config_from(context.run_config)
    cli = SapCLI("fit", ["--config", run.config])
    with locked(cli.run_folder.path):
        is_held_to(cli.run_folder.path, cli.settings())
        sites = Sites(grid, cli, run)
        cli.federation(uploads=[], ask=sites.ask).check_server()
        federation = cli.federation(uploads=sites.first_uploads(), ask=sites.ask)
        federation.run()
        show(federation, comparable(federation), cli.config_init.federation.report)


def _register(grid: Grid, cli: SapCLI) -> Register | Partitions:
    """Who may speak for which domain; in a simulation, whose grid has no network, the nodes by their numbers."""
    if isinstance(grid, InMemoryGrid):
        return Partitions(cli.federation().domains)
    return Register(cli.run_folder.path / SITES_FILE, cli.config_init.federation.clients)
