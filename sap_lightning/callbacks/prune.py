"""Scores every adapter on the anchors and prunes it, at the start of the merge."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import lightning as L
import torch
from torch import Tensor

from sap_lightning.adapter import Adapter
from sap_lightning.callbacks.figures import log_pruning
from sap_lightning.callbacks.progress import track
from sap_lightning.errors import InputError
from sap_lightning.functional.masking import Scope, keep_masks
from sap_lightning.functional.saliency import Reduction, alignment_loss
from sap_lightning.functional.spaces import SPACES, Parameters, Space, SpaceName, Update
from sap_lightning.modules.classifier import data_of
from sap_lightning.modules.merge import MergeModule
from sap_lightning.scoring import AnchorScores, score

log = logging.getLogger(__name__)


class SaliencyPruneCallback(L.Callback):
    """Zeroes the share ρ of each adapter's parameters whose Taylor saliency on the anchors is lowest.

    It acts when a :class:`MergeModule` starts to validate on anchors, on the trainer's device and precision. An
    adapter is scored once for as long as the callback lives, however often it is merged.

    Args:
        sparsity: ρ, the share of parameters set to zero.
        space: what is scored and masked: elements of A and B (factor), elements of ΔW (delta), or singular
            triplets of ΔW (singular).
        scope: one threshold for the whole adapter (global) or one for each layer (layer).
        reduction: how the anchors' gradients g_i become one score: |θ·mean g_i| (mean_then_abs),
            mean |θ·g_i| (abs_then_mean) or mean (θ·g_i)² (square).

    Raises:
        InputError: when ρ is outside [0, 1].
    """

    def __init__(
        self,
        sparsity: float = 0.8,
        space: SpaceName = "delta",
        scope: Scope = "global",
        reduction: Reduction = "abs_then_mean",
    ) -> None:
        if not 0 <= sparsity <= 1:
            raise InputError(f"prune.sparsity must lie in [0, 1], got {sparsity}")
        self.sparsity = sparsity
        self.space = space
        self.scope = scope
        self.reduction = reduction
        self._spaces: dict[str, dict[str, Space]] = {}
        self._scores: dict[str, AnchorScores] = {}

    @property
    def settings(self) -> dict[str, float | str]:
        """What decides the outcome, by its command-line name."""
        return {name: getattr(self, name) for name in ("sparsity", "space", "scope", "reduction")}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, MergeModule):
            return
        pl_module.check_rescale(self.space)
        pl_module.encode_captions(data_of(trainer).captions)
        for adapter in track(pl_module.adapters, "scoring and pruning"):
            first_time = adapter.sha256 not in self._scores
            if first_time:
                self._score(adapter, trainer, pl_module)
            masks = keep_masks(self._scores[adapter.sha256].saliency, self.sparsity, self.scope)
            pl_module.use_pruned(adapter, self._prune(adapter, masks), self.settings)
            if first_time:
                self._report(adapter, masks, trainer, pl_module)

    def _score(self, adapter: Adapter, trainer: L.Trainer, module: MergeModule) -> None:
        space = SPACES[self.space]
        self._spaces[adapter.sha256] = {name: space(layer.to(module.device)) for name, layer in adapter.layers.items()}
        module.set_update(adapter.layers)
        assert module.tower is not None
        # Validation runs without gradients; scoring is made of them.
        with torch.inference_mode(False), torch.enable_grad():
            scores = score(
                module.tower,
                lambda images: _features(trainer, module, images),
                self._spaces[adapter.sha256],
                _anchors(trainer, module),
                self.reduction,
                lambda tensor: _sum_over_processes(trainer, tensor),
            )
        if any(not tensor.isfinite().all() for layer in scores.saliency.values() for tensor in layer):
            raise InputError(
                f"upload {adapter.name!r}: its saliency on the anchors is not finite; its weights are too large"
                f" for precision {trainer.precision}, try --trainer.precision 32-true or leave it out"
            )
        self._scores[adapter.sha256] = scores

    def _prune(self, adapter: Adapter, masks: Mapping[str, Parameters]) -> dict[str, Update]:
        return {
            name: space.update(
                tuple(theta * mask for theta, mask in zip(space.parameters, masks[name], strict=True))
            ).to("cpu")
            for name, space in self._spaces[adapter.sha256].items()
        }

    def _report(
        self, adapter: Adapter, masks: Mapping[str, Parameters], trainer: L.Trainer, module: MergeModule
    ) -> None:
        module.set_update(module.pruned[adapter.sha256])
        before, after = self._scores[adapter.sha256].loss, anchor_loss(trainer, module)
        log.info("%s: anchor loss %.4f, %.4f after pruning %g %%", adapter.name, before, after, 100 * self.sparsity)
        log_pruning(trainer, adapter.name, before, after, masks, self._scores[adapter.sha256].saliency)


@torch.no_grad()
def anchor_loss(trainer: L.Trainer, module: MergeModule) -> float:
    """Mean alignment loss over all anchors with the module's present weights."""
    loss = torch.zeros(2)
    for images, captions in _anchors(trainer, module):
        losses = alignment_loss(_features(trainer, module, images).float(), captions)
        loss += torch.tensor([losses.sum().item(), len(losses)])
    total, count = _sum_over_processes(trainer, loss).tolist()
    return total / count


def _sum_over_processes(trainer: L.Trainer, tensor: Tensor) -> Tensor:
    # Processes on GPUs can only add up what lies there.
    return trainer.strategy.reduce(tensor.to(trainer.strategy.root_device), reduce_op="sum")


def _anchors(trainer: L.Trainer, module: MergeModule) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in trainer.val_dataloaders or ():
        # This runs the data module's transfer hooks too: the images arrive normalised.
        batch = trainer.strategy.batch_to_device(batch, module.device)
        yield batch.images, module.caption_features[batch.indices]


def _features(trainer: L.Trainer, module: MergeModule, images: Tensor) -> Tensor:
    # Saliency spans more orders of magnitude than float16 does: score in float32 where training uses it.
    if trainer.precision == "16-mixed":
        return module.image_features(images)
    with trainer.precision_plugin.forward_context():
        return module.image_features(images)
