"""GradPruner: blocks that LoRA's first steps hardly pull at are dropped, and merged into those before them.

ICLR 2026, arXiv:2601.19503; reference code: secretflow/ACoLab, PaperCode/GradPrune (trainer.py, layer_important.py and
layer_prune/process_important.py), which merges three blocks that are chosen by hand; here every dropped one is merged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import Calibration
from sap_lightning.compression.low_rank import weight_of
from sap_lightning.console import track
from sap_lightning.errors import check_at_least, check_share
from sap_lightning.functional.igia import BlockScore, igia_matrix, importance, merged_weight
from sap_lightning.functional.lora import LoRALayer

RANK, ALPHA, LEARNING_RATE, LARGEST_NORM = 8, 32, 1e-4, 1.0
"""Of LoRA and its training, as the authors have them."""
Steps = Mapping[int, Mapping[str, list[LoRALayer]]]
"""By block and layer: at every step ∇A (r, d_in) as A and ∇B (d_out, r) as B."""


@dataclass(frozen=True)
class GradPruner:
    """Drops blocks, and adds the weights that matter most in them to the blocks before, where both have one sign.

    Args:
        score: how a block matters, see `importance`.
        density: share of a dropped weight's elements that may be added.
        steps: of LoRA's training. At the first of them B is 0, so that it says nothing.
        seed: of LoRA's A.
    """

    score: BlockScore = "paper"
    density: float = 0.2
    steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("compress.density", self.density)
        check_at_least("compress.steps", self.steps, 2)

    @property
    def settings(self) -> dict[str, Any]:
        """All that it is, as JSON knows it."""
        return asdict(self)

    def first_steps(self, blocks: Blocks, shown: Calibration) -> Steps:
        """Trains LoRA on every linear layer for some steps, keeps its gradients, and takes it off again."""
        layers = {(number, name): layer for number in blocks.numbers for name, layer in blocks.linears(number).items()}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            targets = [f"{blocks.name}.{number}.{name}" for number, name in layers]
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), blocks.tower)
        found: dict[int, dict[str, list[LoRALayer]]] = defaultdict(lambda: defaultdict(list))
        weights = [weight for weight in blocks.tower.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0)
        for step in track(range(self.steps), "gradpruner: steps"):
            shown.losses(blocks.tower, shown.batches[step % len(shown.batches)]).mean().backward()
            nn.utils.clip_grad_norm_(weights, LARGEST_NORM)
            for number, name in layers:
                found[number][name].append(_gradients_of(blocks[number].get_submodule(name)))
            optimizer.step()
            optimizer.zero_grad()
        for (number, name), layer in layers.items():
            blocks.replace(number, name, layer)
        return found

    def importance(self, steps: Steps) -> list[float]:
        """How much each block matters: the sum over its layers."""
        return [sum(importance(of_layer, self.score) for of_layer in layers.values()) for layers in steps.values()]

    def merge(self, kept: nn.Module, dropped: nn.Module, steps: Mapping[str, list[LoRALayer]]) -> None:
        """Adds a dropped block's weights to those of the same name and shape in a block that is kept.

        Args:
            kept: changed in place.
            dropped: a block like it.
            steps: of the dropped block, by layer.
        """
        for name, of_layer in steps.items():
            own, other = weight_of(kept.get_submodule(name)), weight_of(dropped.get_submodule(name))
            own.copy_(merged_weight(own, other, igia_matrix(of_layer), self.density))


def _gradients_of(layer: Any) -> LoRALayer:
    A, B = (part["default"].weight.grad for part in (layer.lora_A, layer.lora_B))
    assert isinstance(A, Tensor) and isinstance(B, Tensor)
    return LoRALayer(A.clone(), B.clone())
