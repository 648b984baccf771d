"""A client chooses the transformer blocks whose layers it sends: by how sensitive they are, or as it is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sap_lightning.data.loaders import Batch
from sap_lightning.functional.sensitivity import most_sensitive, relative_change, steepest
from sap_lightning.models.layers import hooked
from sap_lightning.modules.classifier import data_of
from sap_lightning.modules.client import undisturbed
from sap_lightning.modules.clip_lora import CLIPLoRAModule

log = logging.getLogger(__name__)
RADIUS = 1.0
"""Γ, the length by which a normalised image is changed: a hundredth of the image's own at 64 pixels."""


class SentBlocks(L.Callback):
    """Measures before training how sensitive each block is, and chooses the share of them that is most so.

    FibecFed's choice of the layers that are aggregated (EMNLP 2024, arXiv:2410.00131): I_l is the mean over the images
    of ‖h_l(x + ε*) − h_l(x)‖ / ‖h_l(x)‖, h_l the output of block l at the adapter that the client was given, and ε* the
    change of length Γ that raises the image's loss the most. The images are those that are trained on, not augmented.

    Where we deviate: theirs sends I_l first, the server averages it by the number of images, and all clients aggregate
    the same layers; how many, Hessian eigenvalues say. Our reading for one shot: each client sends the share that is
    most sensitive at its own site, and a layer that it does not send is ΔW = 0 in a merge.

    Args:
        sent: share of the blocks, or their numbers, in which case nothing is measured.

    Attributes:
        sensitivity: I_l by block; empty before it was measured, and where it is not asked for.
    """

    def __init__(self, sent: float | Sequence[int] = 1.0) -> None:
        self.sent = sent
        self.sensitivity: dict[int, float] = {}
        self._all: set[int] = set()

    @property
    def blocks(self) -> list[int] | None:
        """Numbers of the blocks whose layers are sent; None where those of all are. Known once training begins."""
        if self.sent == 1:
            return None
        chosen = self.sent if isinstance(self.sent, Sequence) else most_sensitive(self.sensitivity, self.sent)
        return None if self._all == set(chosen) else sorted(chosen)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, CLIPLoRAModule):
            return
        self._all = set(pl_module.blocks())
        if isinstance(self.sent, Sequence) or self.sent == 1 or self.sensitivity:
            return
        started = time.monotonic()
        self.sensitivity = self._measured(trainer, pl_module)
        said = ", ".join(f"{block} ({self.sensitivity[block]:.3f})" for block in sorted(self.sensitivity))
        log.info("sensitivity of blocks %s: %s are sent, %.0f s", said, self.blocks, time.monotonic() - started)

    def state_dict(self) -> dict[str, Any]:
        """The sensitivity, as it is that of the adapter before training."""
        return {"sensitivity": self.sensitivity} if self.sensitivity else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sensitivity = state_dict["sensitivity"]

    def _measured(self, trainer: L.Trainer, module: CLIPLoRAModule) -> dict[int, float]:
        # Every process has all images, so that the numbers do not depend on how many there are.
        data, sums, images = data_of(trainer), dict.fromkeys(sorted(self._all), 0.0), 0
        with undisturbed(module), _outputs(module.blocks()) as outputs:
            for batch in data.unchanged(data.batch_size, module.device):
                changes = self._changes(module, batch, outputs)
                for block, change in changes.items():
                    sums[block] += float(change.double().sum())
                images += len(batch.labels)
        return {block: total / images for block, total in sums.items()}

    @torch.enable_grad()
    def _changes(self, module: CLIPLoRAModule, batch: Batch, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """The relative change of every block's output, shape (n,)."""
        images = batch.images.detach().requires_grad_()
        with module.trainer.precision_plugin.forward_context():
            loss = cross_entropy(module(images), batch.labels, reduction="sum")
        before = dict(outputs)
        (gradients,) = torch.autograd.grad(loss, images)
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            module(images + steepest(gradients, RADIUS))
        return {block: relative_change(before[block], outputs[block]) for block in before}


@contextmanager
def _outputs(blocks: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The last output of each of these blocks, shape (n, T, d), float32."""
    latest: dict[int, Tensor] = {}

    def keep(number: int, block: nn.Module, inputs: Any, output: Any) -> None:
        latest[number] = (output[0] if isinstance(output, tuple) else output).detach().float()

    with hooked((block, partial(keep, number)) for number, block in blocks.items()):
        yield latest
