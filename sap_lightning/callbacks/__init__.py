"""Lightning callbacks: scoring and pruning at the start of a merge."""

from sap_lightning.callbacks.prune import SaliencyPruneCallback

__all__ = ["SaliencyPruneCallback"]
