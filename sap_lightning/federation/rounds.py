"""Several rounds: what the clients sent is merged, and they go on from there; the first round is one shot."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.federation.aggregation import Way, joined, next_start, on_the_base
from sap_lightning.federation.client import TrainerFactory
from sap_lightning.federation.handed import Handed, hand_over, handed_in
from sap_lightning.federation.one_shot import OneShotFederation, chosen_domains
from sap_lightning.federation.points import Plan, Point, Points, Sent, settings_of
from sap_lightning.federation.turns import Agreement, Optimizer, folded_in, taking_part
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.rescaling import relative_error
from sap_lightning.io.adapter import Adapter, Expected
from sap_lightning.io.manifest import MOST_ROUNDS
from sap_lightning.merging import Average, MergeMethod
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.registry import method_of
from sap_lightning.models.layers import block_of
from sap_lightning.models.lora import check_rank
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.turn import Span

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A round whose clients train elsewhere.

    Attributes:
        unseen: the domain that the round is played for.
        number: of the round, from 1: the first is asked before there is a federation.
        handed: what the rounds before have handed over.
        last: the clients that take part, and the last round before in which each did, if it did.
        expected: of an upload.
    """

    unseen: str
    number: int
    handed: Sequence[Handed]
    last: Mapping[str, int | None]
    expected: Expected


Ask = Callable[[Asked], None]
"""Gets the uploads of a round that do not stand; raises InputError where one does not come."""


class _Weighted(NamedTuple):
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    merged: Mapping[str, Update] = {}
    rejected: Sequence[str] = ()


