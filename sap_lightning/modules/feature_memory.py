"""What a client remembers of its own images: the local half of pFedPrompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sap_lightning.errors import check_at_least
from sap_lightning.functional.feature_memory import recalled


@dataclass(frozen=True)
class FeatureMemory:
    """A client's memory of its training images, which adds to what its prompt says and never leaves the client.

    This is our reading of pFedPrompt (Guo et al., WWW 2023), of which there is no code: its non-parametric attention to
    local features, in the form of Tip-Adapter (Zhang et al. 2022, arXiv:2207.09519), whose defaults these are.

    Args:
        alpha: α, how much the memory counts; 0 leaves the prompt alone.
        beta: β; the larger, the less an image counts that is not alike.

    Raises:
        InputError: when one of them is below 0.
    """

    alpha: float = 1.0
    beta: float = 5.5

    def __post_init__(self) -> None:
        check_at_least("model.memory.alpha", self.alpha, 0)
        check_at_least("model.memory.beta", self.beta, 0)

    def logits(self, features: Tensor, keys: Tensor, labels: Tensor, classes: int) -> Tensor:
        """α·A·Y, shape (n, classes): what is added to a prompt's logits, see ``functional.feature_memory``."""
        return self.alpha * recalled(features, keys, labels, classes, self.beta)
