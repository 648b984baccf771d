"""FAM: neurons of an unlike model, matched by what they say and how flat they are, and merged by their parts.

Reference code: Harris-X/DGSM, merge/FAM (fam_mapping.py, fam_merge.py, and FAI in cache_activation_new.py); we found no
paper under this name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sap_lightning.checkpoints.activations import Activity
from sap_lightning.checkpoints.behaviour import SPACES, Behaviour, activities
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.keys import layer_of, matched
from sap_lightning.checkpoints.method import Seen, WholeMethod
from sap_lightning.checkpoints.neurons import Matcher, paired_blocks
from sap_lightning.checkpoints.sources import Change, Part, Rows, Sources
from sap_lightning.errors import InputError, check_positive, check_share
from sap_lightning.functional.flatness import flatness_aware_importance, sharpness_of
from sap_lightning.functional.masking import keep_highest
from sap_lightning.functional.matching import UNMATCHED, in_coordinates_of, row_scales
from sap_lightning.functional.projection import split_along
from sap_lightning.io.weights import matrix_shape

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")
"""A block's number in a key."""


@dataclass(frozen=True)
class FAM(WholeMethod):
    """W_A[i] + λ_p·w·τ∥ + λ_o·(τ − w·τ∥) for each neuron i of A with a counterpart j in B, τ = W_B[j] − W_A[i].

    Two neurons are alike by the cosine of their outputs at the same positions of the examples, centred, times
    exp(−|H_i − H_j| / σ); neurons are assigned one to one so that the sum of it is greatest (Hungarian method), and
    pairs below the threshold are dropped. Of each layer those rows are merged that are among its most important in both
    models, by FAI = mean |output| · mutual information with the size of the input / variance of the output. τ∥ is a
    row's part along A's mean input, w = 1 − β·H_j; biases have λ_p·w·τ.

    The code assigns the most important neurons of each layer alone, by profiles (mean, mutual information, FAI), whose
    cosines are always near 1, and takes it that inputs are the same dimensions in both models. What follows is our
    reading, for models of unlike widths, depths or orders of neurons:

    - Layers of one space share one assignment: the stream, by what all blocks read of it; the hidden neurons of an MLP;
      the heads of values, by linear CKA of what they say, with the heads of queries that they serve and the dimensions
      in both. Dimensions of queries and keys go by their outputs together, or stay in place where the position turns
      them (RoPE). Columns without a counterpart are as if B had A's weight there.
    - Blocks of models of other depth are assigned in order, by linear CKA of what they read.
    - H is the variance v as v / (v + the median of the layer), in [0, 1), where the code has v and sums over positions:
      there σ keeps all pairs or none, as outputs are large or small.
    - A row of B is taken at the scale of A's, as long as that over the columns that both have, with its bias; and as
      inputs without a counterpart are not there to be made up for, a bias moves by the share of columns that have one.
    - Where towers divide an image into other patches, it is looked at in its class token and 4 × 4 fields.

    Linear layers of the blocks are merged; all else stays as A has it.

    Args:
        share: of a layer's neurons, that which counts as important.
        sigma: σ.
        threshold: likeness below which neurons are no pair.
        beta: β, from 0 to 1.
        along: λ_p.
        across: λ_o.
    """

    name = "fam"
    takes_unlike = True

    share: float = 0.2
    sigma: float = 0.1
    threshold: float = 0.3
    beta: float = 0.5
    along: float = 1.0
    across: float = 0.8

    def __post_init__(self) -> None:
        check_share("fuse.method.share", self.share)
        check_share("fuse.method.threshold", self.threshold)
        check_share("fuse.method.beta", self.beta)
        check_positive("fuse.method.sigma", self.sigma)

    def check(self, models: Sequence[str], base: str | None, weights: Sequence[float] | None) -> None:
        super().check(models, base, weights)
        if find_spec("scipy") is None:
            raise InputError("fuse.method fam: assigns neurons by scipy; pip install 'sap-lightning[fam]'")

    def look(self, sources: Sources, examples: Examples) -> Seen:
        mine, theirs = (Behaviour.of(examples.load(one.folder), examples, one.name) for one in sources.models)
        of_a, of_b = activities([mine, theirs])
        blocks, matcher = paired_blocks(of_a, of_b), Matcher(self.sigma, self.threshold)
        pairs = [(i, j) for i, j in enumerate(blocks.tolist()) if j != UNMATCHED]
        stream = matcher.stream([of_a[i] for i, _ in pairs], [of_b[j] for _, j in pairs])
        on_disk = matched(list(mine.responses.positions), [layer_of(key) for key in sources.first.stated])
        seen: dict[str, Tensor] = {"blocks": blocks}
        for i, j in pairs:
            maps = {"stream": stream, **matcher.block(of_a[i], of_b[j], mine.heads, theirs.heads)}
            for role, layer in mine.layers[i].items():
                if role in of_b[j] and layer in on_disk:
                    rows, columns = (maps[space] for space in SPACES[role])
                    found = self._rows(of_a[i][role], of_b[j][role], rows) | {"columns": columns.clone()}
                    seen |= {f"{on_disk[layer]}.{what}": tensor for what, tensor in found.items()}
        return seen

    def _rows(self, a: Activity, b: Activity, rows: Tensor) -> dict[str, Tensor]:
        """Which rows of a layer are merged with which of B's, how flat those are, and A's mean input."""
        important_a, important_b = (
            keep_highest(flatness_aware_importance(one.inputs.norm(dim=1), one.outputs), self.share) for one in (a, b)
        )
        both = (rows != UNMATCHED) & important_a & important_b[rows]
        return {
            "rows": torch.where(both, rows, UNMATCHED),
            "flat": 1 - self.beta * sharpness_of(b.outputs)[rows],
            "inputs": a.inputs.mean(0),
        }

    def kept(self, sources: Sources, seen: Seen) -> dict[str, str]:
        others = _other_keys(sources, seen)
        return {key: why for key in sources.first.stated if (why := self._obstacle(key, sources, seen, others))}

    def _obstacle(self, key: str, sources: Sources, seen: Seen, others: Mapping[str, str]) -> str | None:
        a, b = sources.models
        if f"{layer_of(key)}.rows" not in seen:
            return f"{self.name} leaves it"
        for needed in (key, f"{layer_of(key)}.weight"):
            if needed not in others:
                return f"not in {b.name}"
            if not (a.is_float(needed) and b.is_float(others[needed])):
                return "not of floating point numbers"
        return None

    def part(self, key: str, rows: Rows, sources: Sources, seen: Seen) -> Part:
        a, b = sources.models
        layer, others = layer_of(key), _other_keys(sources, seen)
        counterparts, columns = seen[f"{layer}.rows"], seen[f"{layer}.columns"]
        mine, theirs = (one.float() for one in _both(f"{layer}.weight", sources, others))
        there = in_coordinates_of(mine, theirs, counterparts, columns)
        scales, known = row_scales(mine, there, columns), columns != UNMATCHED
        first, other = _both(key, sources, others)
        base = first.float()
        if key.endswith("bias"):
            moved = scales * in_coordinates_of(base[0], other[0].float(), counterparts) - base
            there = base + known.float().mean() * moved
        else:
            there = torch.where(known, scales[:, None] * there, base)
        return Part(rows, base, [Change(a.name, key, first, base), Change(b.name, key, there, base)])

    def fused(self, key: str, part: Part, seen: Seen) -> Tensor:
        a, b = part.base, part.changes[1].stored
        flat = seen[f"{layer_of(key)}.flat"]
        if key.endswith("bias"):
            return a + self.along * flat * (b - a)
        along = flat[:, None] * split_along(b - a, seen[f"{layer_of(key)}.inputs"])[0]
        return a + self.along * along + self.across * (b - a - along)

    def findings(self, seen: Seen) -> dict[str, Any]:
        rows = torch.cat([tensor for name, tensor in seen.items() if name.endswith(".rows")])
        columns = torch.cat([tensor for name, tensor in seen.items() if name.endswith(".columns")])
        return {
            "blocks": seen["blocks"].tolist(),
            "matched": float((columns >= 0).float().mean()),
            "merged": float((rows >= 0).float().mean()),
        }


def _both(key: str, sources: Sources, others: Mapping[str, str]) -> list[Tensor]:
    """All rows of a weight, A's and B's."""
    keys = zip(sources.models, (key, others[key]), strict=True)
    return [one.rows(own, 0, matrix_shape(one.stated[own].shape)[0]) for one, own in keys]


def _other_keys(sources: Sources, seen: Seen) -> dict[str, str]:
    """B's key for each of A's, in the block that is matched with A's."""
    blocks = seen["blocks"].tolist()
    there = {}
    for key in sources.first.stated:
        if (number := _NUMBER.search(key)) and int(number[0]) < len(blocks) and blocks[int(number[0])] >= 0:
            there[key] = _NUMBER.sub(str(blocks[int(number[0])]), key, count=1)
    found = matched(list(there.values()), list(sources.models[1].stated))
    return {key: found[own] for key, own in there.items() if own in found}
