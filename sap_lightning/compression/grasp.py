"""GRASP: the linear layers of redundant blocks keep the singular triplets that matter for the loss.

Liu et al. 2024, arXiv:2501.00339; reference code: LyoAI/GRASP, modeling_grasp.py and grasp.py, which shifts labels
twice and drops biases; here neither is done. The scores ``random`` and ``sigma`` are controls of as many parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import Calibration
from sap_lightning.compression.low_rank import LowRank, rounded, weight_of
from sap_lightning.errors import InputError, check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.subspaces import Triplets
from sap_lightning.functional.triplets import (
    highest,
    is_smaller,
    kept_by_energy,
    kept_by_parameters,
    kept_by_share,
    triplet_scores,
)

Score = Literal["paper", "code", "gradient", "sigma", "random"]
Refresh = Literal["half", "block", "once"]
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Grasp:
    """Compresses a block: two factors in the place of each of its weights.

    Args:
        retain: share of a weight's triplets that is kept, rounded up; 0.1 if no other share is given.
        compression: share of a weight's parameters that goes, in place of retain.
        energy: share of the sum of a weight's scores that as few triplets as can have keep, in place of retain.
        score: how a triplet matters, see `triplet_scores`; or by σ alone, or at random.
        refresh: gradients are of the model as it is before each half of a block, before each block, or once, of the
            model at first.
        seed: of a random choice.
    """

    retain: float | None = None
    compression: float | None = None
    energy: float | None = None
    score: Score = "paper"
    refresh: Refresh = "half"
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {"retain": self.retain, "compression": self.compression, "energy": self.energy}
        given = [f"compress.{name}" for name, share in shares.items() if share is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} each say how much is kept; give one of them")
        for name, share in shares.items():
            check_share(f"compress.{name}", share or 0.0)

    @property
    def settings(self) -> dict[str, Any]:
        """All that it is, as JSON knows it."""
        others = self.compression is not None or self.energy is not None
        return {**asdict(self), "retain": None if others else self.share}

    @property
    def share(self) -> float:
        """Of a weight's triplets that is kept, where that is what counts."""
        return 0.1 if self.retain is None else self.retain

    @property
    def needs_gradients(self) -> bool:
        """Whether the model has to be shown anything to score triplets."""
        return self.score not in ("sigma", "random")

    def first_look(self, blocks: Blocks, chosen: list[int], shown: Calibration | None) -> dict[int, Gradients]:
        """The gradients of the chosen blocks' weights, by block, where they are looked at once."""
        if shown is None or not self.needs_gradients or self.refresh != "once":
            return {}
        layers = {number: blocks.linears(number) for number in chosen}
        every = {f"{number} {name}": layer for number, found in layers.items() for name, layer in found.items()}
        gradients = shown.gradients(every)
        return {number: {name: gradients[f"{number} {name}"] for name in found} for number, found in layers.items()}

    def compress(
        self,
        blocks: Blocks,
        number: int,
        shown: Calibration | None,
        first: Gradients | None,
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, LoRALayer]:
        """Compresses a block in place: its MLP, then its attention.

        Args:
            blocks: the model's.
            number: of the block.
            shown: what gives gradients.
            first: gradients that were looked at before.
            dtypes: in which each layer's weight is stored, to which its factors are rounded.

        Returns:
            Factors by the layer's name in the block; weights whose factors would be no smaller stay and have none.
        """
        found = {}
        for layers in blocks.halves(number) if self.refresh == "half" else [blocks.linears(number)]:
            gradients = first or (shown.gradients(layers) if shown and self.needs_gradients else {})
            for name, layer in layers.items():
                factors = self.factors(f"{number} {name}", weight_of(layer), gradients.get(name))
                if factors is not None:
                    place = f"{blocks.name}.{number}.{name}"
                    A, B = (rounded(one, dtypes[name], place) for one in (factors.A, factors.B))
                    found[name] = LoRALayer(A, B)
                    put_in_place(blocks, number, name, found[name])
        return found

    def factors(self, name: str, weight: Tensor, gradient: Tensor | None) -> LoRALayer | None:
        """The factors of a weight (d_out, d_in) in float64; None where they would be no smaller than it.

        Args:
            name: of the layer, by which a random choice is drawn.
            weight: W.
            gradient: ∂L/∂W, for scores that look at it.
        """
        triplets = Triplets.of(weight)
        scores = self._scores(name, triplets, gradient)
        shape = (weight.shape[0], weight.shape[1])
        kept = self.kept(shape, scores)
        return triplets.factors(highest(scores, kept)) if is_smaller(shape, kept) else None

    def kept(self, shape: tuple[int, int], scores: Tensor) -> int:
        """How many triplets a weight (d_out, d_in) keeps that have these scores."""
        if self.energy is not None:
            return kept_by_energy(scores, self.energy)
        if self.compression is not None:
            return kept_by_parameters(shape, self.compression)
        return kept_by_share(shape, self.share)

    def _scores(self, name: str, triplets: Triplets, gradient: Tensor | None) -> Tensor:
        if self.score == "random":
            drawn = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
            return torch.rand(len(triplets.sigma), generator=torch.Generator().manual_seed(int.from_bytes(drawn[:8])))
        if self.score == "sigma":
            return triplets.sigma
        assert gradient is not None
        return triplet_scores(triplets, triplets.gradients(gradient), self.score)


def put_in_place(blocks: Blocks, number: int, layer: str, factors: LoRALayer) -> None:
    """Two factors, which count in float32, take the place of a layer of a block."""
    whole = LoRALayer(factors.A.float(), factors.B.float())
    blocks.replace(number, layer, LowRank.in_place_of(blocks[number].get_submodule(layer), whole))
