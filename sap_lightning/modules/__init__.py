"""Lightning modules: what a client trains, what the server merges, and what measures either."""

from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.clip_prompt import CLIPPromptModule
from sap_lightning.modules.evaluator import CLIPEvaluator
from sap_lightning.modules.merge import MergeModule
from sap_lightning.modules.vlm_lora import VLMLoRAModule

__all__ = ["CLIPEvaluator", "CLIPLoRAModule", "CLIPPromptModule", "MergeModule", "VLMLoRAModule"]
