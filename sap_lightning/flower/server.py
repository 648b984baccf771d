"""The server: asks every site once, merges what they sent, and evaluates as the command fit does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from sap_lightning import __version__
from sap_lightning.cli import SapCLI
from sap_lightning.console import quieten
from sap_lightning.errors import InputError
from sap_lightning.federation.run_folder import is_held_to
from sap_lightning.files import locked
from sap_lightning.flower.collection import Collection
from sap_lightning.flower.simulation import Partitions
from sap_lightning.flower.sites import Register
from sap_lightning.flower.wire import Question
from sap_lightning.io.rules import Rule, is_integer, require
from sap_lightning.reporting.show import show

SITES_FILE = "sites.json"
app = ServerApp()


class RunConfig(NamedTuple):
    """What ``flwr run --run-config`` sets.

    Attributes:
        config: the server's YAML file.
        quorum: uploads without which nothing is merged.
        timeout: seconds to wait for sites that have not answered.
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
    folder, register = cli.run_folder, _register(grid, cli)
    with locked(folder.path):
        is_held_to(folder.path, cli.settings())
        cli.federation(uploads=[]).check_server()
        standing = [upload for upload in folder.uploads if register.domains is None or upload.name in register.domains]
        question = Question(cli.merge.base_fingerprint, cli.datamodule.class_names, __version__)
        collection = Collection(
            grid,
            register,
            question,
            cli.merge.read_upload,
            folder,
            cli.merge.read_uploads(standing),
        )
        federation = cli.federation(uploads=collection.wait(run.quorum, run.timeout))
        federation.run()
        show(federation, federation.comparable(), cli.config_init.federation.report)


def _register(grid: Grid, cli: SapCLI) -> Register | Partitions:
    """Who may speak for which domain; in a simulation, whose grid has no network, the nodes by their numbers."""
    if isinstance(grid, InMemoryGrid):
        return Partitions(cli.federation().domains)
    return Register(cli.run_folder.path / SITES_FILE, cli.config_init.federation.clients)
