"""Saliency pruning as a callback: merges by SAP, and shows each client's pruning in TensorBoard."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L

from sap_lightning.callbacks.tensorboard import log_pruning
from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.on_top import pruning_in
from sap_lightning.merging.pruning import Pruning
from sap_lightning.merging.sap import SAP
from sap_lightning.modules.merge import MergeModule

log = logging.getLogger(__name__)


class SaliencyPruneCallback(L.Callback):
    """Prunes each adapter to its parameters of highest Taylor saliency on the anchors, and shows what is left of it.

    When a :class:`MergeModule` without a method of its own starts to validate on anchors, it merges by SAP at these
    settings, on the trainer's device and precision. Without settings the callback only shows, also of a module whose
    own method is a SAP, or has one under it as SAPAuto; of other methods the saliency is not known.

    Args:
        settings: those of :class:`sap_lightning.merging.SAP`, such as ``sparsity=0.9, space="factor"``.

    Raises:
        InputError: as SAP does; on use, when the module has another method than these settings.
    """

    def __init__(self, **settings: Any) -> None:
        self.method = SAP(**settings)
        self._has_settings = bool(settings)
        self._shown: set[tuple[str, str]] = set()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, MergeModule):
            return
        pl_module.offer(self.method)
        if self._has_settings and (method := pl_module.merge_method) != self.method:
            raise InputError(
                f"the module merges by {method.name}, this callback by sap at other settings; leave one out"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, MergeModule) or not pl_module.adapters:
            return
        merged = pl_module.merged
        assert merged is not None  # validation merges before its epoch
        pruning = pruning_in(merged.prepared)
        if pruning is None or not isinstance(pruning.method, SAP):
            return
        under = "" if isinstance(merged.method, SAP) else f" ({merged.method.name})"
        for adapter in merged.adapters:
            if (adapter.sha256, under) not in self._shown:
                self._shown.add((adapter.sha256, under))
                self._show(adapter, f"{adapter.name}{under}", pruning, trainer, pl_module)
        pl_module.set_update(merged.update)

    def _show(self, adapter: Adapter, label: str, pruning: Pruning, trainer: L.Trainer, module: MergeModule) -> None:
        scores, before = pruning.answer(adapter)
        after = module.probe().loss(pruning.pruned(adapter), pruning.method.loss)
        percent = 100 * pruning.method.sparsity
        log.info("%s: anchor loss %.4f, %.4f after pruning %g %%", label, before, after, percent)
        log_pruning(trainer, label, before, after, pruning.kept(adapter), scores)
