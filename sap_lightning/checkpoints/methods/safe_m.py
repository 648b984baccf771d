"""SAFE-M: what a second model has learned where it is salient and in no conflict with the first.

Reference code: Harris-X/DGSM, merge/SAFE (mask_generation.py, merge.py); we found no paper under this name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sap_lightning.checkpoints.activations import Means, watched
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.keys import layer_of, matched
from sap_lightning.checkpoints.method import Seen, WholeMethod
from sap_lightning.checkpoints.sources import Part, Sources
from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.functional.flatness import Sharpness, sharpness_aware_saliency
from sap_lightning.functional.masking import keep_highest
from sap_lightning.functional.projection import split_along
from sap_lightning.merging.ataf import is_mixed


@dataclass(frozen=True)
class SafeM(WholeMethod):
    """W_A + λ_p·τ∥ + λ_o·τ⊥, layer by layer: τ is what B has changed of the base, where it is let in.

    X̄ and Ȳ are a layer's mean inputs and outputs over all positions of the texts. They stand for a gradient,
    g_A = Ȳ_A·X̄_Aᵀ and g_B = (Ȳ_B − Ȳ_C)·X̄_Aᵀ, by which every weight w has the score |w·g| / (1 + a·g²) (``code``) or
    |w·g| / (g² + ε) (``paper``). Where w_B is among the highest scores of its layer it is let in, unless w_A is among
    the highest of A too and the two have changed the base in opposite directions. τ∥ is a row's part along A's mean
    input X̄_A, τ⊥ the rest. Biases have g_A = Ȳ_A, g_B = Ȳ_B − Ȳ_C, and the latter as their direction.

    Matrices and biases of linear layers in the blocks are fused; all else stays as A has it. X̄ and Ȳ are means over
    positions, where the code sums over each text's, so that scores do not grow with the length of a text. Of scores
    that are equal at the threshold the code lets all in, and here the share is exact.

    Args:
        share: of the weights of a layer, that which counts as salient.
        sharpness: the score of the code or that of the paper.
        a: in the score of the code.
        along: λ_p.
        across: λ_o.
    """

    name = "safe_m"
    needs_base = True

    share: float = 0.1
    sharpness: Sharpness = "code"
    a: float = 0.1
    along: float = 1.0
    across: float = 0.8

    def __post_init__(self) -> None:
        check_share("fuse.method.share", self.share)
        check_at_least("fuse.method.a", self.a, 0)

    def look(self, sources: Sources, examples: Examples) -> Seen:
        (a, b), c = sources.models, sources.base
        inputs, outputs = _means(a.folder, examples)
        moved = [_means(model.folder, examples)[1] for model in (b, c)]
        layers = {layer_of(key) for key, shape in a.shapes.items() if is_mixed(key, shape)}
        of_a, of_b, of_c = (matched(list(layers), list(means)) for means in (outputs, *moved))
        found: dict[str, Tensor] = {}
        for layer in sorted(of_a.keys() & of_b.keys() & of_c.keys()):
            found[f"{layer}.inputs"] = inputs[of_a[layer]]
            found[f"{layer}.outputs"] = outputs[of_a[layer]]
            found[f"{layer}.moved"] = moved[0][of_b[layer]] - moved[1][of_c[layer]]
        if not found:
            raise InputError(f"{a.name}: has no linear layers in blocks that {b.name} and {c.name} have too")
        return found

    def kept(self, sources: Sources, seen: Seen) -> dict[str, str]:
        left = (key for key in sources.first.shapes if f"{layer_of(key)}.moved" not in seen)
        return dict.fromkeys(left, f"{self.name} leaves it") | sources.kept

    def fused(self, key: str, part: Part, seen: Seen) -> Tensor:
        inputs, outputs, moved = (seen[f"{layer_of(key)}.{what}"] for what in ("inputs", "outputs", "moved"))
        a, b = (change.stored.float() for change in part.changes)
        if key.endswith("bias"):
            g_a, g_b, direction = outputs[None], moved[None], moved
        else:
            g_a, g_b, direction = outputs[:, None] * inputs, moved[:, None] * inputs, inputs
        salient_a, salient_b = self._salient(a, g_a), self._salient(b, g_b)
        tau_a, tau_b = a - part.base, b - part.base
        conflict = salient_a & salient_b & (tau_a.sign() != tau_b.sign())
        let_in = tau_b * (salient_b & ~conflict)
        along, across = split_along(let_in, direction)
        return a + self.along * along + self.across * across

    def _salient(self, weight: Tensor, direction: Tensor) -> Tensor:
        return keep_highest(sharpness_aware_saliency(weight, direction, self.sharpness, self.a), self.share)


def _means(folder: Path, examples: Examples) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean inputs and outputs of a model's linear layers."""
    model, means = examples.load(folder), Means()
    with watched(model, means):
        examples.show(model)
    return means.inputs, means.outputs
