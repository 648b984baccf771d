"""One client's training in one round: what it starts from, and its place among the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter
from sap_lightning.io.factors import Factors

Span = Literal["whole", "round"]


@dataclass(frozen=True)
class Turn:
    """A client's training in one of several rounds; shuffles, augmentation and dropout go on where the last one ended.

    Attributes:
        number: of the round, from 0.
        rounds: how many there are.
        span: the learning rate is scheduled over all rounds together (whole), or in each anew (round).
        rank: that the client trains, in place of the module's own.
        start: the adapter's first factors by layer; drawn from the seed where there are none.
        folded: what earlier rounds have added to the base, in their order.
        trained: which of A and B are trained; the other stays as it is.
        sent: which of them the client sends.
        optimizer: what the client's optimizer has gathered of each parameter in an earlier round, if it goes on.
    """

    number: int = 0
    rounds: int = 1
    span: Span = "whole"
    rank: int | None = None
    start: Mapping[str, LoRALayer] = field(default_factory=dict)
    folded: Sequence[Adapter] = ()
    trained: Factors = "AB"
    sent: Factors = "AB"
    optimizer: Mapping[int, Any] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether no round follows."""
        return self.number == self.rounds - 1

    @property
    def scheduled(self) -> tuple[int, int]:
        """The first round that the learning rate is scheduled over, and the one after the last."""
        return (0, self.rounds) if self.span == "whole" else (self.number, self.number + 1)


ONE_SHOT = Turn()
"""The only round."""
