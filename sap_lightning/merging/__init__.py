"""Merge methods: K adapters → one update of the base. Each lives in a file of its name and cites its source."""

from sap_lightning.merging.adamerging import AdaMerging
from sap_lightning.merging.at_reach import AtReach
from sap_lightning.merging.ata import ATA
from sap_lightning.merging.ataf import ATAF
from sap_lightning.merging.average import Average
from sap_lightning.merging.breadcrumbs import Breadcrumbs
from sap_lightning.merging.cart import CART
from sap_lightning.merging.consensus import Consensus
from sap_lightning.merging.core_space import CoreSpace
from sap_lightning.merging.dare import DARE
from sap_lightning.merging.dc_merge import DCMerge
from sap_lightning.merging.della import DELLA
from sap_lightning.merging.fedavg import FedAvg
from sap_lightning.merging.fisher import Fisher
from sap_lightning.merging.grasp import GRASP
from sap_lightning.merging.iso_c import IsoC
from sap_lightning.merging.iso_cts import IsoCTS
from sap_lightning.merging.knots import KnOTS
from sap_lightning.merging.krum import Krum
from sap_lightning.merging.lines import LiNeS
from sap_lightning.merging.lora_lego import LoRALEGO
from sap_lightning.merging.lorm import LoRM
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.median import Median
from sap_lightning.merging.method import LayerwiseMethod, MergeMethod, Prepared
from sap_lightning.merging.opnp import OPNP
from sap_lightning.merging.pcb import PCB
from sap_lightning.merging.pruner_zero import PrunerZero
from sap_lightning.merging.pruning import Pruning, PruningMethod
from sap_lightning.merging.random_pruning import RandomPruning
from sap_lightning.merging.registry import METHODS, method_named
from sap_lightning.merging.regmean import RegMean
from sap_lightning.merging.robustmerge import RobustMerge
from sap_lightning.merging.sap import SAP
from sap_lightning.merging.sap_auto import SAPAuto
from sap_lightning.merging.sce import SCE
from sap_lightning.merging.sens_merging import SensMerging
from sap_lightning.merging.stats_merging import StatsMerging
from sap_lightning.merging.task_arithmetic import TaskArithmetic
from sap_lightning.merging.ties import TIES
from sap_lightning.merging.trimmed_mean import TrimmedMean
from sap_lightning.merging.tsv_m import TSVM
from sap_lightning.merging.wise_ft import WiSEFT
from sap_lightning.merging.wudi import WUDI

METHODS |= {
    method.name: method
    for method in (
        Average, FedAvg, TaskArithmetic, TIES, DARE, Magnitude, RandomPruning, RobustMerge, KnOTS, Fisher, RegMean,
        LoRM, SensMerging, OPNP, PrunerZero, GRASP, ATA, ATAF, SAP, SAPAuto, Median, TrimmedMean, Krum,
        TSVM, IsoC, IsoCTS, CART, WUDI, DCMerge,
        DELLA, Breadcrumbs, Consensus, PCB, SCE,
        WiSEFT, LiNeS, CoreSpace, LoRALEGO, AdaMerging, StatsMerging, AtReach,
    )
}  # fmt: skip

__all__ = [
    "ATA", "ATAF", "CART", "DARE", "DELLA", "GRASP", "METHODS", "OPNP", "PCB", "SAP", "SCE", "TIES", "TSVM", "WUDI",
    "AdaMerging", "AtReach", "Average", "Breadcrumbs", "Consensus", "CoreSpace", "DCMerge", "FedAvg", "Fisher", "IsoC",
    "IsoCTS", "KnOTS", "Krum", "LayerwiseMethod", "LiNeS", "LoRALEGO", "LoRM", "Magnitude", "Median", "MergeMethod",
    "Prepared", "PrunerZero", "Pruning", "PruningMethod", "RandomPruning", "RegMean", "RobustMerge", "SAPAuto",
    "SensMerging", "StatsMerging", "TaskArithmetic", "TrimmedMean", "WiSEFT", "method_named",
]  # fmt: skip
