"""Lightning callbacks: SAP for modules that merge on anchors, and what it pruned, shown."""

from sap_lightning.callbacks.prune import SaliencyPruneCallback

__all__ = ["SaliencyPruneCallback"]
