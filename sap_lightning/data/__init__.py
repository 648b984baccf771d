"""Lightning data modules: a client's domain, and the server's anchors."""

from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule

__all__ = ["AnchorDataModule", "DomainDataModule"]
