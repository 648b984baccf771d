"""Saliency pruning as a callback: merges by SAP, and shows each client's pruning in TensorBoard."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L

from sap_lightning.adapter import Adapter
from sap_lightning.callbacks.figures import log_pruning
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.saliency import AnchorLoss, Reduction
from sap_lightning.functional.spaces import SpaceName
from sap_lightning.merging.sap import SAP
from sap_lightning.modules.merge import MergeModule

log = logging.getLogger(__name__)


class SaliencyPruneCallback(L.Callback):
    """Zeroes the share ρ of each adapter's parameters whose Taylor saliency on the anchors is lowest.

    It acts when a :class:`MergeModule` without a method of its own starts to validate on anchors, on the trainer's
    device and precision. An adapter is scored once for as long as the callback lives, however often it is merged.

    Args:
        sparsity: ρ, the share of parameters set to zero.
        space: what is scored and masked: elements of A and B (factor), elements of ΔW (delta), or singular
            triplets of ΔW (singular).
        scope: one threshold for the whole adapter (global) or one for each layer (layer).
        reduction: how the anchors' gradients g_i become one score: |θ·mean g_i| (mean_then_abs),
            mean |θ·g_i| (abs_then_mean) or mean (θ·g_i)² (square).
        loss: the anchors' loss: 1 − cos of a pair (cosine), or InfoNCE from image to text (contrastive).
        sign_aware: keep the parameters that lower the loss most, −θ·mean g_i; needs reduction mean_then_abs.

    Raises:
        InputError: when ρ is outside [0, 1], or for a combination that is not defined.
    """

    def __init__(
        self,
        sparsity: float = 0.8,
        space: SpaceName = "delta",
        scope: Scope = "global",
        reduction: Reduction = "abs_then_mean",
        loss: AnchorLoss = "cosine",
        sign_aware: bool = False,
    ) -> None:
        self.settings: dict[str, Any] = {
            "sparsity": sparsity,
            "space": space,
            "scope": scope,
            "reduction": reduction,
            "loss": loss,
            "sign_aware": sign_aware,
        }
        self._scored = SAP(**self.settings)
        self._reported: set[str] = set()

    def method_for(self, module: MergeModule) -> SAP:
        """SAP as this callback and the module's way of rescaling say; it shares what was scored before.

        Raises:
            InputError: when that way of rescaling is not defined in this space.
        """
        method = SAP(**self.settings, rescale=module.rescale, rescale_scope=module.rescale_scope, scale=module.scale)
        method.share_answers(self._scored)
        return method

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, MergeModule) and pl_module.method is None:
            pl_module.offered_method = self.method_for(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The module has merged by now.
        if not (isinstance(pl_module, MergeModule) and isinstance(pl_module.merge_method, SAP)):
            return
        merged = pl_module.update
        for adapter in pl_module.adapters:
            if adapter.sha256 not in self._reported:
                self._reported.add(adapter.sha256)
                self._report(adapter, pl_module.merge_method, trainer, pl_module)
        pl_module.set_update(merged)

    def _report(self, adapter: Adapter, method: SAP, trainer: L.Trainer, module: MergeModule) -> None:
        before = method.loss_before(adapter)
        after = module.probe().loss(method.pruned(adapter, method.sparsity), method.loss)
        masks = method.kept(adapter, method.sparsity)
        log.info("%s: anchor loss %.4f, %.4f after pruning %g %%", adapter.name, before, after, 100 * method.sparsity)
        log_pruning(trainer, adapter.name, before, after, masks, method.evidence(adapter))
