"""Several rounds: what the clients sent is merged, and they go on from there; the first round is one shot."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.federation.aggregation import AGGREGATIONS, Way
from sap_lightning.federation.checkpoints import last_checkpoint, optimizer_state
from sap_lightning.federation.handed import Handed, hand_over, handed_in
from sap_lightning.federation.one_shot import OneShotFederation, Training
from sap_lightning.federation.points import Plan, Point, Points, Sent, settings_of
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.rescaling import relative_error
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import Average, MergeMethod, method_named
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.merged import Merged
from sap_lightning.modules.turn import Span, Turn

log = logging.getLogger(__name__)


class RoundsFederation(OneShotFederation):
    """Federated averaging (McMahan et al. 2017, arXiv:1602.05629) of adapters; with one round it is the one shot.

    In every round clients train on from what the round before has handed over, and upload; the server merges. What it
    makes of the last round's uploads is measured. An unseen domain's client has no part in any round before, so all
    rounds but the first are played anew for each unseen domain.

    Args:
        rounds: how often the clients train and upload.
        epochs_per_round: epochs of a client in a round; trainer.max_epochs if not given.
        share: share of the clients that take part in a round, at least one, drawn by the seed.
        aggregation: what the uploads become before the next round: A and B averaged apart (fedit), or the merge of
            the ΔW cut to the largest singular values (flexlora).
        optimizer: clients start each round with a new one (reset), or with what theirs has gathered (keep).
        schedule: the learning rate falls once over all rounds (whole), or in each (round).
        last_method: merges the last round: a method, or the name of one at its own settings; merge.method if not given.
        method: merges the rounds before; the plain average if not given.
        one_shot: arguments of :class:`OneShotFederation`.

    Raises:
        InputError: for numbers out of range, or settings that contradict each other.
    """

    def __init__(
        self,
        rounds: int = 1,
        epochs_per_round: int | None = None,
        share: float = 1.0,
        aggregation: Way = "flexlora",
        optimizer: Literal["reset", "keep"] = "reset",
        schedule: Span = "whole",
        last_method: MergeMethod | str | None = None,
        method: MergeMethod | None = None,
        **one_shot: Any,
    ) -> None:
        if last_method is not None:
            last = method_named(last_method, "federation.last_method") if isinstance(last_method, str) else last_method
            one_shot["plan"] = Plan({one.name: one for one in (Average(), last)})
        super().__init__(**one_shot)
        self.rounds = rounds
        self.epochs_per_round = epochs_per_round
        self.share = share
        self.way = aggregation
        self.aggregation = AGGREGATIONS[aggregation]
        self.optimizer = optimizer
        self.schedule = schedule
        self.method = method or Average()
        self.first_turn = Turn(0, rounds, schedule)
        self._check_rounds(last_method is not None and method is not None)
        self._played: dict[str, Points] = {}

    def _check_rounds(self, both_methods: bool) -> None:
        check_at_least("federation.rounds", self.rounds, 1)
        if self.epochs_per_round is not None:
            check_at_least("federation.epochs_per_round", self.epochs_per_round, 1)
        check_share("federation.share", self.share)
        if both_methods and (self.rounds == 1 or not self.aggregation.takes_methods):
            raise InputError(
                "federation.last_method: nothing would use merge.method, as"
                + (
                    " there is one round"
                    if self.rounds == 1
                    else f" {self.way} averages A and B; leave one of them out"
                )
            )
        if self.rounds == 1:
            return
        if self.optimizer == "keep" and not self.aggregation.keeps_factors:
            raise InputError(
                f"federation.optimizer keep: {self.way} hands over other factors than those that an optimizer knows;"
                " use reset, or --federation.aggregation fedit"
            )
        if self.poison is not None:
            raise InputError("federation.poison is for one round; leave it out, or set --federation.rounds 1")
        if self.epochs < 1:
            raise InputError(
                "federation.rounds: set federation.epochs_per_round, as trainer.max_epochs names no number"
            )

    @property
    def epochs(self) -> int:
        """Epochs of a client in a round."""
        return self.epochs_per_round or self.server.max_epochs or 0

    def client_trainer(self, **overrides: Any) -> L.Trainer:
        epochs = {} if self.epochs_per_round is None else {"max_epochs": self.epochs_per_round}
        return super().client_trainer(**epochs, **overrides)

    # Who takes part

    def chosen(self, unseen: str, number: int) -> list[str]:
        """The clients of a round, of an unseen domain's."""
        clients = super().senders(unseen)
        order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(self.data.seed + number)).tolist()
        return [clients[place] for place in sorted(order[: max(1, round(self.share * len(clients)))])]

    def senders(self, unseen: str) -> list[str]:
        return self.chosen(unseen, self.rounds - 1)

    @property
    def domains(self) -> list[str]:
        first = {domain for unseen in self.unseen for domain in self.chosen(unseen, 0)}
        return [domain for domain in self.clients if domain in first]

    # Playing

    def gather(self) -> None:
        if self.rounds == 1:
            super().gather()
            return
        later = sum(len(self.chosen(unseen, number)) for unseen in self.unseen for number in range(1, self.rounds))
        log.info("%d rounds of %d epochs: %d trainings in the first round", self.rounds, self.epochs, len(self.domains))
        log.info("%d in the others, played for each of %d unseen domains (federation.unseen)", later, len(self.unseen))
        self.train()
        self._played = {unseen: self.points_of(self._play(unseen)) for unseen in self.unseen}
        self.sent = self.sent_for(self.unseen[0])

    def sent_for(self, unseen: str) -> Sent:
        return self._played[unseen].sent if self._played else super().sent_for(unseen)

    def points_on(self, unseen: str) -> list[Point]:
        return list(self._played[unseen].on(unseen)) if self._played else super().points_on(unseen)

    def _play(self, unseen: str) -> Sent:
        """What the clients send in the last round for an unseen domain, after all rounds before."""
        sent, crossed = self._uploads(unseen, 0), 0
        for number in range(1, self.rounds):
            handed = self._hand_over(unseen, number - 1, sent)
            crossed += sum(adapter.size for adapter in sent) + handed.size * len(self.chosen(unseen, number))
            self._train_round(unseen, number, handed)
            sent = self._uploads(unseen, number)
        return Sent(sent, rounds=self.rounds, bytes_before=crossed)

    def _uploads(self, unseen: str, number: int) -> list[Adapter]:
        folder = self.folder.round(unseen, number)
        return self.collect([folder.upload(domain) for domain in self.chosen(unseen, number)], number)

    def _train_round(self, unseen: str, number: int, handed: Handed) -> None:
        folder, chosen = self.folder.round(unseen, number), self.chosen(unseen, number)
        trainings = []
        for place, domain in enumerate(chosen, start=1):
            if folder.upload(domain).exists():
                continue
            title = f"{unseen} unseen, round {number + 1} of {self.rounds}, client {place} of {len(chosen)} ({domain})"
            turn = Turn(number, self.rounds, self.schedule, handed.start.layers, self._gathered(unseen, number, domain))
            data = self.data.for_domain(domain, first_epoch=number * self.epochs)
            trainings.append(Training(self.client.for_turn(turn), data, folder, title))
        self.train_each(trainings)

    def _gathered(self, unseen: str, number: int, domain: str) -> dict[int, Any]:
        """What the client's optimizer has gathered in its last round before this; nothing if it has none."""
        before = [earlier for earlier in range(number) if domain in self.chosen(unseen, earlier)]
        if self.optimizer == "reset" or not before:
            return {}
        home = self.folder.round(unseen, before[-1]).client(domain)
        if (checkpoint := last_checkpoint(home)) is None:
            raise InputError(f"federation.optimizer keep: {home} holds no checkpoint of the client; use reset")
        return optimizer_state(checkpoint)

    # The server between two rounds

    def _hand_over(self, unseen: str, number: int, adapters: Sequence[Adapter]) -> Handed:
        """What a round hands to the clients of the next one, of what it got; made if it does not stand."""
        folder, record = self.folder.handed(unseen, number), self._record(adapters)
        handed = handed_in(folder, record)
        if handed is None:
            self._make(folder, adapters, record)
            handed = handed_in(folder, record)
        assert handed is not None
        return handed

    def _record(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """What decides what a round hands over."""
        return {
            "aggregation": self.way,
            "method": settings_of(self.method, self.method.sparsity, self.merge, self.anchors),
            "sources": [adapter.sha256 for adapter in adapters],
        }

    def _make(self, folder: Path, adapters: Sequence[Adapter], record: dict[str, Any]) -> None:
        self._require_alike(adapters)
        merged = self.evaluation.merge_of(adapters, self.method)
        if self.server.is_global_zero:
            start = self._start(merged)
            error = relative_error(merged.update, start)
            log.info("%s: relative error of %s %.2e (Frobenius norm)", folder, self.way, error)
            shutil.rmtree(folder, ignore_errors=True)
            hand_over(folder, self.merge.base, start, {**record, "relative_error": error, "rejected": merged.rejected})
        self.server.strategy.barrier()
        self.merge.set_update({})

    def _start(self, merged: Merged) -> dict[str, LoRALayer]:
        layers, rank = client_layers(merged.adapters), self.client.rank
        return {
            name: self.aggregation.start(layers[name], merged.weights, merged.update[name], rank) for name in layers
        }

    def _require_alike(self, adapters: Sequence[Adapter]) -> None:
        """A and B can be averaged apart where all clients have the same layers, of one rank and scale."""
        if self.aggregation.takes_methods:
            return
        kinds = {tuple((name, layer.rank, layer.scale) for name, layer in one.layers.items()) for one in adapters}
        if len(kinds) > 1:
            raise InputError(
                f"federation.aggregation {self.way}: the uploads differ in layers, rank or alpha; use flexlora"
            )
