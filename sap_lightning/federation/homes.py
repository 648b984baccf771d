"""Prompt clients at their own sites: how well a prompt does there, alone and beside what a client remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.io.context import as_layer
from sap_lightning.modules.clip_prompt import CLIPPromptModule
from sap_lightning.modules.turn import Turn


class Homes:
    """The clients' sites, where each measures a prompt on the images that it held back from training.

    It has seen their domain, so this says nothing of unseen ones. What a client remembers is made there of its own
    images, and is not looked at from here.

    Args:
        client: the module of every client.
        data: the domains.
        evaluator: the trainer that measures.
    """

    def __init__(self, client: CLIPPromptModule, data: DomainDataModule, evaluator: L.Trainer) -> None:
        self.client = client
        self.data = data
        self.evaluator = evaluator
        self._measured: dict[tuple[str, bytes], Mapping[str, float]] = {}

    @property
    def memory(self) -> dict[str, Any]:
        """The settings of what a client adds to the prompt."""
        return asdict(self.client.memory)

    def accuracy(self, adapters: Sequence[Adapter], update: Mapping[str, Update], remembers: bool) -> float:
        """Mean accuracy at the sites of these clients.

        Args:
            adapters: of the clients.
            update: the prompt, the same for all.
            remembers: whether each adds what it remembers.
        """
        name = "val/personal_accuracy" if remembers else "val/accuracy"
        return sum(self._at_home(one.name, update)[name] for one in adapters) / len(adapters)

    def _at_home(self, domain: str, update: Mapping[str, Update]) -> Mapping[str, float]:
        (context,) = map(dense, update.values())
        measured = domain, context.numpy().tobytes()
        if measured not in self._measured:
            start = {name: as_layer(dense(layer)) for name, layer in update.items()}
            client, data = self.client.for_turn(Turn(start=start)), self.data.for_domain(domain)
            found = self.evaluator.validate(client, datamodule=data, verbose=False)
            if not found:
                raise InputError(
                    f"data.val_fraction {data.val_fraction} holds no image of {domain} back, on which its client could"
                    " measure a prompt; raise it"
                )
            self._measured[measured] = found[0]
        return self._measured[measured]


def images_at_home(data: DomainDataModule, adapters: Sequence[Adapter]) -> list[Any]:
    """Changes whenever what is measured at these clients' sites does."""
    return [data.val_fraction, {one.name: data.fingerprint(one.name) for one in adapters}]
