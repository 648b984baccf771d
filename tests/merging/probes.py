"""Anchors on a tiny tower, random adapters for it, and what float64 says of the tower with an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from adapters import adapter_of, exact_delta
from references import TINY_VISION, randn
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from transformers import CLIPVisionModelWithProjection

from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.patched import Patched
from sap_lightning.models.probe import AnchorProbe

Layers = Mapping[str, LoRALayer]
LOGIT_SCALE = 10.0
Q, FC2, PROJECTION = (
    "vision_model.encoder.layers.0.self_attn.q_proj",
    "vision_model.encoder.layers.0.mlp.fc2",
    "visual_projection",
)
"""One layer of each shape: (32, 32), (32, 64) and (16, 32)."""


def random_layer(seed: int, shape: tuple[int, int], rank: int = 3, scale: float = 2.0) -> LoRALayer:
    d_out, d_in = shape
    return LoRALayer(0.2 * randn(seed, rank, d_in), 0.2 * randn(seed + 1, d_out, rank), scale)


def random_adapter(
    seed: int, names: Sequence[str] = (Q, FC2, PROJECTION), rank: int = 3, samples: int | None = None
) -> Adapter:
    shapes = layer_shapes(tower())
    layers = {name: random_layer(1000 * seed + 2 * i, tuple(shapes[name]), rank) for i, name in enumerate(names)}
    return adapter_of(layers, f"client {seed}", samples)


def unlike_clients() -> list[Adapter]:
    """Three clients of other ranks, the last without a layer."""
    return [random_adapter(1), random_adapter(2, rank=2), random_adapter(3, (Q, PROJECTION))]


def negative(one: Adapter) -> Adapter:
    """The adapter whose updates are the opposite."""
    return adapter_of({n: layer._replace(scale=-layer.scale) for n, layer in one.layers.items()}, f"not {one.name}")


def zero(one: Adapter) -> Adapter:
    """An adapter that changes nothing, as LoRA starts."""
    return adapter_of({n: layer._replace(B=0 * layer.B) for n, layer in one.layers.items()}, f"no {one.name}")


@cache
def tower() -> CLIPVisionModelWithProjection:
    """The base; not to be changed."""
    base = CLIPVisionModelWithProjection(TINY_VISION).eval().requires_grad_(False)
    for index, weight in enumerate(base.parameters()):
        # Large enough for attention to look somewhere, which CLIP's own initialisation is not.
        weight.copy_(0.2 * randn(100 + index, *weight.shape) + (1 if weight.ndim == 1 else 0))
    return base


def images(anchors: int) -> Tensor:
    return randn(10, anchors, 3, 16, 16)


def captions(anchors: int) -> Tensor:
    return normalize(randn(11, anchors, 16), dim=-1)


def probe(anchors: int = 8, **parts: Any) -> AnchorProbe:
    """Anchors in batches of five on a copy of the tower, but for the parts that are given."""
    given: dict[str, Any] = {
        "patched": Patched(deepcopy(tower())),
        "batches": lambda: zip(images(anchors).split(5), torch.arange(anchors).split(5), strict=True),
        "captions": captions(anchors),
        "logit_scale": LOGIT_SCALE,
    }
    return AnchorProbe(**given | parts)


def deltas(adapters: Sequence[Adapter], name: str) -> list[Tensor]:
    """Every client's dense float64 ΔW of a layer, 0 where it lacks the layer."""
    return [
        exact_delta(one.layers[name]) if name in one.layers else torch.zeros(layer_shapes(tower())[name]).double()
        for one in adapters
    ]


def model_of(layers: Layers) -> tuple[CLIPVisionModelWithProjection, dict[str, Tensor]]:
    """The float64 tower, and those of its weights that the layers change, changed."""
    precise = deepcopy(tower()).double()
    weights = {
        f"{name}.weight": precise.get_submodule(name).weight + exact_delta(layer) for name, layer in layers.items()
    }
    return precise, weights


def exact_features(layers: Layers, pixels: Tensor) -> Tensor:
    """Normalised float64 features of images through base + adapter."""
    precise, weights = model_of(layers)
    return normalize(functional_call(precise, weights, (pixels.double(),)).image_embeds, dim=-1)


def anchor_gradients(layers: Layers, names: Sequence[str], anchors: int = 8) -> list[dict[str, Tensor]]:
    """∂(1 − cos_i)/∂W at base + adapter for one anchor after another, by autograd in float64."""
    precise, changed = model_of(layers)
    weights = {f"{name}.weight": precise.get_submodule(name).weight for name in names} | changed
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    gradients = []
    for pixels, caption in zip(images(anchors).double(), captions(anchors).double(), strict=True):
        features = functional_call(precise, weights, (pixels[None],)).image_embeds
        loss = 1 - torch.cosine_similarity(features, caption[None]).sum()
        of = torch.autograd.grad(loss, list(weights.values()))
        gradients.append(dict(zip((name.removesuffix(".weight") for name in weights), of, strict=True)))
    return gradients


def layer_inputs(layers: Layers, name: str, anchors: int = 8) -> Tensor:
    """Float64 inputs of a layer over all tokens of all anchors through base + adapter, shape (tokens, d_in)."""
    precise, weights = model_of(layers)
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])

    precise.get_submodule(name).register_forward_pre_hook(keep)
    functional_call(precise, weights, (images(anchors).double(),))
    return seen[0].flatten(0, -2)


def relative_gap(actual: Mapping[str, Update], expected: Mapping[str, Update]) -> float:
    """The largest ‖actual − expected‖ / ‖expected‖ of a layer."""
    assert actual.keys() == expected.keys()
    return max(
        float((dense(actual[name]).double() - dense(expected[name]).double()).norm())
        / max(float(dense(expected[name]).double().norm()), 1e-12)
        for name in expected
    )


def is_finite(update: Mapping[str, Update]) -> bool:
    return all(bool(dense(layer).isfinite().all()) for layer in update.values())
