"""A site's turn in one of several rounds: it goes on from what the server has handed over, in its own run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from sap_lightning.cli import SapCLI
from sap_lightning.errors import InputError
from sap_lightning.federation.aggregation import AGGREGATIONS
from sap_lightning.federation.client import train_client
from sap_lightning.federation.handed import FOLDED, START, Handed
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.federation.turns import Agreement, Optimizer
from sap_lightning.files import new_folder, write_files
from sap_lightning.flower.wire import NEVER, Parts, Question
from sap_lightning.io.adapter import WHOLE, Adapter, Expected
from sap_lightning.io.manifest import check_domain
from sap_lightning.io.peft_config import CONFIG_FILE
from sap_lightning.io.rules import Rule, is_integer, require
from sap_lightning.io.upload_files import WEIGHTS_FILE
from sap_lightning.modules.turn import Span

_RULES = {
    "rounds": Rule(lambda value: is_integer(value, 1, 10**6), "an integer from 1 to a million"),
    "way": Rule(lambda value: value in AGGREGATIONS, f"one of {', '.join(AGGREGATIONS)}"),
    "optimizer": Rule(lambda value: value in get_args(Optimizer), f"one of {', '.join(get_args(Optimizer))}"),
    "schedule": Rule(lambda value: value in get_args(Span), f"one of {', '.join(get_args(Span))}"),
    "round": Rule(lambda value: is_integer(value, 0, 10**6), "an integer from 0 to a million"),
    "last": Rule(lambda value: is_integer(value, NEVER, 10**6), "an integer from -1 to a million"),
}
_HANDED_FILES = (WEIGHTS_FILE, CONFIG_FILE)


class SiteTurn:
    """A site's turn in a round.

    Args:
        cli: the site's settings for the command client.
        question: the server's.
        parts: what the server has handed over with it.

    Raises:
        InputError: the question is not one that a server of this package asks.
    """

    def __init__(self, cli: SapCLI, question: Question, parts: Parts) -> None:
        for name, rule in _RULES.items():
            require(f"the server's {name}", getattr(question, name), rule)
        if question.round:
            check_domain(question.unseen)
        self.cli, self.question, self.parts = cli, question, parts
        played: dict[str, Any] = {name: getattr(question, name) for name in ("rounds", "way", "optimizer", "schedule")}
        self.agreed = Agreement(**played, blocks=cli.model.named_blocks)
        self.folder: RunFolder = cli.run_folder

    def train(self) -> Path:
        """Trains, unless the round's upload stands, and returns that.

        Raises:
            InputError: when the site cannot go on from what it was handed.
        """
        number, domain = self.question.round, self.cli.datamodule.require_domain()
        turn = self.agreed.turn(number, None, self._handed(), self._last_home(domain))
        rounds, epochs = self.agreed.rounds, self._epochs
        title = f"client {domain}, round {number + 1} of {rounds}"
        data = self.cli.datamodule.for_domain(domain, first_epoch=number * epochs, all_epochs=rounds * epochs)
        module, folder = self.cli.model.for_turn(turn), self.folder.round(self.question.unseen, number)
        return train_client(module, data, folder, self.cli.make_trainer, title, self._settings())

    @property
    def _epochs(self) -> int:
        """Of one round, which are the site's own."""
        if (epochs := self.cli.make_trainer(logger=False).max_epochs or 0) < 1:
            raise InputError("trainer.max_epochs: in several rounds it must be a number from 1 on")
        return epochs

    def _settings(self) -> dict[str, Any]:
        """The site's own, and how the rounds are played: a client is held to both."""
        settings = self.cli.settings()
        played = {
            "rounds": self.agreed.rounds,
            "aggregation": self.agreed.way,
            "optimizer": self.agreed.optimizer,
            "schedule": self.agreed.schedule,
        }
        return {**settings, "federation": {**settings["federation"], **played}}

    def _last_home(self, domain: str) -> Path | None:
        last = self.question.last
        return None if last == NEVER else self.folder.round(self.question.unseen, last).client(domain)

    def _handed(self) -> list[Handed]:
        """What the rounds before have handed over, some of it with earlier questions.

        Raises:
            InputError: it is not what the question says.
        """
        if self.question.round == 0:
            return []
        folded = self._folded()
        start = self._read(self.parts[START], START, self._before()) if START in self.parts else None
        said = [start.sha256 if start else "", *(adapter.sha256 for adapter in folded)]
        if said != [self.question.start, *self.question.folded]:
            raise InputError(
                f"what rounds before round {self.question.round + 1} have handed over is not what the server says, or"
                f" not in {self.folder.path} any more; ask for a run of its own with another federation.run_dir"
            )
        return [*(Handed(None, adapter) for adapter in folded), Handed(start, None)]

    def _before(self) -> Expected:
        return self.agreed.expected(self.question.round - 1, self.cli.model.drawn)

    def _read(self, files: Mapping[str, bytes], name: str, expected: Expected = WHOLE) -> Adapter:
        if {*files} != {*_HANDED_FILES}:
            raise InputError(f"{name}: the server hands over {sorted(files)}, expected {', '.join(_HANDED_FILES)}")
        return self.cli.merge.adapter_from_bytes(files, name, expected)

    def _folded(self) -> list[Adapter]:
        """All that was added to the base; what came just now is kept, once it could be read."""
        found = []
        for number in range(self.question.round):
            name, folder = f"{FOLDED} {number}", self.folder.handed(self.question.unseen, number) / FOLDED
            if folder.exists():
                found.append(self._read({file: (folder / file).read_bytes() for file in _HANDED_FILES}, name))
            elif name in self.parts:
                found.append(self._read(self.parts[name], name))
                with new_folder(folder) as staging:
                    write_files(staging, self.parts[name])
        return found


def upload_of(cli: SapCLI, question: Question, parts: Parts) -> Path:
    """The upload that a question asks for, which is trained now unless it stands.

    Raises:
        InputError: when it cannot be trained.
    """
    return cli.train() if question.rounds == 1 else SiteTurn(cli, question, parts).train()
