"""A client goes on training a part of its adapter only: the rows that its images say most of."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sap_lightning.callbacks.sent_blocks import SentBlocks
from sap_lightning.data.loaders import Batch
from sap_lightning.functional.fisher import moving_average, rows_kept, sample_squares
from sap_lightning.models.layers import block_of
from sap_lightning.modules.client import undisturbed
from sap_lightning.modules.clip_lora import CLIPLoRAModule

log = logging.getLogger(__name__)
MOMENTUM = 0.9
BATCHES = 10
"""First batches that are looked at: as many as the momentum remembers."""


class SparseUpdate(L.Callback):
    """Keeps all rows of A and B but those of the largest Fisher information as they are after the first batches.

    FibecFed's local update (EMNLP 2024, arXiv:2410.00131): F ← γ·F + (1 − γ)·f over the first batches, in which all is
    trained, with f the mean over a batch's images of the squared gradient of −log p(y|x). A share of the neurons of
    every matrix, those of the largest sum of F, is trained on; the others are put back after every step of the
    optimizer, which moves them by momentum and weight decay even where they have no gradient.

    Our reading: a neuron is a row of B, an output of the layer, and of A one of its r directions; the images are those
    of the step, augmented as they are, and without dropout. Like theirs it is for layers that stay at home; where all
    are sent, it is for all of them.

    Args:
        share: of the rows that are trained on; 1 leaves nothing out.
        sent: says which layers stay at home.

    Attributes:
        kept: True at the rows that are trained on, shape (rows, 1), by parameter; empty during the first batches.
    """

    def __init__(self, share: float, sent: SentBlocks) -> None:
        self.share = share
        self.sent = sent
        self.kept: dict[str, Tensor] = {}
        self._seen = 0
        self._information: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.share == 1 or not isinstance(pl_module, CLIPLoRAModule):
            return
        parameters = self._sparse(pl_module)
        if self._seen < BATCHES:
            self._look(trainer, pl_module, parameters, batch)
        else:
            self._before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._seen == BATCHES and not self.kept:
            self.kept = {name: rows_kept(rows, self.share) for name, rows in self._information.items()}
            self._information = {}
        for name, before in self._before.items():
            parameter = pl_module.get_parameter(name)
            parameter.copy_(torch.where(self.kept[name].to(parameter.device), parameter, before))
        self._before = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.share < 1 and not self.kept:
            log.warning("model.trained_rows had no effect: training ended within its first %d batches", BATCHES)

    def state_dict(self) -> dict[str, Any]:
        """What was gathered, and what was chosen."""
        state = {"seen": self._seen, "information": self._information, "kept": self.kept}
        return state if self._seen else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen, self._information = state_dict["seen"], state_dict["information"]
        self.kept = state_dict["kept"]

    def _sparse(self, module: CLIPLoRAModule) -> dict[str, nn.Parameter]:
        """The parameters of which a part is trained on."""
        sent = self.sent.blocks
        return {
            name: parameter
            for name, parameter in module.trained_parameters().items()
            if sent is None or block_of(name) not in (None, *sent)
        }

    @torch.enable_grad()
    def _look(
        self, trainer: L.Trainer, module: CLIPLoRAModule, parameters: dict[str, nn.Parameter], batch: Batch
    ) -> None:
        """Adds what one batch says of the rows; with several processes each has a part of it."""
        total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
        with undisturbed(module):
            for squares in sample_squares(module.sample_losses([batch]), list(parameters.values())):
                for gathered, square in zip(total.values(), squares, strict=True):
                    gathered += square / len(batch.labels)
        for name, latest in total.items():
            mean = trainer.strategy.reduce(latest, reduce_op="mean")
            before = self._information.get(name)
            self._information[name] = moving_average(before, mean, MOMENTUM)
        self._seen += 1
