"""Lightning modules: what a client trains, and what the server merges."""

from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule

__all__ = ["CLIPLoRAModule", "MergeModule"]
