"""AdaMMS: blocks interpolated at the share that moves the fewest answers (Du et al. 2025, arXiv:2503.23733).

Reference code: THUNLP-MT/AdaMMS, merge/*.py (mapping, interpolation) and search/view_log_delta_perdata_search_limit.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.keys import names_in
from sap_lightning.checkpoints.method import Seen, WholeMethod
from sap_lightning.checkpoints.sources import Part, Sources
from sap_lightning.console import track
from sap_lightning.errors import check_at_least, check_share
from sap_lightning.functional.agreement import answers_that_move
from sap_lightning.merging.method import refuse_unused


@dataclass(frozen=True)
class AdaMMS(WholeMethod):
    """(1 − α)·W_A + α·W_B of all weights in the blocks; all else stays as A has it.

    B's blocks are found under whatever prefix they have. α is that of an even grid from 0 on at which the fewest
    answers differ from those at either of its neighbours; the ends of the grid are not chosen, and of equal ones the
    smallest is. No answer is told to be right.

    The paper asks two multimodal models about images, and compares what they say word for word. Here an answer is what
    a language model goes on to say after a text, greedily, or which of all captions a CLIP model takes for an image,
    which is our reading for it.

    Args:
        alpha: α, for which then nothing is looked at.
        largest: the end of the grid.
        steps: number of α on it, 0 and the largest among them.
        smooth: how many neighbours on either side the number of answers that move is averaged over.
    """

    name = "adamms"

    alpha: float | None = None
    largest: float = 0.6
    steps: int = 7
    smooth: int = 0

    def __post_init__(self) -> None:
        check_at_least("fuse.method.steps", self.steps, 3)
        check_at_least("fuse.method.smooth", self.smooth, 0)
        check_share("fuse.method.largest", self.largest)
        if self.alpha is not None:
            check_share("fuse.method.alpha", self.alpha)
            refuse_unused(self, ["largest", "steps", "smooth"], "alpha", "fuse.method")

    @property
    def needs_anchors(self) -> bool:  # type: ignore[override]  # to find α
        return self.alpha is None

    @property
    def grid(self) -> list[float]:
        """The α whose answers are compared."""
        return [self.largest * step / (self.steps - 1) for step in range(self.steps)]

    def look(self, sources: Sources, examples: Examples) -> Seen:
        moving = answers_that_move(self._answers(sources, examples), self.smooth)
        return {"moving": torch.tensor(moving, dtype=torch.float64)}

    def _answers(self, sources: Sources, examples: Examples) -> list[Sequence[Hashable]]:
        """What the model says at every α; its weights and those that lead to B's are in memory together."""
        model = examples.load(sources.first.folder)
        keys = [key for key in sources.first.stated if key not in self._left(sources)]
        weights, names = model.state_dict(), names_in(model, sources.first, keys)
        pairs = {key: _both(sources.whole(key)) for key in keys}
        found: list[Sequence[Hashable]] = []
        for alpha in track(self.grid, f"{self.name}: alphas"):
            for key, name in names.items():
                weights[name].copy_(_between(*pairs[key], alpha).view(weights[name].shape))
            found.append(examples.answers(model))
        return found

    def _left(self, sources: Sources) -> dict[str, str]:
        outside = (key for key in sources.first.stated if not any(part.isdecimal() for part in key.split(".")))
        return dict.fromkeys(outside, f"{self.name} leaves it") | sources.kept

    def _chosen(self, seen: Seen) -> float:
        """α: what was given, or the steadiest that is no end of the grid."""
        if self.alpha is not None:
            return self.alpha
        inner = seen["moving"].tolist()[1:-1]
        return self.grid[1 + inner.index(min(inner))]

    def kept(self, sources: Sources, seen: Seen) -> dict[str, str]:
        if self._chosen(seen) == 0:  # the very bytes
            return dict.fromkeys(sources.first.stated, f"{self.name} leaves it")
        return self._left(sources)

    def fused(self, key: str, part: Part, seen: Seen) -> Tensor:
        return _between(*_both(part), self._chosen(seen))

    def findings(self, seen: Seen) -> dict[str, Any]:
        found = {"alpha": self._chosen(seen)}
        if not seen:
            return found
        alphas = (f"{alpha:g}" for alpha in self.grid)
        return {**found, "moving": dict(zip(alphas, seen["moving"].tolist(), strict=True))}


def _both(part: Part) -> tuple[Tensor, Tensor]:
    a, b = (change.stored.float() for change in part.changes)
    return a, b


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return (1 - alpha) * a + alpha * b
