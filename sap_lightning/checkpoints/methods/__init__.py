"""Methods of whole models alone. Each lives in a file of its name and cites its source."""

from sap_lightning.checkpoints.methods.adamms import AdaMMS
from sap_lightning.checkpoints.methods.fam import FAM
from sap_lightning.checkpoints.methods.hm3 import HM3
from sap_lightning.checkpoints.methods.mergeme import MergeME
from sap_lightning.checkpoints.methods.safe_m import SafeM
from sap_lightning.checkpoints.methods.sap import WholeSAP
from sap_lightning.checkpoints.methods.stats_merging import WholeStatsMerging
from sap_lightning.merging import METHODS, MergeMethod

FUSE_METHODS: dict[str, type[MergeMethod]] = METHODS | {
    method.name: method for method in (WholeSAP, SafeM, FAM, AdaMMS, WholeStatsMerging, HM3, MergeME)
}
"""All methods that the command fuse knows by name."""

__all__ = ["FAM", "FUSE_METHODS", "HM3", "AdaMMS", "MergeME", "SafeM", "WholeSAP", "WholeStatsMerging"]
