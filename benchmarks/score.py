"""Scoring one adapter against one plain forward and backward of the same anchor batch, in every space and reduction.

python benchmarks/score.py --base ../shared/models/lit-dinov2-vits14-112

Plain means autograd on the base with the adapter added to its weights, with gradients of the adapted weights; and, for
comparison, PEFT's LoRA model with gradients of A and B.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize
from worlds import SHAPES_CLIP, images_in

from sap_lightning.console import quieten
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.saliency import Reduction, alignment_loss
from sap_lightning.functional.spaces import SPACES, SpaceName
from sap_lightning.models.clip import load_base
from sap_lightning.models.patched import Patched
from sap_lightning.models.probe import AnchorProbe

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
REDUCTIONS: tuple[Reduction, ...] = ("mean_then_abs", "abs_then_mean", "square")


def main(base: str = SHAPES_CLIP, num_pairs: int = 32, rank: int = 8, rounds: int = 7) -> None:
    """Times all in turns.

    Args:
        base: CLIP checkpoint.
        num_pairs: anchors, scored in one batch.
        rank: LoRA rank.
        rounds: how often each takes its turn.
    """
    quieten()
    tower, texts, logit_scale, _ = load_base(base)
    anchors = AnchorDataModule(str(images_in("anchors")), num_pairs=num_pairs, base=base)
    images, captions = anchors.images(), texts(anchors.captions)
    names = [name for name, _ in tower.named_modules() if name.rsplit(".")[-1] in TARGETS]
    layers = {name: random_layer(tower.get_parameter(f"{name}.weight"), rank) for name in names}
    weights = [tower.get_parameter(f"{name}.weight") for name in names]

    def features(batch: torch.Tensor) -> torch.Tensor:
        return normalize(tower(batch).image_embeds, dim=-1)

    def plain() -> None:
        for weight in weights:
            weight.requires_grad_(True)
        alignment_loss(features(images), captions).mean().backward()
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)

    batches = [(images, torch.arange(num_pairs))]
    probe = AnchorProbe(Patched(tower), lambda: batches, captions, logit_scale)

    def ours(space: SpaceName, reduction: Reduction) -> Callable[[], None]:
        spaces = {name: SPACES[space](layer) for name, layer in layers.items()}
        return lambda: probe.gradients(layers, spaces, reduction) and None

    candidates = {"plain": plain} | {f"{s} {r}": ours(s, r) for s in SPACES for r in REDUCTIONS}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(seconds(run))
    peft = get_peft_model(tower, LoraConfig(r=rank, target_modules=TARGETS))
    times["PEFT LoRA"] = [seconds(lambda: peft_pass(peft, images, captions)) for _ in range(rounds)]
    plain_time = statistics.median(times["plain"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:24} {1000 * median:8.1f} ms  ratio {median / plain_time:.3f}")


def random_layer(weight: torch.Tensor, rank: int) -> LoRALayer:
    d_out, d_in = weight.shape
    return LoRALayer(torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out, rank) * 0.01, 2.0)


def peft_pass(model: torch.nn.Module, images: torch.Tensor, captions: torch.Tensor) -> None:
    alignment_loss(normalize(model(images).image_embeds, dim=-1), captions).mean().backward()
    model.zero_grad()


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    auto_cli(main)
