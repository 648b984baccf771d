"""GradPruner's maths: how much a block matters, from the gradients of LoRA in its first steps, and blocks merged.

ICLR 2026, arXiv:2601.19503; reference code: secretflow/ACoLab, PaperCode/GradPrune.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, inner
from sap_lightning.functional.masking import keep_mask

BlockScore = Literal["paper", "code"]


def importance(steps: Sequence[LoRALayer], score: BlockScore) -> float:
    """How much a weight matters, by the simulated gradients Ĝ_i = ∇B_i·∇A_i of its LoRA at t steps, in float64.

    ``paper``: the sum of its IGIA matrix, Σ F = (1/t)·Σ_i ‖Ĝ_i‖²; ``code``: Σ_i ‖Ĝ_i‖. From products of size r × r.

    Args:
        steps: at every step ∇A_i (r, d_in) as A and ∇B_i (d_out, r) as B.
        score: which.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.igia import importance
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> steps = [LoRALayer(torch.tensor([[3.0, 4.0]]), torch.tensor([[b]])) for b in (1.0, 2.0)]
        >>> importance(steps, "paper"), importance(steps, "code")  # norms 5 and 10
        (62.5, 15.0)
    """
    squares = [inner(step, step) for step in steps]
    return sum(squares) / len(steps) if score == "paper" else sum(square**0.5 for square in squares)


def igia_matrix(steps: Sequence[LoRALayer]) -> Tensor:
    """F = (1/t)·Σ_i Ĝ_i ⊙ Ĝ_i, shape (d_out, d_in), of the simulated gradients Ĝ_i = ∇B_i·∇A_i.

    Args:
        steps: as for `importance`.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.igia import igia_matrix
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> steps = [LoRALayer(torch.tensor([[3.0, 4.0]]), torch.tensor([[b]])) for b in (1.0, 2.0)]
        >>> igia_matrix(steps).tolist()
        [[22.5, 40.0]]
    """
    total = torch.zeros(steps[0].shape)
    for step in steps:
        total += step.delta().square()
    return total / len(steps)


def merged_weight(kept: Tensor, pruned: Tensor, igia: Tensor, density: float) -> Tensor:
    """W_kept + M ⊙ S ⊙ W_pruned: M is where the pruned weight matters most, S where both have one sign.

    Args:
        kept: W_kept, shape (d_out, d_in).
        pruned: W_pruned, of the same shape.
        igia: F of the pruned weight.
        density: share of the elements in M; of equal F the last.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.igia import merged_weight
        >>> kept, pruned = torch.tensor([[1.0, -1.0, 1.0, 1.0]]), torch.tensor([[5.0, 5.0, 5.0, 5.0]])
        >>> merged_weight(kept, pruned, torch.tensor([[4.0, 3.0, 2.0, 1.0]]), density=0.5).tolist()
        [[6.0, -1.0, 1.0, 1.0]]
    """
    mask = keep_mask(igia, 1 - density) & (kept.sign() * pruned.sign() > 0)
    return torch.where(mask, kept + pruned, kept)
