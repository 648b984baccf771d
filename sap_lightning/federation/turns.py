"""What a server and its clients agree on of several rounds, and what a client trains in each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sap_lightning.errors import InputError
from sap_lightning.federation.aggregation import AGGREGATIONS, Aggregation, PromptFL, Way
from sap_lightning.federation.checkpoints import last_checkpoint, optimizer_state
from sap_lightning.federation.handed import Handed
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, Expected
from sap_lightning.io.factors import Factors
from sap_lightning.io.uploads import read_uploads
from sap_lightning.modules.turn import Span, Turn

Optimizer = Literal["reset", "keep"]
Drawn = Callable[[], Mapping[str, LoRALayer]]
"""Gives what all clients start from in the first round, which the seed gives both sides."""


@dataclass(frozen=True)
class Agreement:
    """How several rounds are played, which both sides go by.

    Attributes:
        rounds: how many there are.
        way: how adapters are aggregated, or promptfl for prompts.
        optimizer: clients start each round with a new one (reset), or with what theirs has gathered (keep).
        schedule: the learning rate falls once over all rounds (whole), or in each (round).
        blocks: those whose layers all clients send, where they are named; layers of others are each client's own.
    """

    rounds: int = 1
    way: Way | Literal["promptfl"] = "flexlora"
    optimizer: Optimizer = "reset"
    schedule: Span = "whole"
    blocks: Sequence[int] | None = None

    @property
    def aggregation(self) -> Aggregation:
        """What uploads become before the next round."""
        return PromptFL() if self.way == "promptfl" else AGGREGATIONS[self.way]

    def sent(self, number: int) -> Factors:
        """Which of A and B clients send in a round."""
        return "AB" if self.rounds == 1 else self.aggregation.sent_in(number == self.rounds - 1)

    def expected(self, number: int, drawn: Drawn, handed: Sequence[Handed] = ()) -> Expected:
        """What the server expects of an upload of a round, after what was handed over before."""
        sent = self.sent(number)
        folded = tuple(adapter.sha256 for adapter in folded_in(handed))
        return Expected(sent, {} if sent == "AB" else drawn(), folded)

    def turn(
        self, number: int, rank: int | None = None, handed: Sequence[Handed] = (), home: Path | None = None
    ) -> Turn:
        """What a client trains in a round.

        Args:
            number: of the round, from 0.
            rank: that it trains, in place of the module's own.
            handed: what the rounds before have handed over.
            home: where it trained last, if it did.

        Raises:
            InputError: it has to go on from a checkpoint that is not there.
        """
        return Turn(
            number,
            self.rounds,
            self.schedule,
            rank=rank,
            start=self._start(handed[-1].start if handed else None, home),
            folded=folded_in(handed),
            trained=self.aggregation.trained if self.rounds > 1 else "AB",
            sent=self.sent(number),
            optimizer=self._gathered(home),
        )

    def _start(self, start: Adapter | None, home: Path | None) -> Mapping[str, LoRALayer]:
        """The factors that a client starts from: what was handed over, and its own of what is not shared."""
        if start is None:
            return {}
        if home is None or (self.aggregation.sent != "A" and self.blocks is None):
            return start.layers
        (own,) = read_uploads([_checkpoint(home, self.way if self.blocks is None else "model.sent_blocks")])
        if self.blocks is not None:
            return {**own.layers, **start.layers}
        return {name: layer._replace(B=own.layers[name].B) for name, layer in start.layers.items()}

    def _gathered(self, home: Path | None) -> dict[int, Any]:
        """What the client's optimizer has gathered in its last round, if it is kept."""
        if self.optimizer == "reset" or home is None:
            return {}
        return optimizer_state(_checkpoint(home, "federation.optimizer keep"))


def taking_part(clients: Sequence[str], share: float, seed: int) -> list[str]:
    """Some of the clients, in their order; at least one.

    Args:
        clients: all of them.
        share: of them that are drawn.
        seed: of the draw.
    """
    order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(seed)).tolist()
    return [clients[place] for place in sorted(order[: max(1, round(share * len(clients)))])]


def folded_in(handed: Sequence[Handed]) -> list[Adapter]:
    """What rounds have added to the base, in their order."""
    return [one.folded for one in handed if one.folded]


def _checkpoint(home: Path, needed_for: str) -> Path:
    """A client's last checkpoint."""
    if (checkpoint := last_checkpoint(home)) is None:
        raise InputError(
            f"{needed_for}: {home} holds no checkpoint of the client; train it here, or choose another way"
        )
    return checkpoint