class RoundsFederation(OneShotFederation):
    """Federated averaging (McMahan et al. 2017, arXiv:1602.05629) of adapters; with one round it is the one shot.

    In every round clients train on from what the round before has handed over, and upload; the server merges. What it
    makes of the last round's uploads is measured. An unseen domain's client has no part in any round before, so all
    rounds but the first are played anew for each unseen domain.

    Args:
        rounds: how often the clients train and upload.
        epochs_per_round: epochs of a client in a round; trainer.max_epochs if not given.
        total_epochs: epochs of a client in all rounds together, in place of those in one: many rounds are as much work
            as few.
        share: share of the clients that take part in a round, at least one, drawn by the seed.
        ranks: LoRA ranks of clients that train another than model.rank, by domain.
        aggregation: what adapters become before the next round, see :mod:`sap_lightning.federation.aggregation`; of
            prompts it starts from their merge.
        optimizer: clients start each round with a new one (reset), or with what theirs has gathered (keep).
        schedule: the learning rate falls once over all rounds (whole), or in each (round).
        last_method: merges the last round: a method, or the name of one at its own settings; merge.method if not given.
        method: merges the rounds before; the plain average if not given.
        ask: gets the uploads of all rounds but the first, whose `uploads` are given, from clients that train elsewhere.
        one_shot: arguments of :class:`OneShotFederation`.

    Raises:
        InputError: for numbers out of range, or settings that contradict each other.
    """

    def __init__(
        self,
        rounds: int = 1,
        epochs_per_round: int | None = None,
        total_epochs: int | None = None,
        share: float = 1.0,
        ranks: dict[str, int] | None = None,
        aggregation: Way = "flexlora",
        optimizer: Optimizer = "reset",
        schedule: Span = "whole",
        last_method: MergeMethod | str | None = None,
        method: MergeMethod | None = None,
        ask: Ask | None = None,
        **one_shot: Any,
    ) -> None:
        check_at_least("federation.rounds", rounds, 1)
        if rounds > MOST_ROUNDS:
            raise InputError(f"federation.rounds {rounds}: a manifest counts {MOST_ROUNDS:,} at most")
        if epochs_per_round is not None and total_epochs is not None:
            raise InputError(
                "federation.total_epochs stands in place of federation.epochs_per_round; leave one of them out"
            )
        if last_method is not None:
            last = method_of(last_method, "federation.last_method")
            one_shot["plan"] = Plan({one.name: one for one in (Average(), last)})
        super().__init__(**one_shot)
        self.rounds = rounds
        self.epochs_per_round = _shared_out(total_epochs, rounds) if total_epochs is not None else epochs_per_round
        self.share = share
        self.ranks = ranks or {}
        way = "promptfl" if self.client.kind == "prompt" else aggregation
        self.agreed = Agreement(rounds, way, optimizer, schedule, self.client.named_blocks)
        self.aggregation = self.agreed.aggregation
        self.method = method if method and self.aggregation.takes_methods else Average()
        self._ask = ask
        self._played: dict[str, Points] = {}
        self._check_numbers()
        if rounds > 1:
            self._check_rounds()
        if last_method is not None and method is not None and (rounds == 1 or self.method is not method):
            why = "there is one round" if rounds == 1 else f"{aggregation} averages the clients"
            raise InputError(f"federation.last_method: nothing would use merge.method, as {why}; leave one of them out")

    def _check_numbers(self) -> None:
        if self.epochs_per_round is not None:
            check_at_least("federation.epochs_per_round", self.epochs_per_round, 1)
        check_share("federation.share", self.share)
        if self.ranks and self.client.kind == "prompt":
            raise InputError("federation.ranks is for clients that train LoRA; leave it out")
        if self.ranks:
            chosen_domains("federation.ranks", list(self.ranks), self.data.domains)
        for domain, rank in self.ranks.items():
            check_rank(f"federation.ranks.{domain}", rank)

    def _check_rounds(self) -> None:
        """Settings that do not go together with several rounds, or with the way that they are aggregated."""
        way, of, fault = self.agreed.way, self.aggregation, ""
        if self.agreed.optimizer == "keep" and not of.keeps_factors:
            fault = f"federation.optimizer keep: {way} hands over factors that no optimizer knows; use reset, or fedit"
        elif self.ranks and not of.takes_ranks:
            fault = f"federation.ranks: {way} takes clients of one rank; use --federation.aggregation flexlora"
        elif self.merge.reject_outliers and (of.folds or of.sent == "A"):
            fault = f"merge.reject_outliers: anchors cannot judge what clients of {way} send; use flexlora"
        elif self.merge.weights == "reach":
            fault = "merge.weights reach: clients say theirs in the last round alone; use samples or uniform"
        elif self.uploads is not None and self._ask is None:
            fault = "federation.rounds: clients that train elsewhere are asked once; set --federation.rounds 1"
        elif self._ask and (self.ranks or self.epochs_per_round):
            fault = "federation: clients that train elsewhere have ranks and epochs of their own; leave them out here"
        elif self.poison is not None:
            fault = "federation.poison is for one round; leave it out, or set --federation.rounds 1"
        elif self.uploads is None and self.epochs < 1:
            fault = "federation.rounds: set federation.epochs_per_round, as trainer.max_epochs names no number"
        elif self.client.sent_blocks != 1 and self.agreed.blocks is None:
            fault = "model.sent_blocks: in several rounds all clients send the same blocks; name them, such as [2,3]"
        elif self.agreed.blocks is not None and (of.folds or of.sent_in(last_round=False) != "AB"):
            fault = f"model.sent_blocks: {way} needs all layers of a client; use fedit, flexlora or lora_fair"
        if fault:
            raise InputError(fault)

    @property
    def epochs(self) -> int:
        """Epochs of a client in a round."""
        return self.epochs_per_round or self.server.max_epochs or 0

    @property
    def client_trainer(self) -> TrainerFactory:
        if self.epochs_per_round is None:
            return super().client_trainer
        return partial(super().client_trainer, max_epochs=self.epochs_per_round)

    @property
    def merging(self) -> Mapping[str, MergeMethod]:
        return super().merging if self.rounds == 1 else {**super().merging, self.method.name: self.method}

    # Who takes part

    def chosen(self, unseen: str, number: int) -> list[str]:
        """The clients of a round, of an unseen domain's."""
        return taking_part(super().senders(unseen), self.share, self.data.seed + number)

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
        if self.uploads is None:
            self._say_how_many()
            self.train()
        self._played = {unseen: self.points_of(self._play(unseen)) for unseen in self.unseen}
        self.sent = self.sent_for(self.unseen[0])

    def _say_how_many(self) -> None:
        later = sum(len(self.chosen(unseen, number)) for unseen in self.unseen for number in range(1, self.rounds))
        log.info("%d rounds of %d epochs: %d trainings in the first round", self.rounds, self.epochs, len(self.domains))
        log.info("%d in the others, played for each of %d unseen domains (federation.unseen)", later, len(self.unseen))

    def sent_for(self, unseen: str) -> Sent:
        return self._played[unseen].sent if self._played else super().sent_for(unseen)

    def points_on(self, unseen: str) -> list[Point]:
        return list(self._played[unseen].on(unseen)) if self._played else super().points_on(unseen)

    def first_client(self, domain: str) -> ClientModule:
        return self.client.for_turn(self.agreed.turn(0, self.ranks.get(domain)))

    def first_data(self, domain: str) -> DomainDataModule:
        return self._data(0, domain)

    def _data(self, number: int, domain: str) -> DomainDataModule:
        """What a client trains on in a round."""
        if self.rounds == 1:
            return super().first_data(domain)
        return self.data.for_domain(domain, first_epoch=number * self.epochs, all_epochs=self.rounds * self.epochs)

    def _play(self, unseen: str) -> Sent:
        """What the clients send in the last round for an unseen domain, after all rounds before."""
        handed: list[Handed] = []
        sent, crossed = self._uploads(unseen, 0, handed), 0
        for number in range(1, self.rounds):
            handed.append(self._hand_over(unseen, number - 1, sent))
            crossed += sum(adapter.size for adapter in sent) + self._downloads(unseen, number, handed)
            (self._ask_round if self._ask else self._train_round)(unseen, number, handed)
            sent = self._uploads(unseen, number, handed)
        return Sent(on_the_base(sent, folded_in(handed)), rounds=self.rounds, bytes_before=crossed)

    def _uploads(self, unseen: str, number: int, handed: Sequence[Handed]) -> list[Adapter]:
        folder = self.folder.round(unseen, number)
        uploads = [folder.upload(domain) for domain in self.chosen(unseen, number)]
        sent = self.collect(uploads, number, self._expected(number, handed))
        if self.agreed.blocks is not None:
            _require_blocks(sent, self.agreed.blocks)
        return sent

    def _expected(self, number: int, handed: Sequence[Handed] = ()) -> Expected:
        """What the server expects of an upload of a round."""
        return self.agreed.expected(number, lambda: self._drawn, handed)

    @cached_property
    def _drawn(self) -> dict[str, LoRALayer]:
        """What all clients start from in the first round, which the seed gives the server too."""
        assert isinstance(self.client, CLIPLoRAModule)  # of a prompt all is sent
        return self.client.drawn()

    def _ask_round(self, unseen: str, number: int, handed: Sequence[Handed]) -> None:
        assert self._ask is not None
        last = {domain: self._last_round(unseen, number, domain) for domain in self.chosen(unseen, number)}
        self._ask(Asked(unseen, number, handed, last, self._expected(number, handed)))

    def _train_round(self, unseen: str, number: int, handed: Sequence[Handed]) -> None:
        folder, chosen, trainings = self.folder.round(unseen, number), self.chosen(unseen, number), []
        for place, domain in enumerate(chosen, start=1):
            if folder.upload(domain).exists():
                continue
            title = f"{unseen} unseen, round {number + 1} of {self.rounds}, client {place} of {len(chosen)} ({domain})"
            turn = self.agreed.turn(number, self.ranks.get(domain), handed, self._last_home(unseen, number, domain))
            data = self._data(number, domain)
            trainings.append(self.training(self.client.for_turn(turn), data, folder, title))
        self.train_each(trainings)

    # What a client keeps from one of its rounds to the next

    def _last_round(self, unseen: str, number: int, domain: str) -> int | None:
        """The last round before this in which a client took part."""
        return next((one for one in reversed(range(number)) if domain in self.chosen(unseen, one)), None)

    def _last_home(self, unseen: str, number: int, domain: str) -> Path | None:
        """Where a client trained in it."""
        last = self._last_round(unseen, number, domain)
        return None if last is None else self.folder.round(unseen, last).client(domain)

    # The server between two rounds

    def _downloads(self, unseen: str, number: int, handed: Sequence[Handed]) -> int:
        """Bytes that go down for a round: the start, and what was added to the base since a client's last round."""
        total = 0
        for domain in self.chosen(unseen, number):
            total += handed[-1].start.size if handed[-1].start else 0
            missed = handed[self._last_round(unseen, number, domain) or 0 :]
            total += sum(adapter.size for adapter in folded_in(missed))
        return total

    def _hand_over(self, unseen: str, number: int, adapters: Sequence[Adapter]) -> Handed:
        """What a round hands to the clients of the next one, of what it got; made if it does not stand."""
        folder, record = self.folder.handed(unseen, number), self._record(adapters)
        handed = handed_in(folder, self._expected(number), record)
        if handed is None:
            self._make(folder, number, adapters, record)
            handed = handed_in(folder, self._expected(number), record)
        assert handed is not None
        return handed

    def _record(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """What decides what a round hands over."""
        return {
            "aggregation": self.agreed.way,
            "method": settings_of(self.method, self.method.sparsity, self.merge, self.anchors, adapters),
            "sources": [adapter.sha256 for adapter in adapters],
        }

    def _make(self, folder: Path, number: int, adapters: Sequence[Adapter], record: Mapping[str, Any]) -> None:
        self._require_alike(adapters)
        expected = self._expected(number)
        part = self._weighted(adapters, expected)
        if self.server.is_global_zero:
            layers, rank = client_layers(part.adapters), max([self.client.rank, *self.ranks.values()])
            start, folded = next_start(self.aggregation, layers, part.weights, part.merged, rank)
            error = relative_error(part.merged, joined(start, folded)) if part.merged else None
            if error is not None:
                log.info("%s: relative error of %s %.2e (Frobenius norm)", folder, self.agreed.way, error)
            found = {"relative_error": error, "rejected": list(part.rejected)}
            shutil.rmtree(folder, ignore_errors=True)
            hand_over(folder, self.merge.base, start, folded, expected, {**record, **found})
        self.server.strategy.barrier()

    def _weighted(self, adapters: Sequence[Adapter], expected: Expected) -> _Weighted:
        """Each upload's share of the whole, and their merge where they are updates that can be merged."""
        if expected.sent == "A":
            return _Weighted(adapters, self.merge.weights_of(adapters, self.method))
        merged = self.evaluation.merge_of(adapters, self.method)
        self.merge.set_update({})
        return _Weighted(merged.adapters, merged.weights, merged.update, merged.rejected)

    def _require_alike(self, adapters: Sequence[Adapter]) -> None:
        """A and B can be averaged apart where all clients have the same layers, of one rank and scale."""
        if self.aggregation.takes_ranks:
            return
        kinds = {tuple((name, layer.rank, layer.scale) for name, layer in one.layers.items()) for one in adapters}
        if len(kinds) > 1:
            raise InputError(
                f"federation.aggregation {self.agreed.way}: the uploads differ in layers, rank or alpha; use flexlora"
                " or flora"
            )


def _require_blocks(adapters: Sequence[Adapter], blocks: Sequence[int]) -> None:
    """A layer that a client of a round does not send is its own, and not 0."""
    for adapter in adapters:
        found = {block for layer in adapter.layers if (block := block_of(layer)) is not None}
        if found != set(blocks):
            raise InputError(
                f"upload {adapter.name!r} has layers of blocks {sorted(found)}, model.sent_blocks is {list(blocks)};"
                " remove it, and its client goes on"
            )


def _shared_out(total_epochs: int, rounds: int) -> int:
    """Epochs of each round."""
    check_at_least("federation.total_epochs", total_epochs, 1)
    if total_epochs % rounds:
        raise InputError(f"federation.total_epochs {total_epochs}: cannot be shared out evenly over {rounds} rounds")
    return total_epochs // rounds
