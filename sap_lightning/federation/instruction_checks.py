"""What is checked of a run of instruction tuning before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only

from sap_lightning.console import track
from sap_lightning.data.instructions import (
    SCORES_OF_TASKS,
    TEST,
    TRAIN,
    Encoder,
    InstructionDataModule,
    Sample,
    read_samples,
)
from sap_lightning.data.texts import check_tokens
from sap_lightning.errors import InputError, short
from sap_lightning.federation.systems import SYSTEMS
from sap_lightning.federation.unseen_task import ANCHORS
from sap_lightning.functional.answers import box_in
from sap_lightning.io.factors import Shapes
from sap_lightning.merging import MergeMethod
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.llava import FrozenVision, load_language_base


class BaseFacts(NamedTuple):
    """What uploads and conversations are checked against.

    Attributes:
        layers: of the language model's linear layers, by name.
        connector: of the connector's parameters, by name.
        fingerprint: of the base.
        config: of the language model.
        vision: what its tower makes of images; None of a language model alone.
    """

    layers: Shapes
    connector: dict[str, tuple[int, ...]]
    fingerprint: str
    config: Any
    vision: FrozenVision | None


def base_facts(name: str) -> BaseFacts:
    """Those of a folder or hub id."""
    base = load_language_base(name)
    connector = base.connector.state_dict() if base.connector is not None else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in connector.items()}
    return BaseFacts(layer_shapes(base.language), shapes, base.fingerprint, base.language.config, base.vision)


@dataclass(frozen=True)
class InstructionChecks:
    """Each raises InputError for what cannot work.

    Args:
        base: folder or hub id of the base.
        data: the clients' conversations.
    """

    base: str
    data: InstructionDataModule

    @property
    def tasks(self) -> list[str]:
        return sorted({*self.data.tasks.values()})

    def scores(self) -> None:
        """Scores are named of tasks that there are."""
        if unknown := self.data.scores.keys() - SCORES_OF_TASKS.keys() - {*self.tasks}:
            raise InputError(f"data.scores: no client is of the task {min(unknown)}; there are {', '.join(self.tasks)}")

    def images(self, facts: BaseFacts, systems: Sequence[str]) -> None:
        """A base that is shown images sees them."""
        if facts.connector:
            return
        if any(SYSTEMS[name].by_task for name in systems):
            raise InputError(
                f"federation.systems: pilot mixes connectors of images, and {self.base} is a language model that"
                " sees none; name local or fedit"
            )
        for client in self.data.clients:
            for file in (TRAIN, TEST):
                if self.data.samples(client, file)[0].image is not None:
                    raise InputError(f"{self.data.root / client / file}: has images, and {self.base} sees none")

    def boxes(self) -> None:
        """Where answers are judged by boxes, those that are expected hold one."""
        for client in self.data.clients:
            for sample in self.data.samples(client, TEST):
                if self.data.score_of(sample.task) == "iou" and box_in(sample.answer) is None:
                    raise InputError(
                        f"{sample.place}: {short(sample.answer)} holds no box [x1, y1, x2, y2], by which answers of"
                        f" {sample.task} are judged; or judge them otherwise, --data.scores '{{{sample.task}: f1}}'"
                    )

    def one_shot(self, methods: Sequence[MergeMethod], chosen: Sequence[str]) -> None:
        """Each task, left out, leaves as many of the first turn's clients as each method needs."""
        if len(self.tasks) < 2:
            raise InputError("federation.methods: all clients are of one task, so that none is unseen; leave it out")
        of_turn = [self.data.tasks[client] for client in chosen]
        for task in self.tasks:
            others = sum(one != task for one in of_turn)
            for method in methods:
                if others < method.least_clients:
                    raise InputError(
                        f"federation.methods: {method.name} needs clients of other tasks than {task}, at least"
                        f" {method.least_clients}, and the first turn has {others}; see federation.share or take others"
                    )

    def anchors(self, facts: BaseFacts, encoder: Encoder) -> None:
        """The base can read and see the conversations that methods look at."""
        self._readable(read_samples(self.data.anchors)[:ANCHORS], facts, encoder)

    @rank_zero_only
    def conversations(self, facts: BaseFacts, encoder: Encoder) -> None:
        """The base can read and see all conversations of all clients; one of several processes looks."""
        for client in self.data.clients:
            self._readable(self.data.samples(client, TRAIN), facts, encoder)
            self._readable(self.data.samples(client, TEST), facts, encoder, self.data.longest_answer)

    def _readable(self, samples: Sequence[Sample], facts: BaseFacts, encoder: Encoder, answered: int = 0) -> None:
        """With so many tokens of an answer of the base's own."""
        seen: set[Path] = set()
        for sample in track(samples, f"checking {samples[0].place.partition(': ')[0]}"):
            self._fits(sample, encoder.encode(sample).ids, facts, f"data.longest {self.data.longest}")
            if answered:
                ids = [*encoder.prompt(sample), *[0] * answered]
                self._fits(sample, ids, facts, f"data.longest_answer {answered}")
            if facts.vision is not None and sample.image is not None and sample.image not in seen:
                facts.vision.pixels(sample.image)
                seen.add(sample.image)

    def _fits(self, sample: Sample, ids: Sequence[int], facts: BaseFacts, setting: str) -> None:
        place = f"{sample.place} with {setting}"
        check_tokens([torch.tensor(ids)], facts.config, self.base, place, "set it lower")
